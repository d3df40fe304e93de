"""Preparation of data: real data sets of the ``datasets`` library, files of each kind, and what is
reused when."""

import csv
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
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


def table(count: int = 40) -> list[dict]:
    return [
        {"question": f"what is {number}?", "answer": f"it is {number}"} for number in range(count)
    ]


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
        file = jsonl(tmp_path / "rows.jsonl", rows)
        return prepare(
            HFDatasetConfig(str(file), **fields),
            tmp_path / out,
            tokenizer,
            max_seq_length,
            progress=False,
        )

    return make


# Kinds of sources


def _json_array(path: Path) -> Path:
    path.with_suffix(".json").write_text(json.dumps(table()))
    return path.with_suffix(".json")


def _csv(path: Path, delimiter: str = ",", suffix: str = ".csv") -> Path:
    with path.with_suffix(suffix).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table())
    return path.with_suffix(suffix)


def _arrow(path: Path) -> Path:
    import pyarrow

    data = pyarrow.Table.from_pylist(table())
    with pyarrow.ipc.new_stream(path.with_suffix(".arrow"), data.schema) as stream:
        stream.write_table(data)
    return path.with_suffix(".arrow")


def _parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table()), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def _folder(path: Path) -> Path:
    path.mkdir()
    jsonl(path / "train.jsonl", table())
    return path


def _saved(path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(table()).save_to_disk(path)
    return path


KINDS = {
    "jsonl": lambda path: jsonl(path.with_suffix(".jsonl"), table()),
    "json": _json_array,
    "csv": _csv,
    "tsv": lambda path: _csv(path, "\t", ".tsv"),
    "parquet": _parquet,
    "arrow": _arrow,
    "folder": _folder,
    "saved": _saved,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    source = KINDS[kind](tmp_path / "source")
    found = prepare(HFDatasetConfig(str(source), **TEMPLATES), tmp_path / "out", progress=False)
    rows = [row for part in rows_of(tmp_path / "out").values() for row in part]
    wanted = [
        {"input": f"Q: what is {number}?\nA:", "output": f"it is {number}"} for number in range(40)
    ]
    assert sorted(rows, key=str) == sorted(wanted, key=str)
    assert {name: one.rows for name, one in found.statistics.items()} == {
        "training": 36,
        "validation": 2,
        "test": 2,
    }


def test_conversations_are_rendered_with_the_chat_template_and_own_splits_are_kept(tmp_path, tiny):
    folder = tmp_path / "chats"
    folder.mkdir()
    for name, start in (("train", 0), ("validation", 100), ("test", 200)):
        jsonl(
            folder / f"{name}.jsonl",
            [
                {
                    "messages": [
                        {"role": "user", "content": f"number {start + i}?"},
                        {"role": "assistant", "content": f" it is {i} "},
                    ]
                }
                for i in range(4)
            ],
        )
    config = HFDatasetConfig(str(folder), split="train/validation/test")
    found = prepare(config, tmp_path / "out", tiny, 20, progress=False)
    rows = rows_of(tmp_path / "out")
    assert rows["test"][1] == {
        "input": "<|im_start|>user\nnumber 201?<|im_end|>\n<|im_start|>assistant\n",
        "output": "it is 1",
    }
    assert [len(part) for part in rows.values()] == [4, 4, 4]
    assert found.prompt_template == NOTHING_BETWEEN
    # Byte-level: a token a byte, 1 for each special token; the stop token is counted.
    assert (
        found.statistics["training"].max_tokens == len("<user\nnumber 0?>\n<assistant\nit is 0") + 1
    )
    assert found.statistics["training"].truncated == 4
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
    assert (
        made(table(), input_template=ending, output_template="{answer}").prompt_template == between
    )


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


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_without_a_backslash_stays(text):
    kept = text.replace("\\", "")
    assert row_templates.unescape(kept, "t") == kept
    assert row_templates.unescape(text.replace("\\", "\\\\"), "t") == text


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"input_template": r"{question}\d", "output_template": "{answer}"},
            [r"\d at character 11 is no escape", r"written \\"],
        ),
        ({"input_template": "{question}\\", "output_template": "{answer}"}, ["is no escape"]),
        (
            {"input_template": r"{question}\ud83d", "output_template": "{answer}"},
            ["half of a character"],
        ),
        ({"input_template": "{question", "output_template": "{answer}"}, ["unbalanced braces"]),
        ({"input_template": "{question!r}", "output_template": "{answer}"}, ["is no column"]),
        ({"input_template": "{}", "output_template": "{answer}"}, ["is no column"]),
        ({"input_template": "Hello", "output_template": "{answer}"}, ["names no column"]),
        ({"input_template": "{question}"}, ["output_template is missing"]),
        ({"output_template": "{question}"}, ["input_template is missing"]),
        ({"field_mapping": {"a": "b"}}, ["give input_template and output_template"]),
        (TEMPLATES | {"field_mapping": "{"}, ["no JSON", "Example"]),
        (TEMPLATES | {"field_mapping": "[1]"}, ["maps fields"]),
        (
            TEMPLATES | {"field_mapping": {"quest": "question"}},
            ["no template has a field {quest}", "{answer}, {question}"],
        ),
        (TEMPLATES | {"custom_converter": "a:b"}, ["leave out input_template"]),
        ({"train_split_ratio": 1.0}, ["between 0 and 1"]),
        ({"val_test_split_ratio": 0}, ["between 0 and 1"]),
        ({"num_proc": 0}, ["at least 1"]),
        ({"load_kwargs": {"split": "x"}}, ["load_kwargs: split"]),
        ({"split": "a/b"}, ["three with slashes"]),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said_at_once(fields, words):
    with pytest.raises(DataError) as error:
        HFDatasetConfig("any", **fields)
    for word in words:
        assert word in str(error.value)


def test_a_missing_column_is_an_error_with_all_columns_and_the_nearest(made):
    with pytest.raises(
        DataError,
        match=r"no column 'qestion'\. Did you mean question\? Its columns are: question, answer",
    ):
        made(table(), input_template="{qestion}", output_template="{answer}")
    with pytest.raises(DataError, match=r"no column 'reply' \(from field_mapping, for \{a\}\)"):
        made(
            table(),
            input_template="{question}",
            output_template="{a}",
            field_mapping={"a": "reply"},
        )
    with pytest.raises(DataError, match="columns are question, answer. Give input_template"):
        made(table())


def test_field_mapping_and_values_inside_columns(made, tmp_path):
    rows = [
        {"q.text": f"q{number}", "answers": {"text": [f"a{number}", "b"]}, "id": number}
        for number in range(20)
    ]
    made(
        rows,
        input_template="{id}: {q} {{x}}",
        output_template="{answers[text][0]}",
        field_mapping='{"q": "q.text"}',
    )
    everything = [row for part in rows_of(tmp_path / "out").values() for row in part]
    assert {"input": "7: q7 {x}", "output": "a7"} in everything
    with pytest.raises(
        DataError, match=r"answers is no text but dict .* as in \{answers\[text\]\}"
    ):
        made(rows, input_template="{id}", output_template="{answers}")
    with pytest.raises(DataError, match=r"answers has no \[reply\]"):
        made(rows, input_template="{id}", output_template="{answers[reply]}")


def test_rows_that_cannot_be_used_are_counted(made, tmp_path):
    rows = table(30)
    rows[0]["answer"] = None
    rows[1]["answer"] = "  "
    found = made(rows, **TEMPLATES)
    assert found.left_out == {"converter": 0, "null": 1, "empty": 1}
    assert sum(one.rows for one in found.statistics.values()) == 28
    assert "left out: 1 rows because a column is null" in str(found)
    with pytest.raises(DataError, match="no row is left: 5 because a column is null"):
        made([{"question": "q", "answer": None}] * 5, **TEMPLATES)


CONVERTERS = """
SUFFIX = "!"
def good(row):
    return None if row["answer"] == "it is 3" else {"input": row["question"], "output": row["answer"] + SUFFIX}
def chat(row):
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
def fails(row):
    return row["missing"]
def wrong(row):
    return row["question"]
def mixed(row):
    return chat(row) if row["question"] < "what is 2" else good(row)
"""  # noqa: E501


def test_a_custom_converter(made, tmp_path, tiny, monkeypatch):
    (tmp_path / "mine.py").write_text(CONVERTERS)
    file = str(tmp_path / "mine.py")
    assert made(table(), custom_converter=f"{file}:good").left_out["converter"] == 1
    assert all(
        row["output"].endswith("!") for part in rows_of(tmp_path / "out").values() for row in part
    )
    assert (
        made(table(), tokenizer=tiny, custom_converter=f"{file}:chat").prompt_template
        == NOTHING_BETWEEN
    )
    monkeypatch.chdir(tmp_path)
    assert made(table(), custom_converter="mine:good").reused is False
    assert (
        made(
            table(), custom_converter=lambda row: {"input": row["question"], "output": "x"}
        ).left_out["converter"]
        == 0
    )
    for name, words in {
        "fails": (
            "row 1: .*fails failed: KeyError: 'missing' .mine.py, line 8.*The row has question, "
            "answer"
        ),
        "wrong": "row 1: .*returned 'what is 0",
        "mixed": "for some rows",
        "other": "no function 'other'; its functions: chat, fails, good",
        "chat": "give the tokenizer",
    }.items():
        with pytest.raises(DataError, match=words):
            made(
                table(),
                tokenizer=tiny if name == "mixed" else None,
                custom_converter=f"mine.py:{name}",
            )
    for name, words in {
        "nothing": "FILE.py:function",
        "no.such:f": "No module named",
        "no.py:f": "does not exist",
    }.items():
        with pytest.raises(DataError, match=words):
            made(table(), custom_converter=name)


def test_a_converter_that_ends_the_program_is_an_error(made, tmp_path):
    """Exit status 0 would look like success."""
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "row.py").write_text("import sys\ndef f(row):\n    sys.exit(0)\n")
    with pytest.raises(
        DataError, match=r"script.py:f cannot be imported: SystemExit: 0 \(script.py, line 2\)"
    ):
        made(table(), custom_converter=f"{tmp_path}/script.py:f")
    with pytest.raises(
        DataError, match=r"row 1: .*row.py:f failed: SystemExit: 0 \(row.py, line 3\)"
    ):
        made(table(), custom_converter=f"{tmp_path}/row.py:f")


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


@settings(deadline=None)
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


@settings(deadline=None)
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
    assert {name: len(rows) for name, rows in rows_of(tmp_path / "out").items()} == {
        "training": 80,
        "validation": 15,
        "test": 5,
    }


def test_another_seed_divides_otherwise():
    keys = [str(number) for number in range(100)]
    assert splits.divide(keys, 0.9, 0.5, 1).rows != splits.divide(keys, 0.9, 0.5, 2).rows


def test_too_few_rows_say_how_many_would_do():
    with pytest.raises(
        DataError,
        match=r"3 rows .* make 3 training, 0 validation, 0 test rows: none may be empty\. With "
        r"these ratios (\d+) rows would do",
    ) as error:
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
    rows = table(80) + [
        {"question": f"WHAT  is {number}?", "answer": "again"} for number in range(20)
    ]
    found = made(rows, train_split_ratio=0.5, **TEMPLATES)
    parts = rows_of(tmp_path / "out")
    assert [len(part) for part in parts.values()] == [50, 25, 25]
    trained = {splits.key(row["input"]) for row in parts["training"]}
    assert not any(
        splits.key(row["input"]) in trained
        for name in ("validation", "test")
        for row in parts[name]
    )
    assert found.repeated == 40
    with pytest.raises(DataError, match="only 0 rows have an input that no other row has"):
        made([{"question": "same", "answer": str(number)} for number in range(40)], **TEMPLATES)


def test_leaks_between_own_splits_are_dropped_and_counted(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, numbers in (
        ("train", range(10)),
        ("validation", range(8, 14)),
        ("test", range(12, 20)),
    ):
        jsonl(
            folder / f"{name}.jsonl",
            [{"input": f"n {number}", "output": "x"} for number in numbers],
        )
    found = prepare(
        HFDatasetConfig(str(folder), split="train/validation/test"),
        tmp_path / "out",
        progress=False,
    )
    assert found.leaks == {"training": 0, "validation": 2, "test": 2}
    assert [len(part) for part in rows_of(tmp_path / "out").values()] == [10, 4, 6]
    assert "dropped: 2 test rows whose input stands in an earlier split" in str(found)
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation, test"):
        prepare(
            HFDatasetConfig(str(folder), split="train/dev/test"), tmp_path / "out", progress=False
        )


# Reuse


def test_the_same_is_reused_and_anything_else_is_not(tmp_path, tiny, monkeypatch):
    file = jsonl(tmp_path / "rows.jsonl", table())
    converter = tmp_path / "mine.py"
    converter.write_text(CONVERTERS)
    config = HFDatasetConfig(str(file), **TEMPLATES)
    folder = _folder(tmp_path / "folder")
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
        HFDatasetConfig(
            str(file),
            input_template="{q}",
            output_template="{answer}",
            field_mapping={"q": "question"},
        ),
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
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        MARKER,
        "test.jsonl",
        "training.jsonl",
        "validation.jsonl",
    ]
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
    code = (
        "import sys; from workshop_utils.training.recipe.dataset_config import HFDatasetConfig; "
        "from workshop_utils.training.recipe.prepare_data import prepare\nconfig = "
        "HFDatasetConfig(sys.argv[1], input_template='{question}', "
        "output_template='{answer}')\nprint(prepare(config, sys.argv[2], progress=False).reused)"
    )
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
    with pytest.raises(
        DataError,
        match=r"validation\.jsonl has 2 rows, fewer than the global batch of 4: NeMo would neither "
        r"validate nor save",
    ):
        require_whole_batch(found, 4)


# Files that are wrong


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.jsonl", '{"input": "a", "output": "b"}\n{"input":', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", "[1]\n", "line 1: a list"),
        ("x.jsonl", "\n\n", "holds no rows"),
        ("x.csv", "", r"x\.csv: "),
        ("x.parquet", "no parquet", r"x\.parquet: Parquet magic bytes not found"),
        ("x.txt", "text", r"ending in \.txt are not read; known are \.jsonl"),
        ("x.jsonl", '{"input": 1, "output": "b"}\n', "row 1: input is 1, not a text"),
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
        prepare(
            HFDatasetConfig("pandas", load_kwargs={"data_files": "a.pkl"}, **TEMPLATES),
            tmp_path / "out",
            progress=False,
        )


def test_a_mistyped_file_is_not_looked_for_on_the_hub(tmp_path):
    jsonl(tmp_path / "rows.jsonl", table())
    with pytest.raises(DataError, match=r"does not exist\. Did you mean .*rows\.jsonl"):
        prepare(HFDatasetConfig(str(tmp_path / "row.jsonl")), tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        prepare(
            HFDatasetConfig(str(tmp_path / "rows.jsonl"), split="test", **TEMPLATES),
            tmp_path / "out",
            progress=False,
        )
