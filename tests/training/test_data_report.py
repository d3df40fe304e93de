"""`workshop data`: what it counts, with examples; that it writes nothing, and converts all or
nothing."""

import json

import pytest
from tiny_model import make_tiny_model

from workshop_utils.cli import main
from workshop_utils.core.chat_data import read_rows


def write(file, *pairs):
    rows = [{"input": question, "output": answer} for question, answer in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def told(capsys):
    """A function from words to the report of `workshop data check --json`, and its status."""

    def check(*words):
        status = main(["data", "check", *map(str, words), "--json"])
        return status, json.loads(capsys.readouterr().out)

    return check


def counts(report):
    return {code: found["count"] for code, found in report["findings"].items()}


def test_all_that_is_wrong_is_counted_with_two_examples(tmp_path, told):
    train = write(
        tmp_path / "train.jsonl",
        ("a", "1"), ("A ", "2"), ("b", "1"), ("b", "1"), (" ", "1"), ("", "1"), ("", "2"), ("c", 3),
    )  # fmt: skip
    test = write(tmp_path / "test.jsonl", ("b", "1"), ("  B", "1"), ("a", "9"), ("new", "1"))
    before = sorted(tmp_path.iterdir())
    status, report = told(train, "--test", test)
    assert status == 1 and not report["usable"] and sorted(tmp_path.iterdir()) == before
    assert counts(report) == {
        "unusable": 1,
        "empty_prompt": 3,
        "contradiction": 1,
        "repeated": 1,
        "test_row_in_training": 1,
        "test_prompt_in_training": 2,
    }
    findings = report["findings"]
    assert len(findings["empty_prompt"]["examples"]) == 2
    assert "line 5" in findings["empty_prompt"]["examples"][0]
    assert "line 1" in findings["contradiction"]["examples"][0]
    assert "train.jsonl, line 3" in findings["test_row_in_training"]["examples"][0]
    assert [text[:7] for text in report["not_checked"]] == ["lengths"]


def test_rows_without_a_fault(tmp_path, told, capsys):
    file = write(tmp_path / "x.jsonl", ("a", "1"), ("b", "2"))
    status, report = told(file)
    assert status == 0 and report["usable"] and report["findings"] == {}
    assert len(report["not_checked"]) == 2  # lengths, and the test set
    assert main(["data", "check", file]) == 0
    said = capsys.readouterr().out
    assert "2 rows" in said and "nothing wrong was found" in said and "not checked: lengths" in said


def test_what_the_length_cuts_away_is_counted_as_transformers_counts(tmp_path, told):
    from transformers import AutoTokenizer

    model = make_tiny_model(tmp_path / "hf")
    rows = [("q", "a" * 40), ("q" * 40, "a"), ("z", "a")]
    file, tokenizer = write(tmp_path / "x.jsonl", *rows), AutoTokenizer.from_pretrained(model)
    lengths = []
    for question, answer in rows:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        whole = tokenizer(answer, add_special_tokens=False).input_ids
        lengths.append(len(prompt) + len(whole) + 1)  # and the stop token
    status, report = told(file, "--model", model, "--seq-length", max(lengths))
    assert (status, report["longest"], counts(report)) == (0, max(lengths), {})
    # Both are 39 tokens longer than the third: more than the whole prompt of the first.
    status, report = told(file, "--model", model, "--seq-length", lengths[2])
    assert lengths[:2] == [lengths[2] + 39] * 2 and lengths[2] < 39
    assert counts(report) == {"answer_cut": 1, "prompt_cut": 1}


@pytest.mark.parametrize("words", [["--seq-length", "0"], ["--model", "no-such-model"]])
def test_wrong_options_are_said(tmp_path, capsys, words):
    assert main(["data", "check", write(tmp_path / "x.jsonl", ("a", "b")), *words])
    assert capsys.readouterr().err.startswith("error: ")


def test_convert_writes_messages_or_nothing(tmp_path, capsys):
    source, target = tmp_path / "x.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([{"instruction": "q", "input": "é", "output": "a", "id": 1}]))
    words = ["data", "convert", str(source), str(target)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Alpaca" in said and "not used: id" in said and "out.jsonl, 1 rows" in said
    assert json.loads(target.read_text("utf-8")) == read_rows(source)[0]
    before = target.read_bytes()
    assert main(words) == 1 and "--overwrite" in capsys.readouterr().err
    source.write_text('[{"instruction": "q", "output": 3}]')
    assert main([*words, "--overwrite"]) == 1 and target.read_bytes() == before
    assert main(["data", "convert", str(source), str(tmp_path / "out.csv")]) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "x.json"]
