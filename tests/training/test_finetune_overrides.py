"""What each override of the script does, seen in what comes out of it. NeMo is imported once, each
run gets a forked copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny_model import write_rows

from workshop_utils.training.runs.events import read_events

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "notebooks" / "scripts" / "try_overrides.py"
LORA, DATA, CHECKPOINTS = (
    "model.peft.lora_tuning",
    "model.data.train_ds",
    "exp_manager.checkpoint_callback_params",
)
VARIANTS = {
    "plain": [],
    "again": [],
    "o2": ["trainer.precision=bf16-mixed", "model.megatron_amp_O2=true"],
    "bf16": ["trainer.precision=bf16"],
    "fp16": ["trainer.precision=16-mixed"],
    "cut-right": [f"{DATA}.max_seq_length=32"],
    "cut-left": [f"{DATA}.max_seq_length=32", f"{DATA}.truncation_method=left"],
    "cut-answers": [f"{DATA}.max_seq_length=32", f"{DATA}.truncation_field=output"],
    "micro-2": ["model.micro_batch_size=2"],
    "global-16": ["model.global_batch_size=16"],
    "seed": ["model.seed=1"],
    "alpha": [f"{LORA}.alpha=64"],
    "top-1": [],
    "top-2": [f"{CHECKPOINTS}.save_top_k=2"],
    "top-all": [f"{CHECKPOINTS}.save_top_k=-1"],
    "last-nemo": [f"{CHECKPOINTS}.save_best_model=false"],
}


COMMON = [
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "model.global_batch_size=8",
    "model.micro_batch_size=8",
    f"{LORA}.adapter_dim=8",
    f"{LORA}.alpha=16",
    "model.optim.lr=2e-2",
    "model.optim.sched.warmup_steps=2",
]


@pytest.fixture(scope="module")
def runs(bridged_tiny, tmp_path_factory):
    """The folder with a run for each variant, and the script's results."""
    folder = tmp_path_factory.mktemp("variants")
    write_rows(folder / "train.jsonl", 32)
    for name, first in (("one", 40), ("two", 60)):
        rows = [{"input": f"number {n}? ", "output": f"it is {n}"} for n in range(first, first + 8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    two = [
        f"model.data.validation_ds.file_names=[{folder}/one.jsonl,{folder}/two.jsonl]",
        "model.data.validation_ds.names=[odd,even]",
    ]
    settings = {
        "folder": str(folder / "runs"),
        "data": str(folder / "train.jsonl"),
        "validation": str(folder / "train.jsonl"),
        "common": [f"model.restore_from_path={bridged_tiny / 'bridged' / 'tiny'}", *COMMON],
        "variants": VARIANTS | {"two-sets": two},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    ours = {"WORKSHOP_ROOT": str(folder), "WORKSHOP_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    files = [str(folder / f"{name}.json") for name in ("settings", "results")]
    command = [sys.executable, str(SCRIPT), *files]
    done = subprocess.run(
        command, env=os.environ | ours, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs", json.loads((folder / "results.json").read_text())


def difference(results: dict, name: str) -> float:
    losses = zip(results["plain"]["losses"], results[name]["losses"], strict=True)
    return max(abs(one - other) for one, other in losses)


def test_the_same_run_gives_the_same_losses_and_another_seed_does_not(runs):
    _, results = runs
    assert results["again"]["losses"] == results["plain"]["losses"]
    assert difference(results, "seed") > 1e-4


@pytest.mark.parametrize("name", ["o2", "bf16", "fp16"])
def test_half_precision_rounds_and_learns_alike(runs, name):
    _, results = runs
    assert 0 < difference(results, name) < 0.02


def test_o2_writes_bf16(runs):
    from workshop_utils.checkpoints.formats.identify import identify

    folder, _ = runs
    for name, dtype in {"plain": "float32", "bf16": "float32", "o2": "bfloat16"}.items():
        assert identify(folder / name / "checkpoints" / f"{name}.nemo").dtype == dtype


def test_what_is_cut_and_from_which_side(runs):
    _, results = runs
    names = ("plain", "cut-right", "cut-left", "cut-answers")
    first = {round(results[name]["losses"][0], 4) for name in names}
    assert len(first) == 4, first
    for name, count in {"cut-right": 0, "cut-answers": 32}.items():
        said = f"{count} of them in the answer"
        assert any("longer than 32" in w and said in w for w in results[name]["warnings"])
    assert not any("rows are longer" in warning for warning in results["plain"]["warnings"])


def test_a_micro_batch_is_memory_and_a_global_batch_is_rows(runs):
    _, results = runs
    # Not equal to rounding: NeMo takes the mean over the tokens of each micro batch first, so rows
    # with short answers weigh otherwise.
    assert 1e-6 < difference(results, "micro-2") < 0.02 < difference(results, "global-16")


def test_alpha_scales_what_is_added(runs):
    _, results = runs
    assert results["alpha"]["parameters"] == results["plain"]["parameters"]
    first = [results[name]["losses"][0] for name in ("alpha", "plain")]
    assert first[0] == first[1], "B = 0 before the first step"
    assert results["alpha"]["change"] > 1.5 * results["plain"]["change"]


@pytest.mark.parametrize("name, count", [("top-1", 1), ("top-2", 2), ("top-all", 3)])
def test_so_many_checkpoints_are_kept(runs, name, count):
    folder, _ = runs
    files = [file.name for file in (folder / name / "checkpoints").glob("*.ckpt")]
    assert len([file for file in files if "-last" not in file]) == count, files
    assert len([file for file in files if "-last" in file]) == 1


def test_the_validation_sets_have_their_names_in_tensorboard(runs):
    folder, results = runs
    scalars, told = tensorboard(folder / "two-sets"), results["two-sets"]
    assert {"reduced_train_loss", "lr", "val_loss"} <= scalars.keys()
    assert scalars["reduced_train_loss"] == pytest.approx(told["losses"])
    odd, even = (scalars[f"validation_loss_{name}"][-1] for name in ("odd", "even"))
    assert odd != even and told["validation"][-1] == pytest.approx((odd + even) / 2, rel=1e-4)


def tensorboard(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_events_tell_speed_and_memory(runs):
    folder, _ = runs
    events = read_events(folder / "plain" / "workshop" / "events.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    for event in steps:
        assert event["lr"] >= 0 and event["memory"] > 10**8
        tokens = event["tokens_per_second"] * event["seconds"]
        assert 8 * 30 < tokens < 8 * 50, "eight rows of about 37 tokens"
