"""How a run starts and ends: records, resuming, locks, and no process left behind. The training is
a stand-in of some lines."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import yaml
from filelock import FileLock
from tiny_model import make_tiny_model, write_rows

from workshop_utils.adapters.read import find_adapter
from workshop_utils.core.errors import NotACheckpoint, TrainingFailed, WorkshopError
from workshop_utils.training import script
from workshop_utils.training.runs import launch, run_record
from workshop_utils.training.runs.events import _event_writer
from workshop_utils.training.script import train

TRAINER = """
import json, os, sys, time
from pathlib import Path
checkpoints = Path({checkpoints!r}); checkpoints.mkdir(parents=True, exist_ok=True)
with open(os.environ["WORKSHOP_EVENTS"], "a") as events:
    for step in (1, 2, 3):
        print(json.dumps({{"event": "step", "step": step, "loss": 1.0, "seconds": 0.1}}), file=events, flush=True)
{body}
"""  # noqa: E501
FINISH = "(checkpoints / {name!r}).write_bytes(b'adapter')"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bridged") / "tiny"
    tokenizer = make_tiny_model(directory.parent / "hf")
    (directory / "model_weights").mkdir(parents=True)
    (directory / "model_config.yaml").write_text(
        yaml.safe_dump({"tokenizer": {"type": str(tokenizer)}})
    )
    return directory


@pytest.fixture
def planned(base, tmp_path, monkeypatch):
    """A function from the body of the stand-in for training to a plan that runs it."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.setenv("WORKSHOP_DEVICE", "cpu")
    monkeypatch.delenv("NEMO_PATH", raising=False)
    monkeypatch.setattr(train, "merge_parts", lambda adapter: False)
    write_rows(tmp_path / "rows.jsonl")

    def make(
        body: str = "", *overrides: str, finish: bool = True, torchrun: bool = False
    ) -> script.Plan:
        plan = script.make_plan(
            [f"model.restore_from_path={base}", *overrides],
            data=tmp_path / "rows.jsonl",
            name="run",
            trust=True,
        )
        file = tmp_path / "train.py"
        text = body + ("\n" + FINISH.format(name=plan.adapter.name) if finish else "")
        file.write_text(TRAINER.format(checkpoints=str(plan.adapter.parent), body=text))
        plan.command = script.torchrun(file, []) if torchrun else [sys.executable, str(file)]
        return plan

    return make


def test_a_finished_run_has_a_record_and_is_used_again(planned, capsys):
    plan = planned()
    assert script.finetune(plan, progress=False) == plan.adapter
    record = run_record.read(plan)
    assert (record["status"], record["exit_status"], record["steps"], record["seed"]) == (
        "finished",
        0,
        3,
        1234,
    )
    assert (
        record["seconds"] > 0
        and record["machine"]["cores"] >= 1
        and record["started"].endswith("+00:00")
    )
    assert record["fingerprint"]["data"] and record["command"].startswith("torchrun")
    made = plan.adapter.stat().st_mtime_ns
    script.finetune(planned(), progress=False)
    assert plan.adapter.stat().st_mtime_ns == made
    assert "an identical run has finished; its adapter is used" in capsys.readouterr().out


def test_fresh_and_another_run_keep_the_earlier_one(planned, capsys):
    plan = planned()
    script.finetune(plan, progress=False)
    script.finetune(planned(), progress=False, fresh=True)
    assert (plan.run_dir.with_name("run.1") / "checkpoints" / plan.adapter.name).exists()
    script.finetune(planned("", "trainer.max_steps=40"), progress=False)
    assert (plan.run_dir.with_name("run.2") / "checkpoints" / plan.adapter.name).exists()
    assert capsys.readouterr().out.count("The earlier run is kept as") == 2


def test_a_failure_is_recorded_and_the_next_start_says_so(planned, capsys):
    with pytest.raises(TrainingFailed, match="ValueError: the loss is a fish"):
        script.finetune(planned("raise ValueError('the loss is a fish')"), progress=False)
    plan = planned("(checkpoints / 'x-last.ckpt').touch()")
    record = run_record.read(plan)
    assert (record["status"], record["steps"], record["exit_status"]) == ("failed", 3, 1)
    script.finetune(plan, progress=False)
    printed = capsys.readouterr().out
    assert "The last start failed after step 3: ValueError: the loss is a fish" in printed
    assert "It left no checkpoint: starting from the first step." in printed
    assert [event["step"] for event in script.read_events(plan.events)] == [1, 2, 3]


def test_an_interrupted_run_is_continued_and_keeps_its_events(planned, capsys):
    plan = planned("(checkpoints / 'x-last.ckpt').touch(); raise SystemExit(3)", finish=False)
    with pytest.raises(TrainingFailed):
        script.finetune(plan, progress=False)
    record = json.loads(plan.record.read_text()) | {"status": "running"}
    plan.record.write_text(json.dumps(record))
    script.finetune(planned(), progress=False)
    printed = capsys.readouterr().out
    assert "ended without a word after step 3: it was killed" in printed
    assert "Continuing from runs/finetune/run/checkpoints/x-last.ckpt." in printed
    assert len(script.read_events(plan.events)) == 6


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (
            "x-last.ckpt",
            "Stopped. The same command continues from runs/finetune/run/checkpoints/x-last.ckpt.",
        ),
        ("", "Stopped before the first checkpoint. The same command starts over."),
        ("x-last-unfinished", "Stopped before the first checkpoint. The same command starts over."),
        (
            "x-last.ckpt x-last-unfinished",
            "Stopped before the first checkpoint. The same command starts over.",
        ),
    ],
)
def test_only_a_run_with_a_checkpoint_is_said_to_continue(planned, monkeypatch, capsys, left, said):
    def interrupted(*arguments):
        """Training that leaves its checkpoints and is stopped by Ctrl-C."""
        plan.adapter.parent.mkdir(parents=True, exist_ok=True)
        for name in left.split():
            (plan.adapter.parent / name).touch()
        raise KeyboardInterrupt

    plan = planned()
    monkeypatch.setattr(launch, "run_logged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.finetune(plan, progress=False)
    assert said in capsys.readouterr().out


def test_an_export_without_an_adapter_names_what_lies_beside_it(planned):
    finished = planned()
    script.finetune(finished, progress=False)
    with pytest.raises(TrainingFailed):
        script.finetune(
            planned("raise ValueError('no fish')", "trainer.max_steps=40", finish=False),
            progress=False,
        )
    kept = "An earlier run of that name, with an adapter, is kept as runs/finetune/run.1."
    with pytest.raises(
        NotACheckpoint,
        match="holds no adapter.* runs/finetune/run/workshop/run.json has its training as failed. "
        f"{kept}",
    ):
        find_adapter(finished.run_dir)
    shutil.rmtree(finished.run_dir)
    with pytest.raises(NotACheckpoint, match=f"runs/finetune/run does not exist.* {kept}"):
        find_adapter(finished.run_dir)


def test_a_torn_line_hides_nothing_after_it(planned):
    """A line cut off by a full disk or a kill: the resumed run's events, its record and its bar go
    on."""
    plan = planned("(checkpoints / 'x-last.ckpt').touch(); raise SystemExit(3)", finish=False)
    with pytest.raises(TrainingFailed):
        script.finetune(plan, progress=False)
    with plan.events.open("a") as events:
        events.write('{"event": "step", "st')
    trainer = SimpleNamespace(is_global_zero=True, global_step=3, max_steps=9)
    writer = _event_writer(plan.events)
    writer.on_train_start(trainer, None)
    writer.on_train_end(trainer, None)
    assert plan.events.read_text().splitlines()[3] == '{"event": "step", "st'
    assert [event["event"] for event in script.read_events(plan.events)] == ["step"] * 3 + [
        "start",
        "end",
    ]
    with plan.events.open("ab") as events:
        events.write(b'\xff\n[1]\n{"event": "step", "step": 7}\n')
    run_record.end(plan, {}, run_record.INTERRUPTED, 1.0, None)
    assert run_record.read(plan)["steps"] == 7


def test_the_bar_follows_the_events(tmp_path, monkeypatch):
    from tqdm import tqdm

    made = []

    class Kept(tqdm):
        """Found again in the test, and silent."""

        def __init__(self, **options):
            super().__init__(file=io.StringIO(), **options)
            made.append(self)

    monkeypatch.setattr("workshop_utils.training.runs.launch.progress_bar", Kept)
    events = tmp_path / "events.jsonl"
    with launch._bar(events) as show:
        show()
        (bar,) = made
        assert (bar.n, bar.total, bar.desc) == (0, None, "loading NeMo and the model")
        lines = [
            {"event": "start", "step": 0, "max_steps": 12},
            {
                "event": "step",
                "step": 4,
                "loss": 1.25,
                "tokens_per_second": 90.4,
                "memory": 1_500_000_000,
            },
        ]
        for number, (line, seen) in enumerate(
            zip(lines, ((0, ""), (4, "90 tokens/s, loss 1.250, 1.5 GB")), strict=True)
        ):
            with events.open("a") as stream:
                stream.write(json.dumps(line) + "\n" + '{"ev' * number)
            show()
            assert (bar.total, bar.desc, bar.n, bar.postfix or "") == (12, "training: ", *seen)
        with events.open("a") as stream:
            stream.write('\n{"event": "step", "step": 5, "loss": null}\n')
        show()
        assert (bar.n, bar.postfix) == (5, "")


def test_a_run_that_leaves_no_adapter_has_not_finished(planned):
    with pytest.raises(TrainingFailed, match="ended well, but .* is missing"):
        script.finetune(planned(finish=False), progress=False)


def test_two_at_once_are_refused(planned):
    plan = planned()
    plan.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(plan.run_dir.with_name(".run.lock")),
        pytest.raises(WorkshopError, match="Another process is training in"),
    ):
        script.finetune(plan, progress=False)


def test_a_killed_worker_is_told_from_an_error(planned):
    with pytest.raises(
        TrainingFailed,
        match=r"was killed \(SIGKILL\)\. Usually the system does that when memory runs out",
    ):
        script.finetune(planned("os.kill(os.getpid(), 9)", torchrun=True), progress=False)


LAUNCHER = """
import sys
from workshop_utils.training import script
from workshop_utils.training.script import run_logged
from pathlib import Path
folder = Path(sys.argv[1])
run_logged(script.torchrun(folder / "sleep.py", [], nproc_per_node=2), script.training_environment(folder, 2), folder / "log")
"""  # noqa: E501
SLEEPER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Lightning does
mark = os.path.join(os.path.dirname(__file__), f"up.{os.environ['RANK']}")
child = subprocess.Popen([sys.executable, "-c", f"import time; open({mark!r}, 'w').close(); time.sleep(600)"])
time.sleep(600)
"""  # noqa: E501


@pytest.mark.parametrize(
    "victim, number",
    [
        ("launcher", signal.SIGKILL),
        ("worker", signal.SIGKILL),
        pytest.param("torchrun", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_behind(tmp_path, victim, number):
    """Whoever is killed, in whatever way, ten seconds later nothing of the run is alive
    (grandchildren included)."""
    (tmp_path / "sleep.py").write_text(SLEEPER)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)],
        env=os.environ | {"WORKSHOP_ROOT": str(tmp_path)},
    )
    wait_for(lambda: all((tmp_path / f"up.{rank}").exists() for rank in (0, 1)), 60)
    family = psutil.Process(launcher.pid).children(recursive=True)
    torchrun = psutil.Process(launcher.pid).children()[0]
    assert len(family) >= 5, "torchrun, two workers, a child of each"
    {
        "launcher": psutil.Process(launcher.pid),
        "torchrun": torchrun,
        "worker": torchrun.children()[0],
    }[victim].send_signal(number)
    wait_for(lambda: not any(alive(process) for process in family), 10)
    launcher.wait(20)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
