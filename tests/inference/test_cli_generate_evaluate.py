"""``workshop generate`` and ``workshop evaluate`` as a person types them."""

import json

import pytest
from export_samples import config_of, tensors_of, write_adapter
from test_evaluate import LABELS, TEST, TRAIN
from test_generate import one_thread  # noqa: F401  used by every test
from test_nemo_generate import TINY
from tiny_model import make_tiny_model

from workshop_utils.cli import main


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
    models = f"--model {folder / 'model'} --adapter {folder / 'tiny.nemo'}"
    assert main(f"generate hello bye {models} --max-new-tokens 5".split()) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.split("prompt:  ")[1:]]
    assert [block[0] for block in blocks] == ["hello", "bye"]
    assert all("base:" in "".join(block) and "adapter:" in "".join(block) for block in blocks)
    pairs = [block[1:3] for block in blocks if len(block) > 2]
    assert any(a.removeprefix("base:") != b.removeprefix("adapter:") for a, b in pairs)


def test_generate_reads_prompts_from_files(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    options = ["--model", str(folder / "model"), "--max-new-tokens", "1"]
    assert main(["generate", *options, "--file", str(tmp_path / "prompts.txt")]) == 0
    assert capsys.readouterr().out.count("prompt:  ") == 2
    assert main(["generate", *options, "--file", str(folder / "test.jsonl")]) == 0
    assert "prompt:  Ticket T-100." in capsys.readouterr().out


def test_evaluate_prints_keeps_and_draws(folder, root, capsys):
    models = f"--model {folder / 'model'} --adapter {folder / 'tiny.nemo'}"
    command = f"evaluate {models} --data {folder / 'test.jsonl'} --limit 2".split()
    assert main(command) == 0
    out = root / "runs" / "evaluation" / "tiny-first-2"
    first = capsys.readouterr().out
    assert "base + 5 examples" in first and "Exact match on 2 test rows" in first
    assert (out / "scores.png").exists()
    assert main([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert list(again) == ["base", "base-few-shot", "majority-class", "adapter"]
    assert again["adapter"]["rows"] == 2
    lines = (out / "adapter" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == LABELS[:2]


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
