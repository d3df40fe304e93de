"""Preparation of data: real data sets of the ``datasets`` library, files of each kind, and what is
reused when."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import CHAT_TEMPLATE

from workshop_utils.core.errors import DataError, OutputExists
from workshop_utils.training.recipe import prepare_data, row_templates, splits
from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
from workshop_utils.training.recipe.prepare_data import (
    MARKER,
    NOTHING_BETWEEN,
    ONE_SPACE,
    load_prepared,
    prepare,
    require_whole_batch,
)

TEMPLATES = {"input_template": r"Q: {question}\nA:", "output_template": "{answer}"}


def rows_of(directory: Path) -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (directory / f"{name}.jsonl").open()]
        for name in splits.NAMES
    }


def all_rows(directory: Path) -> list[dict]:
    return [row for part in rows_of(directory).values() for row in part]


def sizes(directory: Path) -> list[int]:
    return list(map(len, rows_of(directory).values()))


def table(count: int = 40) -> list[dict]:
    return [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(count)]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A byte-level tokenizer with a chat template, as in a model's directory; made without
    transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE})
    )
    return directory


@pytest.fixture
def made(tmp_path):
    """Prepare ``rows``, written to a file first, with the fields of a configuration."""

    def make(rows, out="out", tokenizer=None, max_seq_length=2048, **fields):
        config = HFDatasetConfig(str(jsonl(tmp_path / "rows.jsonl", rows)), **fields)
        return prepare(config, tmp_path / out, tokenizer, max_seq_length, progress=False)

    return make


def _arrow(path: Path) -> None:
    data = pyarrow.Table.from_pylist(table())
    with pyarrow.ipc.new_stream(path, data.schema) as stream:
        stream.write_table(data)


def _folder(path: Path) -> None:
    path.mkdir()
    jsonl(path / "train.jsonl", table())


KINDS = {
    "a.jsonl": lambda path: jsonl(path, table()),
    "a.json": lambda path: path.write_text(json.dumps(table())),
    "a.csv": lambda path: pandas.DataFrame(table()).to_csv(path, index=False),
    "a.tsv": lambda path: pandas.DataFrame(table()).to_csv(path, sep="\t", index=False),
    "a.parquet": lambda path: pandas.DataFrame(table()).to_parquet(path),
    "a.arrow": _arrow,
    "folder": _folder,
    "saved": lambda path: datasets.Dataset.from_list(table()).save_to_disk(path),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_source_gives_the_same_rows(tmp_path, name):
    KINDS[name](tmp_path / name)
    config = HFDatasetConfig(str(tmp_path / name), **TEMPLATES)
    prepared = prepare(config, tmp_path / "out", progress=False)
    expected = [{"input": f"Q: what is {n}?\nA:", "output": f"it is {n}"} for n in range(40)]
    assert sorted(all_rows(tmp_path / "out"), key=str) == sorted(expected, key=str)
    assert [split.rows for split in prepared.statistics.values()] == [36, 2, 2]


def test_conversations_are_rendered_with_the_chat_template_and_own_splits_are_kept(tmp_path, tiny):
    folder = tmp_path / "chats"
    folder.mkdir()
    for name, start in (("train", 0), ("validation", 100), ("test", 200)):
        rows = [
            [
                {"role": "user", "content": f"number {start + i}?"},
                {"role": "assistant", "content": f" it is {i} "},
            ]
            for i in range(4)
        ]
        jsonl(folder / f"{name}.jsonl", [{"messages": messages} for messages in rows])
    config = HFDatasetConfig(str(folder), split="train/validation/test")
    found = prepare(config, tmp_path / "out", tiny, 20, progress=False)
    rows = rows_of(tmp_path / "out")
    assert rows["test"][1] == {
        "input": "<|im_start|>user\nnumber 201?<|im_end|>\n<|im_start|>assistant\n",
        "output": "it is 1",
    }
    assert sizes(tmp_path / "out") == [4, 4, 4]
    assert found.prompt_template == NOTHING_BETWEEN
    # Byte-level: a token a byte, 1 for each special token; the stop token is counted.
    training = found.statistics["training"]
    assert training.max_tokens == len("<user\nnumber 0?>\n<assistant\nit is 0") + 1
    assert training.truncated == 4
    with pytest.raises(DataError, match="give the tokenizer, whose chat template"):
        prepare(config, tmp_path / "other", None, progress=False)


def test_the_tokenizer_of_a_checkpoint_is_found(tmp_path, tiny, made):
    inside = tmp_path / "checkpoint" / "context" / "nemo_tokenizer"
    inside.parent.mkdir(parents=True)
    inside.symlink_to(tiny)
    found = made(table(), tokenizer=tmp_path / "checkpoint", **TEMPLATES)
    assert found.statistics["test"].max_tokens == len("Q: what is 10?\nA: it is 10") + 1
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        made(table(), tokenizer=tmp_path, **TEMPLATES)


def test_a_long_answer_counts_as_cut(made, tiny):
    rows = [*table(39), {"question": "q", "answer": "a" * 200}]
    found = made(rows, tokenizer=tiny, max_seq_length=100, seed=1, **TEMPLATES)
    assert sum(one.answers_cut for one in found.statistics.values()) == 1
    assert sum(one.truncated for one in found.statistics.values()) == 1


@pytest.mark.parametrize(
    "ending, between",
    [
        (r"{question}\n", NOTHING_BETWEEN),
        ("{question} ", ONE_SPACE),
        ("{question}", ONE_SPACE),
        (r"{question}\n ", ONE_SPACE),
    ],
)
def test_one_space_stands_between_unless_the_prompt_ends_with_a_new_line(made, ending, between):
    prepared = made(table(), input_template=ending, output_template="{answer}")
    assert prepared.prompt_template == between


# Templates, mapping, converter


@pytest.mark.parametrize(
    "given, wanted",
    [
        (r"a\nb", "a\nb"),
        (r"\t\r\\\"\'", "\t\r\\\"'"),
        (r"\\n", r"\n"),
        (r"\x41\u00e4", "Aä"),
        (r"\ud83d\ude00", "😀"),
        ("a\nb", "a\nb"),
    ],
)
def test_escapes(given, wanted):
    assert row_templates.unescape(given, "t") == wanted


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_without_a_backslash_stays(text):
    kept = text.replace("\\", "")
    assert row_templates.unescape(kept, "t") == kept
    assert row_templates.unescape(text.replace("\\", "\\\\"), "t") == text


ANSWER = {"output_template": "{answer}"}


@pytest.mark.parametrize(
    "fields, words",
    [
        (ANSWER | {"input_template": r"{question}\d"}, [r"\d at character 11 is no escape"]),
        (ANSWER | {"input_template": "{question}\\"}, ["is no escape", r"written \\"]),
        (ANSWER | {"input_template": r"{question}\ud83d"}, ["half of a character"]),
        (ANSWER | {"input_template": "{question"}, ["unbalanced braces"]),
        (ANSWER | {"input_template": "{question!r:>5}"}, ["{question!r:>5} is no column"]),
        (ANSWER | {"input_template": "{}"}, ["{} is no column", "{{ or }}"]),
        (ANSWER | {"input_template": "Hello"}, ["names no column"]),
        (ANSWER, ["input_template is missing"]),
        ({"input_template": "{question}"}, ["output_template is missing"]),
        ({"field_mapping": {"a": "b"}}, ["give input_template and output_template"]),
        (TEMPLATES | {"field_mapping": "{"}, ["no JSON", "Example"]),
        (TEMPLATES | {"field_mapping": "[1]"}, ["field_mapping is [1]; it must be a mapping"]),
        (
            TEMPLATES | {"field_mapping": {"quest": "question"}},
            ["no template has a field {quest}", "{answer}, {question}"],
        ),
        (TEMPLATES | {"custom_converter": "a:b"}, ["leave out input_template"]),
        ({"train_split_ratio": 1.0}, ["train_split_ratio is 1.0", "above 0 and below 1"]),
        ({"val_test_split_ratio": 0}, ["above 0 and below 1"]),
        ({"num_proc": 0}, ["at least 1"]),
        ({"dataset_config": 7}, ["dataset_config is 7; it must be a text or none"]),
        ({"custom_converter": 7}, ["it must be a function or a text or none"]),
        ({"load_kwargs": {"split": "x"}}, ["load_kwargs: split", "set split"]),
        ({"split": "a/b"}, ["three with slashes"]),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said_at_once(fields, words):
    with pytest.raises(DataError) as error:
        HFDatasetConfig("any", **fields)
    for word in words:
        assert word in str(error.value)


def test_a_missing_column_is_an_error_with_all_columns_and_the_nearest(made):
    question, answer = {"input_template": "{question}"}, {"output_template": "{answer}"}
    near = r"no column 'qestion'\. Did you mean question\? Its columns are: question, answer"
    for fields, message in (
        (answer | {"input_template": "{qestion}"}, near),
        (
            question | {"output_template": "{a}", "field_mapping": {"a": "reply"}},
            r"no column 'reply' \(from field_mapping, for \{a\}\)",
        ),
    ):
        with pytest.raises(DataError, match=message):
            made(table(), **fields)


def test_field_mapping_and_values_inside_columns(made, tmp_path):
    rows = [{"q.text": f"q{n}", "answers": {"text": [f"a{n}", "b"]}, "id": n} for n in range(20)]
    templates = {"input_template": "{id}: {q} {{x}}", "output_template": "{answers[text][0]}"}
    made(rows, field_mapping='{"q": "q.text"}', **templates)
    assert {"input": "7: q7 {x}", "output": "a7"} in all_rows(tmp_path / "out")
    for output, message in (
        ("{answers}", r"answers is no text but dict .* as in \{answers\[text\]\}"),
        ("{answers[reply]}", r"answers has no \[reply\]"),
    ):
        with pytest.raises(DataError, match=message):
            made(rows, input_template="{id}", output_template=output)


def test_rows_that_cannot_be_used_are_counted(made, tmp_path):
    rows = table(30)
    rows[0]["answer"] = None
    rows[1]["answer"] = "  "
    found = made(rows, **TEMPLATES)
    assert found.left_out == {"converter": 0, "null": 1, "empty": 1, "no prompt": 0}
    assert sum(one.rows for one in found.statistics.values()) == 28
    assert "left out: 1 rows because a column is null" in str(found)
    with pytest.raises(DataError, match="no row is left: 5 because a column is null"):
        made([{"question": "q", "answer": None}] * 5, **TEMPLATES)


CONVERTERS = """
SUFFIX = "!"
def good(row):
    made = {"input": row["question"], "output": row["answer"] + SUFFIX}
    return None if row["answer"] == "it is 3" else made
def chat(row):
    turns = [("user", row["question"]), ("assistant", row["answer"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
def fails(row):
    return row["missing"]
def wrong(row):
    return row["question"]
def mixed(row):
    return chat(row) if row["question"] < "what is 2" else good(row)
"""


def test_a_custom_converter(made, tmp_path, tiny, monkeypatch):
    (tmp_path / "mine.py").write_text(CONVERTERS)
    file = str(tmp_path / "mine.py")
    assert made(table(), custom_converter=f"{file}:good").left_out["converter"] == 1
    assert all(row["output"].endswith("!") for row in all_rows(tmp_path / "out"))
    chats = made(table(), tokenizer=tiny, custom_converter=f"{file}:chat")
    assert chats.prompt_template == NOTHING_BETWEEN
    monkeypatch.chdir(tmp_path)
    assert made(table(), custom_converter="mine:good").reused is False
    prepared = made(table(), custom_converter=lambda row: {"input": row["question"], "output": "x"})
    assert prepared.left_out["converter"] == 0


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "mine.py:fails",
            "row 1: .*fails failed: KeyError: 'missing' .mine.py, line 10.*has question, answer",
        ),
        ("mine.py:wrong", "row 1: .*returned 'what is 0"),
        ("mine.py:mixed", "for some rows"),
        ("mine.py:other", "no function 'other'; its functions: chat, fails, good"),
        ("mine.py:chat", "give the tokenizer"),
        ("nothing", "FILE.py:function"),
        ("no.such:f", "No module named"),
        ("no.py:f", "does not exist"),
    ],
)
def test_a_converter_that_cannot_be_used(made, tmp_path, tiny, monkeypatch, name, message):
    (tmp_path / "mine.py").write_text(CONVERTERS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        made(table(), tokenizer=tiny if "mixed" in name else None, custom_converter=name)


def test_a_converter_that_ends_the_program_is_an_error(made, tmp_path):
    """Exit status 0 would look like success."""
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "row.py").write_text("import sys\ndef f(row):\n    sys.exit(0)\n")
    for name, message in (
        ("script", r"script.py:f cannot be imported: SystemExit: 0 \(script.py, line 2\)"),
        ("row", r"row 1: .*row.py:f failed: SystemExit: 0 \(row.py, line 3\)"),
    ):
        with pytest.raises(DataError, match=message):
            made(table(), custom_converter=f"{tmp_path}/{name}.py:f")


@pytest.mark.slow
def test_worker_processes_make_the_same_rows_and_say_the_same_errors(made, tmp_path, tiny):
    (tmp_path / "mine.py").write_text(CONVERTERS)
    rows = table(4500)
    made(rows, "one", tiny, num_proc=1, custom_converter=f"{tmp_path}/mine.py:chat")
    made(rows, "two", tiny, num_proc=2, custom_converter=f"{tmp_path}/mine.py:chat")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    with pytest.raises(DataError, match="fails failed: KeyError"):
        made(rows, "two", num_proc=2, custom_converter=f"{tmp_path}/mine.py:fails")


# Splits

RATIO = st.decimals("0.01", "0.99", places=2).map(float)


@given(st.integers(1, 400), RATIO, RATIO)
def test_sizes_are_exact_or_refused(rows, train, test):
    from decimal import ROUND_HALF_UP, Decimal

    def share(count, ratio):
        return int((count * Decimal(str(ratio))).quantize(Decimal(1), ROUND_HALF_UP))

    training = share(rows, train)
    tested = share(rows - training, test)
    wanted = {"training": training, "validation": rows - training - tested, "test": tested}
    if min(wanted.values()) > 0:
        assert splits.sizes(rows, train, test) == wanted
    else:
        with pytest.raises(DataError, match="none may be empty"):
            splits.sizes(rows, train, test)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=150), RATIO, RATIO, st.integers(0, 5))
def test_a_division_is_exact_disjoint_complete_and_repeatable(numbers, train, test, seed):
    keys = [str(number) for number in numbers]
    try:
        made = splits.divide(keys, train, test, seed)
    except DataError as error:
        assert "none may be empty" in str(error) or "input that no other row has" in str(error)
        return
    assert {name: len(rows) for name, rows in made.rows.items()} == splits.sizes(
        len(keys), train, test
    )
    assert sorted(row for rows in made.rows.values() for row in rows) == list(range(len(keys)))
    inputs = [{keys[row] for row in rows} for rows in made.rows.values()]
    assert not (inputs[0] & inputs[1] or inputs[0] & inputs[2] or inputs[1] & inputs[2])
    assert made.repeated == sum(count for count in Counter(keys).values() if count > 1)
    assert made == splits.divide(keys, train, test, seed)


def test_the_second_ratio_is_the_share_of_the_test_set(made, tmp_path):
    """As in the reference, where it is the ``test_size`` of the rows that training leaves."""
    made(table(100), train_split_ratio=0.8, val_test_split_ratio=0.25, **TEMPLATES)
    assert sizes(tmp_path / "out") == [80, 15, 5]


def test_another_seed_divides_otherwise():
    keys = [str(number) for number in range(100)]
    assert splits.divide(keys, 0.9, 0.5, 1).rows != splits.divide(keys, 0.9, 0.5, 2).rows


def test_too_few_rows_say_how_many_would_do():
    message = "3 rows .* make 3 training, 0 validation, 0 test rows: none may be empty. With these "
    with pytest.raises(DataError, match=message + r"ratios \d+ rows would do") as error:
        splits.sizes(3, 0.9, 0.5)
    enough = int(str(error.value).split("With these ratios ")[1].split()[0])
    assert splits.sizes(enough, 0.9, 0.5)
    with pytest.raises(DataError):
        splits.sizes(enough - 1, 0.9, 0.5)


@pytest.mark.parametrize(
    "left, right",
    [("Hello  World", "hello world"), ("a\nb", "a b"), ("ｆｕｌｌ", "full"), (" x ", "x")],  # noqa: RUF001
)
def test_inputs_that_count_as_the_same(left, right):
    assert splits.key(left) == splits.key(right)


def test_inputs_that_differ_in_signs_are_not_the_same():
    assert splits.key("3 + 4") != splits.key("3 - 4")


def test_repeated_inputs_are_never_tested(made, tmp_path):
    rows = table(80) + [{"question": f"WHAT  is {n}?", "answer": "again"} for n in range(20)]
    found = made(rows, train_split_ratio=0.5, **TEMPLATES)
    parts = rows_of(tmp_path / "out")
    assert sizes(tmp_path / "out") == [50, 25, 25]
    trained = {splits.key(row["input"]) for row in parts["training"]}
    held_out = {splits.key(row["input"]) for row in parts["validation"] + parts["test"]}
    assert not trained & held_out
    assert found.repeated == 40
    with pytest.raises(DataError, match="only 0 rows have an input that no other row has"):
        made([{"question": "same", "answer": str(n)} for n in range(40)], **TEMPLATES)


def test_leaks_between_own_splits_are_dropped_and_counted(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, start, end in (("train", 0, 10), ("validation", 8, 14), ("test", 12, 20)):
        rows = [{"input": f"n {n}", "output": "x"} for n in range(start, end)]
        jsonl(folder / f"{name}.jsonl", rows)

    def prepared(split):
        config = HFDatasetConfig(str(folder), split=split)
        return prepare(config, tmp_path / "out", progress=False)

    found = prepared("train/validation/test")
    assert found.leaks == {"training": 0, "validation": 2, "test": 2}
    assert sizes(tmp_path / "out") == [10, 4, 6]
    assert "dropped: 2 test rows whose input stands in an earlier split" in str(found)
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation, test"):
        prepared("train/dev/test")


# Reuse


def test_the_same_is_reused_and_anything_else_is_not(tmp_path, tiny, monkeypatch):
    file = jsonl(tmp_path / "rows.jsonl", table())
    converter = tmp_path / "mine.py"
    converter.write_text(CONVERTERS)
    config = HFDatasetConfig(str(file), **TEMPLATES)
    folder = tmp_path / "folder"
    _folder(folder)
    jsonl(folder / "test.jsonl", table())

    def reused(config, tokenizer=None, length=2048):
        return prepare(config, tmp_path / "out", tokenizer, length, progress=False).reused

    assert not reused(config)
    assert reused(config)
    assert reused(replace(config, num_proc=1))
    for changed in (
        replace(config, input_template="{question}"),
        replace(config, output_template="{answer}."),
        replace(config, seed=7),
        replace(config, train_split_ratio=0.8),
        replace(config, val_test_split_ratio=0.25),
        replace(config, input_template="{q}", field_mapping={"q": "question"}),
        replace(config, dataset_name=str(folder)),
        replace(config, dataset_name=str(folder), split="test"),
        replace(config, load_kwargs={"verification_mode": "no_checks"}),
        replace(config, dataset_name=str(jsonl(tmp_path / "copy.jsonl", table()))),
        HFDatasetConfig(str(file), custom_converter=f"{converter}:good"),
    ):
        assert not reused(changed), changed
        assert reused(changed)
    changed = HFDatasetConfig(str(file), custom_converter=f"{converter}:good")
    converter.write_text(CONVERTERS.replace('"!"', '"?"'))
    assert not reused(changed)
    assert rows_of(tmp_path / "out")["test"][0]["output"].endswith("?")
    assert not reused(changed, tiny)
    assert not reused(changed, tiny, 64)
    monkeypatch.setattr(prepare_data, "_FORMAT", prepare_data._FORMAT - 1)
    assert not reused(changed, tiny, 64), "rows of an earlier format"


def test_content_decides_not_name_and_time(tmp_path):
    import os

    file = jsonl(tmp_path / "rows.jsonl", table())
    config, before = HFDatasetConfig(str(file), **TEMPLATES), file.stat()
    prepare(config, tmp_path / "out", progress=False)
    jsonl(file, [{"question": row["question"], "answer": row["answer"].upper()} for row in table()])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert not prepare(config, tmp_path / "out", progress=False).reused
    assert rows_of(tmp_path / "out")["test"][0]["output"].startswith("IT IS")


def test_a_changed_output_is_noticed_and_made_again(made, tmp_path):
    made(table(), **TEMPLATES)
    good = (tmp_path / "out" / "test.jsonl").read_text()
    (tmp_path / "out" / "test.jsonl").write_text(good[:-20])
    (tmp_path / "out" / "test.jsonl.idx.npy").write_text("stale index of NeMo's")
    with pytest.raises(DataError, match="has changed since it was prepared"):
        load_prepared(tmp_path / "out")
    assert not made(table(), **TEMPLATES).reused
    assert (tmp_path / "out" / "test.jsonl").read_text() == good
    names = {MARKER, *(f"{name}.jsonl" for name in splits.NAMES)}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    with pytest.raises(DataError, match="holds no prepared data"):
        load_prepared(tmp_path)


def test_other_peoples_files_are_not_replaced(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match="Nothing was replaced"):
        made(table(), **TEMPLATES)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_error_leaves_what_was_there(made, tmp_path):
    made(table(), **TEMPLATES)
    before = rows_of(tmp_path / "out")
    with pytest.raises(DataError):
        made(table(), input_template="{nothing}", output_template="{answer}")
    assert rows_of(tmp_path / "out") == before
    assert not list(tmp_path.glob(".out.*.partial"))


def test_two_processes_at_once(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", table(500))
    code = """if True:
        import sys
        from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
        from workshop_utils.training.recipe.prepare_data import prepare
        templates = {"input_template": "{question}", "output_template": "{answer}"}
        config = HFDatasetConfig(sys.argv[1], **templates)
        print(prepare(config, sys.argv[2], progress=False).reused)
    """
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "out")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in running]
    assert sorted(out.strip() for out, _ in answers) == ["False", "True"], answers


def test_fewer_validation_rows_than_a_batch_are_refused(made):
    found = made(table(), **TEMPLATES)
    require_whole_batch(found, 2)
    message = "jsonl has 2 rows, fewer than the global batch of 4: NeMo would neither validate nor"
    with pytest.raises(DataError, match=message):
        require_whole_batch(found, 4)


# Files that are wrong


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.jsonl", '{"input": "a", "output": "b"}\n{"input":', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", "[1]\n", "line 1: a list"),
        ("x.jsonl", "\n\n", "holds no rows"),
        ("x.csv", "", r"x\.csv holds no rows"),
        ("x.parquet", "no parquet", r"x\.parquet: Parquet magic bytes not found"),
        (
            "x.jsonl",
            '{"input": "a", "output": "b"}\n{"input": "a", "output": 3}\n',
            r"x\.jsonl, line 2: `output` is a number",
        ),
        ("x.txt", "text", r"ending in \.txt are not read; known are \.jsonl"),
        ("x.jsonl", '{"input": 1, "output": "b"}\n', "row 1: `input` is a number"),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            "row 1: `messages` has to be a list of at least",
        ),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, tiny, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        prepare(HFDatasetConfig(str(tmp_path / name)), tmp_path / "out", tiny, progress=False)


def test_the_builder_that_reads_pickles_is_refused(tmp_path):
    with pytest.raises(DataError, match="pandas is the library's builder that reads pickles"):
        config = HFDatasetConfig("pandas", load_kwargs={"data_files": "a.pkl"}, **TEMPLATES)
        prepare(config, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "name, split, message",
    [
        # Not looked for on the Hub.
        ("row.jsonl", "train", r"does not exist\. Did you mean .*rows\.jsonl"),
        ("rows.jsonl", "test", "has no split 'test'; it has train"),
    ],
)
def test_what_is_not_there(tmp_path, name, split, message):
    jsonl(tmp_path / "rows.jsonl", table())
    with pytest.raises(DataError, match=message):
        config = HFDatasetConfig(str(tmp_path / name), split=split, **TEMPLATES)
        prepare(config, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "rows, shape, first",
    [
        (
            [
                {"instruction": f"add {n}", "input": f"{n}", "output": "x", "id": n}
                for n in range(9)
            ],
            "Alpaca: instruction and input",
            "add 0\n\n0",
        ),
        ([{"Question": f"q{n}", "Answer": "x"} for n in range(9)], "Question -> prompt", "q0"),
        (
            [{"input": f"q{n}", "output": "x", "system": "Be brief."} for n in range(9)],
            "system -> system message",
            "Be brief.",
        ),
        (
            [
                {
                    "conversations": [
                        {"from": "human", "value": f"q{n}"},
                        {"from": "gpt", "value": "x"},
                    ]
                }
                for n in range(9)
            ],
            "ShareGPT conversations",
            "<|im_start|>user\nq0<|im_end|>",
        ),
    ],
)
def test_the_shapes_that_people_have(tmp_path, tiny, rows, shape, first):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(HFDatasetConfig(str(file), train_split_ratio=0.5), tmp_path / "out", tiny)
    assert shape in str(found)
    assert ("not used: id" in str(found)) == ("id" in rows[0])
    made = [
        json.loads(line) for split in (tmp_path / "out").glob("*.jsonl") for line in split.open()
    ]
    assert len(made) == 9 and any(first in row["input"] for row in made)


def test_rows_of_several_shapes_are_all_used(tmp_path, tiny):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}]
    rows = [{"input": f"q{n}", "output": "x"} for n in range(8)] + [{"messages": turns}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = HFDatasetConfig(str(tmp_path / "x.jsonl"), train_split_ratio=0.5)
    found = prepare(config, tmp_path / "out", tiny, progress=False)
    assert sum(found.left_out.values()) == 0
    assert sum(split.rows for split in found.statistics.values()) == 9


def test_numbers_in_a_csv_are_texts_and_empty_prompts_are_counted(tmp_path, tiny):
    (tmp_path / "x.csv").write_text(
        "question,answer\n" + "".join(f"q{n},{n}\n" for n in range(9)) + " ,5\n"
    )
    config = HFDatasetConfig(str(tmp_path / "x.csv"), train_split_ratio=0.5)
    found = prepare(config, tmp_path / "out", tiny, progress=False)
    assert found.left_out["no prompt"] == 1 and "the prompt is empty" in str(found)
