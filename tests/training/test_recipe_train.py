"""Training by the recipe path: what is refused, what decides a run, and real runs of tiny models on
one and two processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from nemo2_trains import write_data

from workshop_utils.checkpoints.formats.nemo2 import contents_of
from workshop_utils.core.errors import DataError, GenerationFailed, TrainingFailed, WorkshopError
from workshop_utils.training.recipe import build, deliver, job
from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
from workshop_utils.training.recipe.options import FIELDS, from_mapping
from workshop_utils.training.recipe.plan import Resolved, require_possible, resolve
from workshop_utils.training.recipe.prepare_data import prepare
from workshop_utils.training.recipe.presets import preset
from workshop_utils.training.runs.events import read_events

SHORT = {"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 1, "warmup_steps": 1}
SHORT |= {"micro_batch_size": 2, "accumulate_grad_batches": 2, "max_seq_length": 64}
SHORT |= {"learning_rate": 1e-2, "lora_dim": 4, "lora_alpha": 8.0}
FULL = {"peft_scheme": "full_ft", "learning_rate": 1e-3}


def options(folder: Path, **changes) -> dict:
    places = {"output_dir": "out", "nemo_ckpt_dir": "base", "data_dir": "data"}
    places = {name: str(folder / place) for name, place in places.items()}
    return preset("cpu") | places | SHORT | changes


def settled(folder: Path, **changes) -> Resolved:
    return resolve(from_mapping(options(folder, **changes)))


def stand_in(folder: Path) -> Path:
    """What ``train`` looks for before it starts anything."""
    files = ["base/context/model.yaml", "base/weights/.metadata"]
    for name in [*files, "data/training.jsonl", "data/validation.jsonl"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "bf16-mixed"}, "set precision=32, or begin with `--preset cpu`"),
        ({"packed_sequence": True, "micro_batch_size": 1}, "packed_sequence is not possible on"),
        ({"enable_memory_profile": True}, "use enable_pytorch_profiler"),
        ({"enable_memory_monitor": True}, "enable_memory_monitor is not possible"),
        ({"enable_nsys_callback": True}, "profiler of GPUs"),
        ({"context_parallel_size": 2, "gpus_per_node": 2}, "set context_parallel_size=1"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_with_the_reason(tmp_path, monkeypatch, changes, words):
    monkeypatch.setenv("WORKSHOP_DEVICE", "cpu")
    with pytest.raises(WorkshopError, match=words):
        require_possible(settled(tmp_path, device="auto", **changes))


def test_nothing_is_refused_that_a_gpu_can_do(tmp_path):
    changes = {"precision": "bf16-mixed", "packed_sequence": True, "micro_batch_size": 1}
    require_possible(settled(tmp_path, device="gpu", **changes))


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(WorkshopError, match="training.jsonl is missing .* `workshop recipe data`"):
        job.train(settled(tmp_path))
    stand_in(tmp_path)
    (tmp_path / "base/context/model.yaml").unlink()
    with pytest.raises(WorkshopError, match="holds no imported base. Run `workshop recipe import`"):
        job.train(settled(tmp_path))
    with pytest.raises(WorkshopError, match="SlurmExecutor"):
        job.train(settled(tmp_path, num_nodes=2))


def test_fewer_validation_rows_than_a_batch_are_refused_before_nemo_starts(tmp_path):
    stand_in(tmp_path)
    write_data(tmp_path / "rows", rows=10)
    source = HFDatasetConfig(str(tmp_path / "rows" / "training.jsonl"), train_split_ratio=0.6)
    prepare(source, tmp_path / "prepared", max_seq_length=64, progress=False)
    with pytest.raises(DataError, match="n.jsonl has 2 rows, fewer than the global batch of 4"):
        job.train(settled(tmp_path, data_dir=str(tmp_path / "prepared")))
    assert not (tmp_path / "out").exists()


def test_a_run_is_the_same_by_what_decides_its_outcome(tmp_path):
    stand_in(tmp_path)

    def fingerprint(**changes):
        return job.Job(settled(tmp_path, **changes)).fingerprint()

    first = fingerprint()
    assert first == json.loads(json.dumps(first)), "it is compared with what JSON gives back"
    watched = {"enable_speed_monitor": True, "log_every_n_steps": 3, "resume": False}
    assert fingerprint(max_samples=3, **watched) == first
    assert fingerprint(seed=7) != first and fingerprint(learning_rate=1e-3) != first
    (tmp_path / "data/training.jsonl").write_text("other rows")
    assert fingerprint() != first
    other_rows = fingerprint()
    (tmp_path / "base/weights/__0_0.distcp").write_bytes(b"other weights of the same shape")
    assert fingerprint() != other_rows


def test_the_contents_of_a_linked_base_count(tmp_path):
    """An import from a NeMo 2.0 checkpoint is two links."""
    for part in ("context", "weights"):
        (tmp_path / "source" / part).mkdir(parents=True)
        (tmp_path / "source" / part / "file").write_text(part)
    (tmp_path / "base").mkdir()
    for part in ("context", "weights"):
        (tmp_path / "base" / part).symlink_to(tmp_path / "source" / part, target_is_directory=True)
    assert contents_of(tmp_path / "base") == contents_of(tmp_path / "source")
    (tmp_path / "source" / "weights" / "file").write_text("others")
    contents = contents_of(tmp_path / "base")
    assert contents["weights"] and contents == contents_of(tmp_path / "source")


def test_names_that_do_not_match_are_repeated_once(tmp_path):
    log = tmp_path / "log"
    line = "Unexpected keys (for this rank): {'model.a'}. \n"
    log.write_text(
        f"Some keys found\n{line}other\n{line}Missing keys (for all ranks): {{'model.b'}}. \n"
    )
    assert job.mismatches(log) == [
        "Unexpected keys (for this rank): {'model.a'}. ",
        "Missing keys (for all ranks): {'model.b'}. ",
    ]


def test_the_prefix_of_a_task_is_taken_off_the_error(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "train/0 [default0]:[rank0]: Traceback (most recent call last):\ntrain/0 "
        "[default0]:[rank0]: KeyError: 'output'\ntrain/0 "
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert job._cause(log) == "KeyError: 'output'"


@pytest.fixture(scope="module")
def tiny(bridged_tiny, tmp_path_factory) -> Path:
    """A folder with ``base`` and prepared ``data`` for it."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "base").symlink_to(bridged_tiny / "nemo2" / "tiny")
    return with_data(folder)


def with_data(folder: Path) -> Path:
    write_data(folder / "rows", rows=24)
    source = HFDatasetConfig(str(folder / "rows" / "training.jsonl"), train_split_ratio=0.6)
    prepare(source, folder / "data", folder / "base", max_seq_length=64, progress=False)
    return folder


def told(result: job.TrainResult, event: str, field: str) -> list:
    """``field`` of each ``event`` that the run wrote down."""
    events = read_events(result.run_dir / "workshop/events.jsonl")
    return [one[field] for one in events if one["event"] == event]


def losses(result: job.TrainResult) -> list[float]:
    return told(result, "step", "loss")


@pytest.mark.slow
def test_lora_is_trained_recorded_and_not_trained_twice(tiny, tmp_path, capsys):
    watched = dict.fromkeys(("enable_speed_monitor", "enable_runtime_estimator"), True)
    resolved = settled(tiny, output_dir=str(tmp_path / "out.v1.0"), **watched)
    result = job.train(resolved)
    assert result.steps == 6 and not result.stopped_early
    assert losses(result)[-1] < losses(result)[0]
    assert f"{result.val_loss:.4f}" in result.best.name and result.best.name.startswith("lora--")
    assert (result.best / "context/model.yaml").is_file()
    assert result.last.resolve() == result.best.resolve()
    assert list(result.run_dir.glob("tensorboard/events.out.tfevents*"))
    record = json.loads((result.run_dir / "workshop/run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 6 and record["seed"] == 1234
    job.train(resolved)
    assert "an identical run has finished" in capsys.readouterr().out
    assert told(result, "start", "step") == [0]


@pytest.mark.slow
def test_what_watches_a_run_records(tiny, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    names = ("pytorch_profiler", "megatron_progress_bar", "speed_monitor", "runtime_estimator")
    watched = {"use_wandb": True} | {f"enable_{name}": True for name in names}
    result = job.train(settled(tiny, output_dir=str(tmp_path / "out"), max_steps=12, **watched))
    (trace,) = (result.run_dir / "trace" / "device").glob("*.json")
    steps = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert any("ProfilerStep" in name for name in steps)
    (logged,) = result.run_dir.glob("wandb/offline-run-*/*.wandb")
    assert b"reduced_train_loss" in logged.read_bytes()
    board = EventAccumulator(str(result.run_dir / "tensorboard"))
    board.Reload()
    rates, times = ("tokens_per_sec", "samples_per_sec"), ("remaining_estimate", "total")
    curves = {*(f"throughput/{name}" for name in rates), *(f"time/{name}" for name in times)}
    assert curves <= set(board.Tags()["scalars"])
    log = (result.run_dir / "workshop/torchrun.log").read_text()
    assert re.search(r"Epoch 0: : 100%.* 12/12 ", log)  # NeMo's bar, not Lightning's


def on_cpu(program: str, folder: Path) -> str:
    """Standard output of a Python program, in a process of its own, because it loads NeMo."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        env=os.environ | {"WORKSHOP_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_nemo_builds_every_watcher(tmp_path):
    """The options in turn, each with the early stopping that is always there."""
    names = [name for name in FIELDS if name.startswith("enable_")]
    (tmp_path / "nemo_logs/trace").mkdir(parents=True)  # the profiler asks; a training makes it
    printed = on_cpu(
        f"""
        from workshop_utils.runtime import nemo_cpu
        nemo_cpu.apply()
        import fiddle, torch
        # torch without CUDA lacks what it calls
        torch.cuda.memory._record_memory_history = lambda **_: None
        from workshop_utils.training.recipe.build import callbacks
        from workshop_utils.training.recipe.options import RecipeOptions
        from workshop_utils.training.recipe.plan import resolve
        for name in {names!r}:
            plan = resolve(RecipeOptions(output_dir={str(tmp_path)!r}, **{{name: True}}))
            print("made", *(type(fiddle.build(one)).__name__ for one in callbacks(plan)))
        """,
        tmp_path,
    )
    made = [line.split()[1:] for line in printed.splitlines() if line.startswith("made ")]
    watchers = "MegatronProgressBar NsysCallback PytorchProfilerCallback MemoryProfileCallback "
    watchers += "SpeedMonitor MemoryMonitor RuntimeEstimator"
    assert made == [["EarlyStopping", watcher] for watcher in watchers.split()]


@pytest.mark.slow
def test_what_gpus_would_run_is_shown_without_one(tmp_path):
    """By the command, in one process: the defaults (eight GPUs, no base and no data here), packed
    rows, and context parallelism. Nothing is written."""
    packed, parallel = "--packed_sequence --micro_batch_size 1", "--context_parallel_size 2"
    printed = on_cpu(
        f"""
        from workshop_utils.cli import main
        for words in ("", "{packed}", "--tensor_parallel_size 4 {parallel}"):
            print("== next", flush=True)
            assert main(["recipe", "--dry-run", "--resolve", *words.split()]) == 0
        """,
        tmp_path,
    )
    plain, packed, parallel = printed.split("== next\n")[1:]
    expected = "tensor_model_parallel_size=8 devices=8 accelerator='gpu' max_steps=10000 "
    expected += "precision='bf16-mixed' FineTuningDataModule tokenizer='data' "
    expected += "global_batch_size=64 seq_length=2048 Qwen3Config8B"
    assert [word for word in expected.split() if word not in plain] == []
    expected = ("PreparedDataModule", "packed_sequence_size=2048", "'pad_to_max_length': True")
    assert [words for words in expected if words not in packed] == []
    assert "context_parallel_size=2" in parallel and "'pad_seq_length_to_mult': 4" in parallel
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_names_that_the_base_lacks_are_said_on_the_screen(tiny, tmp_path, capsys):
    """NeMo trains on, with those weights as they were made: here a bias that the configuration asks
    for and the weights do not have.

    The phases after the training are strict: there is nothing to repeat, they end.
    """
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    built = base / "context/io.json"
    bias = r'(?<="value": )false(?=, "paths": \["<root>.model.config.add_qkv_bias"\])'
    changed, count = re.subn(bias, "true", built.read_text())
    assert count == 1
    built.write_text(changed)
    places = {"nemo_ckpt_dir": str(base), "output_dir": str(tmp_path / "out")}
    job.train(settled(tiny, max_steps=2, val_check_interval=2, **places))
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: Unexpected keys (for this rank): ") and "linear_qkv.bias" in note
    with pytest.raises(GenerationFailed, match="linear_qkv.bias from model not in state dict"):
        deliver.nemo_logits(tmp_path / "base", [[1, 2]])


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tiny, tmp_path):
    one = losses(job.train(settled(tiny, output_dir=str(tmp_path / "one"), **FULL)))
    for name, changes, tolerance in (
        ("tp", {"tensor_parallel_size": 2}, 1e-4),
        ("pp", {"pipeline_parallel_size": 2}, 1e-4),
        ("dp", {"accumulate_grad_batches": 1}, 1e-3),
    ):
        changes |= FULL | {"output_dir": str(tmp_path / name)}
        two = losses(job.train(settled(tiny, gpus_per_node=2, **changes)))
        assert two == pytest.approx(one, abs=tolerance), name


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_its_end(tiny, tmp_path, capsys):
    changes = {"output_dir": str(tmp_path / "out"), "max_steps": 60, "val_check_interval": 5}
    changes["early_stopping_patience"] = 50
    program = textwrap.dedent(f"""
        from workshop_utils.training.recipe import job
        from workshop_utils.training.recipe.options import from_mapping
        from workshop_utils.training.recipe.plan import resolve
        if __name__ == "__main__":
            job.train(resolve(from_mapping({options(tiny, **changes)!r})))
    """)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    started = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, **pipes)
    checkpoints = tmp_path / "out" / build.RUN / "checkpoints"
    while not list(checkpoints.glob("*-last")) and started.poll() is None:
        time.sleep(0.2)
    os.kill(started.pid, signal.SIGINT)
    assert "Stopped. The same command continues" in started.communicate(timeout=60)[0]
    result = job.train(settled(tiny, **changes))
    assert "Continuing from" in capsys.readouterr().out
    starts = told(result, "start", "step")
    assert starts[0] == 0 and starts[1] >= 5 and starts[1] % 5 == 0
    assert result.steps == 60 and losses(result)[-1] < losses(result)[0]
    # The end of a resumed run is validated and saved.
    assert result.last.name.endswith("step=59-last")


@pytest.mark.slow
def test_the_error_of_a_worker_is_the_error_of_the_command(tiny, tmp_path):
    # A base that is whole at first sight; the workers find out.
    base = tmp_path / "base"
    shutil.copytree((tiny / "base").resolve(), base)
    for shard in (base / "weights").glob("*.distcp"):
        shard.write_bytes(b"")
    plan = settled(tiny, output_dir=str(tmp_path / "out"), nemo_ckpt_dir=str(base))
    with pytest.raises(TrainingFailed, match="(?s)Error.*\nThe whole log:") as failed:
        job.train(plan)
    assert "ChildFailedError" not in str(failed.value)
    assert json.loads(job.Job(plan).record.read_text())["status"] == "failed"


@pytest.mark.slow
def test_early_stopping_stops(tiny, tmp_path):
    soon = {"early_stopping_patience": 1, "early_stopping_threshold": 100.0}
    result = job.train(settled(tiny, output_dir=str(tmp_path / "out"), max_steps=60, **soon))
    assert result.stopped_early and result.steps == 6
    assert "stopped early" in str(result)


@pytest.mark.slow
def test_qwen3_is_trained_with_dora(tmp_path):
    from tiny_families import make_tiny_family

    from workshop_utils.training.recipe.base_checkpoint import import_base

    make_tiny_family(tmp_path / "hf", "qwen3")
    import_base(str(tmp_path / "hf"), tmp_path / "base")
    with_data(tmp_path)
    changes = {"recipe_cls_name": "qwen3_600m", "peft_scheme": "dora", "lora_target_modules": None}
    result = job.train(settled(tmp_path, **changes))
    assert result.best.name.startswith("dora--") and losses(result)[-1] < losses(result)[0]
    described = (result.best / "context/model.yaml").read_text()
    assert "qk_layernorm: true" in described and "kv_channels: 24" in described
