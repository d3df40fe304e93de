"""The shapes of rows that people have, and the files that they lie in."""

import csv
import gzip
import json

import pytest

from workshop_utils.core.chat_data import read_rows
from workshop_utils.core.errors import DataError

SYSTEM, USER, ANSWER = (
    {"role": role, "content": text}
    for role, text in (("system", "s"), ("user", "q"), ("assistant", "a"))
)


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def share(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


JOINED = {"role": "user", "content": "q\n\nmore"}
SHAPES = {
    "openai": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "developer": (
        {"messages": [SYSTEM | {"role": "developer"}, USER, ANSWER]},
        [SYSTEM, USER, ANSWER],
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        [USER, ANSWER],
    ),
    "alpaca": ({"instruction": "q", "input": "more", "output": "a"}, [JOINED, ANSWER]),
    "alpaca, input empty": ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
    "alpaca, input null": ({"instruction": "q", "input": None, "output": "a"}, [USER, ANSWER]),
    "alpaca, no input": ({"instruction": "q", "output": "a"}, [USER, ANSWER]),
    "alpaca, system": ({"instruction": "q", "output": "a", "system": "s"}, [SYSTEM, USER, ANSWER]),
    "alpaca, history": (
        {"instruction": "q", "output": "a", "history": [["q", "a"]]},
        [USER, ANSWER, USER, ANSWER],
    ),
    "roles of NVIDIA's chat rows": (
        {"conversations": share(("System", "s"), ("User", "q"), ("Assistant", "a"))},
        [SYSTEM, USER, ANSWER],
    ),
    "query and context": ({"query": "q", "context": "more", "response": "a"}, [JOINED, ANSWER]),
    "dolly": ({"instruction": "q", "context": "more", "response": "a"}, [JOINED, ANSWER]),
    "sharegpt": (
        {"conversations": share(("system", "s"), ("human", "q"), ("gpt", "a"))},
        [SYSTEM, USER, ANSWER],
    ),
    "sharegpt, system": (
        {"system": "s", "conversations": share(("human", "q"), ("gpt", "a"))},
        [SYSTEM, USER, ANSWER],
    ),
    "sharegpt, openai's keys": ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "prompt/completion": ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
    "TRL's": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "question/answer": ({"Question": "q", "Answer": "a"}, [USER, ANSWER]),
    "OpenOrca": ({"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, USER, ANSWER]),
    "system column": ({"input": "q", "output": "a", "system": "s"}, [SYSTEM, USER, ANSWER]),
    "system empty": ({"input": "q", "output": "a", "system": ""}, [USER, ANSWER]),
}


@pytest.mark.parametrize("row, turns", SHAPES.values(), ids=SHAPES)
def test_known_shapes_are_joined(tmp_path, row, turns):
    assert read_rows(write(tmp_path / "x.jsonl", row)) == [{"messages": turns}]


def test_what_is_used_and_what_is_not_is_said(tmp_path, capsys):
    alpaca = {"instruction": "q", "input": "more", "output": "a", "id": 3}
    rows = read_rows(write(tmp_path / "x.jsonl", alpaca, {"prompt": "q", "answer": "a"}), say=True)
    assert [text.partition(", ")[2] for text in rows.said] == [
        "Alpaca: instruction and input (a blank line between) -> prompt, output -> answer: 1 rows",
        "prompt -> prompt, answer -> answer: 1 rows",
        "columns that are not used: id",
    ]
    assert capsys.readouterr().err.splitlines() == list(rows.said)
    plain = write(tmp_path / "x.jsonl", {"input": "q", "output": "a"}, {"messages": [USER, ANSWER]})
    assert read_rows(plain).said == ()
    turns = [USER | {"name": "bob"}, ANSWER | {"weight": 1}]
    said = "\n".join(read_rows(write(tmp_path / "x.jsonl", {"messages": turns, "tools": []})).said)
    assert "not used: tools" in said and "weight of messages" in said and "name" in said


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "q"}, "neither prompt nor answer among its columns: it has text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference training"),
        ({"prompt": "q", "query": "q", "output": "a"}, "prompt and query could each be the prompt"),
        (
            {"input": "q", "output": "a", "answer": "b"},
            "output and answer could each be",
        ),
        ({"input": "q", "output": 3}, "`output` is a number"),
        ({"input": "q", "output": float("nan")}, "`output` is a number"),
        ({"input": "q", "output": ["a"]}, "`output` is a list"),
        ({"input": "q", "output": {"a": 1}}, "`output` is an object"),
        ({"input": "q", "output": True}, "`output` is true or false"),
        ({"input": "q", "output": None}, "`output` is null"),
        ({"instruction": ["q"], "output": "a"}, "`instruction` is a list"),
        ({"instruction": "q", "input": 3, "output": "a"}, "`input` is a number"),
        ({"input": " ", "output": "a"}, "the prompt is empty (`input`)"),
        ({"instruction": "", "input": "", "output": "a"}, "empty (`instruction and input`)"),
        ({"messages": [USER | {"content": ""}, ANSWER]}, "the prompt is empty (`messages`)"),
        ({"messages": [SYSTEM, ANSWER]}, "the prompt is empty (`messages`)"),
        ({"messages": [None, None]}, "messages[0] needs a `role`"),
        ({"messages": [USER, {"role": ["x"], "content": "a"}]}, "messages[1] needs a `role`"),
        ({"messages": "q"}, "`messages` has to be a list"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "messages[1].weight is 0"),
        ({"messages": [USER, ANSWER | {"train": False}]}, "messages[1].train is false"),
        ({"prompt": "q", "completion": "a", "label": False}, "label is false"),
        (
            {"messages": [USER, ANSWER | {"content": [{"type": "thinking", "text": "h"}]}]},
            "a part of the type 'thinking'",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]},
            "[1] is of a tool",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": [1]}]}, "[1] is of a tool"),
        (
            {"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]},
            "messages[0]",
        ),
        ({"conversations": share(("human", "q"), ("x", "a"))}, "conversations[1] needs a `from`"),
        ({"conversations": share(("human", "q"))}, "`conversations` has to be a list of at least"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "t"}, "both system and the first message"),
        ({"instruction": "q", "output": "a", "history": "h"}, "history has to be a list of pairs"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, said):
    file = write(tmp_path / "x.jsonl", {"input": "q", "output": "a"}, row)
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: ") as caught:
        read_rows(file)
    assert said in str(caught.value)


ROWS = [{"prompt": "q", "completion": "a\nb, c"}, {"prompt": "é", "completion": "5"}]


def as_csv(file, separator=","):
    with file.open("w", newline="", encoding="utf-8-sig") as stream:  # as spreadsheets save it
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(file):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(file))


LINES = "".join(json.dumps(row) + "\r\n" for row in ROWS)
FILES = {
    "x.jsonl": lambda file: file.write_bytes(b"\xef\xbb\xbf" + LINES.encode()),
    "x.json": lambda file: file.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda file: file.write_text(LINES),
    "x.csv": as_csv,
    "x.tsv": lambda file: as_csv(file, "\t"),
    "x.parquet": as_parquet,
    "x.jsonl.gz": lambda file: file.write_bytes(gzip.compress(LINES.encode())),
    "x.json.gz": lambda file: file.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_hold_the_same_rows(tmp_path, name):
    FILES[name](tmp_path / name)
    texts = [[turn["content"] for turn in row["messages"]] for row in read_rows(tmp_path / name)]
    assert texts == [list(row.values()) for row in ROWS]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.jsonl", '{"input": "a"}'.encode("utf-16"), "it looks like UTF-16"),
        ("x.csv", "a,b".encode("utf-16"), "it looks like UTF-16"),
        ("x.jsonl", b'{"input": "a", "input": "b"}', "line 1: .*'input' stands twice"),
        ("x.jsonl", b'{"input": ' + b"[" * 100_000, "line 1: not JSON"),
        ("x.json", b"", "holds no rows"),
        ("x.json", b"[1, 2]", "row 1: a int, not an object"),
        ("x.json", b'[{"input": "a",]', "not JSON"),
        ("x.json", b'{"data":\n [{"input": "a"}]}', "one object over many lines"),
        ("x.json", b"[]", "holds no rows"),
        ("x.csv", b"", "holds no rows"),
        ("x.csv", b"prompt,completion\n", "holds no rows"),
        ("x.csv", b"prompt,completion\na,b,c\n", "line 2: 3 values for the 2 columns"),
        ("x.csv", b'prompt,completion\n"a\nb",c\nd\n', "line 4: 1 values for the 2 columns"),
        ("x.csv", b"prompt,prompt\na,b\n", "line 1: a column stands twice"),
        ("x.csv", b'prompt,completion\n"a,b', "line 2: not CSV"),
        ("x.parquet", b"PAR1 no", "x.parquet is no parquet file"),
        ("x.parquet", b"", "x.parquet is no parquet file"),
        ("x.arrow", b"no", "x.arrow is no arrow file"),
        ("x.jsonl.gz", gzip.compress(b"{}", mtime=0)[:12], "gzip data is damaged"),
        ("x.parquet", None, "does not exist"),
        ("", None, "is not a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(tmp_path / name)
