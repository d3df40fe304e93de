"""Prepared rows in NeMo's data module: what is between prompt and answer, what the loss counts,
what is cut, what is packed."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import TESTS
from tiny_model import make_tiny_model, write_rows

from workshop_utils.runtime import nemo_cpu
from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
from workshop_utils.training.recipe.prepare_data import prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from workshop_utils.core.chat_template import ChatTokenizer

    return ChatTokenizer(tiny)


def batches(prepared: Path, tiny: Path, *lengths: int) -> dict:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(prepared), "OMP_NUM_THREADS": "1"}
    environment |= {"WORKSHOP_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    nemo_cpu.inherit(environment)
    command = [sys.executable, TESTS / "samples" / "recipe_batches.py", prepared, tiny, *lengths]
    pipes = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(list(map(str, command)), env=environment, **pipes)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(line.removeprefix("FOUND "))


def counted(batch: dict) -> list[int]:
    """The labels that the loss of the first row counts."""
    pairs = zip(batch["labels"][0], batch["loss_mask"][0], strict=True)
    return [label for label, mask in pairs if mask]


def row(prepared: Path, number: int = 0) -> dict:
    return json.loads((prepared / "validation.jsonl").read_text().splitlines()[number])


def test_conversations(tmp_path, tiny, tokenizer):
    write_rows(tmp_path / "chat.jsonl", 40)
    config = HFDatasetConfig(str(tmp_path / "chat.jsonl"))
    prepare(config, tmp_path / "data", tiny, 128, progress=False)
    found = batches(tmp_path / "data", tiny, 128)
    assert (found["num_workers"], found["pin_memory"]) == (0, False)
    text = row(tmp_path / "data")
    prompt, answer = tokenizer.encode(text["input"]), tokenizer.encode(text["output"])
    whole, batch = [*prompt, *answer, found["eos"]], found["batches"][0]
    # Nothing between the two, and the loss on the answer and the stop token alone; labels are
    # tokens moved by one.
    assert batch["tokens"][0][: len(whole) - 1] == whole[:-1]
    assert batch["labels"][0][: len(whole) - 1] == whole[1:]
    assert counted(batch) == [*answer, found["eos"]]


def test_templates_and_rows_that_are_too_long(tmp_path, tiny, tokenizer):
    rows = [{"question": f"{'long ' * 30}{i}?", "answer": f"it is {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    config = HFDatasetConfig(
        str(tmp_path / "rows.jsonl"), input_template="Q: {question}", output_template="{answer}"
    )
    stated = prepare(config, tmp_path / "data", tiny, 64, progress=False)
    assert stated.statistics["validation"].truncated == stated.statistics["validation"].rows == 2
    assert stated.statistics["validation"].answers_cut == 0
    found = batches(tmp_path / "data", tiny, 64)
    text, batch = row(tmp_path / "data"), found["batches"][0]
    # One space between, which belongs to the answer; the prompt lost its end.
    assert counted(batch) == [*tokenizer.encode(" " + text["output"]), found["eos"]]
    prompt = tokenizer.encode(text["input"])[: 64 - len(counted(batch))]
    assert batch["tokens"][0][: len(prompt)] == prompt


def test_packed_rows_are_the_same_rows_and_a_cpu_refuses_to_train_on_them(
    tmp_path, tiny, tokenizer
):
    write_rows(tmp_path / "chat.jsonl", 40)
    config = HFDatasetConfig(str(tmp_path / "chat.jsonl"), train_split_ratio=0.6)
    prepare(config, tmp_path / "data", tiny, 64, progress=False)
    found = batches(tmp_path / "data", tiny, 64, 200)
    assert "only with Transformer Engine" in found["refused"]
    texts = [row(tmp_path / "data", number) for number in range(8)]
    wanted = [[*tokenizer.encode(text["input"] + text["output"]), found["eos"]] for text in texts]
    packed = []
    for batch in found["batches"]:
        columns = (batch[name] for name in ("tokens", "labels", "cu_seqlens"))
        for tokens, labels, ends in zip(*columns, strict=True):
            pairs = itertools.pairwise([end for end in ends if end >= 0])
            packed += [[*tokens[start:end], labels[end - 1]] for start, end in pairs]
    assert len(found["batches"]) < len(wanted)
    for one in wanted:
        assert any(row[: len(one)] == one for row in packed)
