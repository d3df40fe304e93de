"""``workshop generate`` and ``workshop evaluate`` as a person types them."""

import json

import pytest
from export_samples import Shape, config_of, tensors_of, write_adapter
from test_evaluate import LABELS, TEST, TRAIN
from test_generate import one_thread  # noqa: F401  used by every test
from tiny_model import SHAPE, make_tiny_model

from workshop_utils.cli import main

TINY = Shape(
    hidden=SHAPE["hidden_size"],
    heads=SHAPE["num_attention_heads"],
    groups=SHAPE["num_key_value_heads"],
    channels=SHAPE["head_dim"],
    ffn=SHAPE["intermediate_size"],
    layers=SHAPE["num_hidden_layers"],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_tiny_model(folder / "model", initializer_range=0.6)
    write_adapter(folder / "tiny.nemo", config_of(TINY), tensors_of(TINY))
    for name, rows in (("train", TRAIN), ("test", TEST)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def test_generate_shows_base_and_adapter(folder, capsys):
    command = [
        "generate",
        "hello",
        "bye",
        "--model",
        str(folder / "model"),
        "--adapter",
        str(folder / "tiny.nemo"),
        "--max-new-tokens",
        "5",
    ]
    assert main(command) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.split("prompt:  ")[1:]]
    assert [block[0] for block in blocks] == ["hello", "bye"]
    assert all("base:" in "".join(block) and "adapter:" in "".join(block) for block in blocks)
    assert any(
        block[1].removeprefix("base:") != block[2].removeprefix("adapter:")
        for block in blocks
        if len(block) > 2
    )


def test_generate_reads_prompts_from_files(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    options = ["--model", str(folder / "model"), "--max-new-tokens", "1"]
    assert main(["generate", *options, "--file", str(tmp_path / "prompts.txt")]) == 0
    assert capsys.readouterr().out.count("prompt:  ") == 2
    assert main(["generate", *options, "--file", str(folder / "test.jsonl")]) == 0
    assert "prompt:  Ticket T-100." in capsys.readouterr().out


def test_evaluate_prints_keeps_and_draws(folder, root, capsys):
    command = [
        "evaluate",
        "--model",
        str(folder / "model"),
        "--adapter",
        str(folder / "tiny.nemo"),
        "--data",
        str(folder / "test.jsonl"),
        "--limit",
        "2",
    ]
    assert main(command) == 0
    out = root / "runs" / "evaluation" / "tiny-first-2"
    first = capsys.readouterr().out
    assert (
        "base + 5 examples" in first
        and "Exact match on 2 test rows" in first
        and (out / "scores.png").exists()
    )
    assert main([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (
        list(again) == ["base", "base-few-shot", "majority-class", "adapter"]
        and again["adapter"]["rows"] == 2
    )
    assert [
        json.loads(line)["label"]
        for line in (out / "adapter" / "predictions.jsonl").read_text().splitlines()
    ] == LABELS[:2]


@pytest.mark.parametrize(
    "command, said",
    [
        (["generate"], "nothing to answer"),
        (["generate", "x", "--model", "nowhere"], "nowhere is no directory of a model"),
        (["generate", "--file", "gone.txt"], "gone.txt does not exist"),
        (["generate", "x", "--max-new-tokens", "0"], "at least 1"),
        (["evaluate", "--limit", "0"], "at least 1"),
        (["evaluate", "--model", "nowhere", "--data", "gone.jsonl"], "nowhere"),
    ],
)
def test_mistakes_get_a_sentence(command, said, capsys):
    assert main(command) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
