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
from filelock import FileLock
from tiny_model import write_rows

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
        told = {{"event": "step", "step": step, "loss": 1.0, "seconds": 0.1}}
        print(json.dumps(told), file=events, flush=True)
{body}
"""
FINISH = "(checkpoints / {name!r}).write_bytes(b'adapter')"
LEAVE = "(checkpoints / 'x-last.ckpt').touch(); raise SystemExit(3)"


@pytest.fixture
def planned(plan, root, monkeypatch):
    """A function from the body of the stand-in for training to a plan that runs it."""
    monkeypatch.setattr(train, "merge_parts", lambda adapter: False)
    write_rows(root / "rows.jsonl")

    def make(
        body: str = "", *overrides: str, finish: bool = True, torchrun: bool = False
    ) -> script.Plan:
        made = plan(*overrides, data=root / "rows.jsonl", name="run", trust=True)
        file = root / "train.py"
        text = body + ("\n" + FINISH.format(name=made.adapter.name) if finish else "")
        file.write_text(TRAINER.format(checkpoints=str(made.adapter.parent), body=text))
        made.command = script.torchrun(file, []) if torchrun else [sys.executable, str(file)]
        return made

    return make


def finetune(plan: script.Plan, **options):
    return script.finetune(plan, progress=False, **options)


def test_a_finished_run_has_a_record_and_is_used_again(planned, capsys):
    plan = planned()
    assert finetune(plan) == plan.adapter
    record = run_record.read(plan)
    expected = {"status": "finished", "exit_status": 0, "steps": 3, "seed": 1234}
    assert expected.items() <= record.items()
    assert record["seconds"] > 0 and record["machine"]["cores"] >= 1
    assert record["started"].endswith("+00:00") and record["command"].startswith("torchrun")
    assert record["fingerprint"]["data"]
    before = plan.adapter.stat().st_mtime_ns
    finetune(planned())
    assert plan.adapter.stat().st_mtime_ns == before
    assert "an identical run has finished; its adapter is used" in capsys.readouterr().out


def test_fresh_and_another_run_keep_the_earlier_one(planned, capsys):
    plan = planned()
    finetune(plan)
    finetune(planned(), fresh=True)
    assert (plan.run_dir.with_name("run.1") / "checkpoints" / plan.adapter.name).exists()
    finetune(planned("", "trainer.max_steps=40"))
    assert (plan.run_dir.with_name("run.2") / "checkpoints" / plan.adapter.name).exists()
    assert capsys.readouterr().out.count("The earlier run is kept as") == 2


def test_a_failure_is_recorded_and_the_next_start_says_so(planned, capsys):
    with pytest.raises(TrainingFailed, match="ValueError: the loss is a fish"):
        finetune(planned("raise ValueError('the loss is a fish')"))
    plan = planned("(checkpoints / 'x-last.ckpt').touch()")
    record = run_record.read(plan)
    assert {"status": "failed", "steps": 3, "exit_status": 1}.items() <= record.items()
    finetune(plan)
    printed = capsys.readouterr().out
    assert "The last start failed after step 3: ValueError: the loss is a fish" in printed
    assert "It left no checkpoint: starting from the first step." in printed
    assert [event["step"] for event in script.read_events(plan.events)] == [1, 2, 3]


def test_an_interrupted_run_is_continued_and_keeps_its_events(planned, capsys):
    plan = planned(LEAVE, finish=False)
    with pytest.raises(TrainingFailed):
        finetune(plan)
    record = json.loads(plan.record.read_text()) | {"status": "running"}
    plan.record.write_text(json.dumps(record))
    finetune(planned())
    printed = capsys.readouterr().out
    assert "ended without a word after step 3: it was killed" in printed
    assert "Continuing from runs/finetune/run/checkpoints/x-last.ckpt." in printed
    assert len(script.read_events(plan.events)) == 6


@pytest.mark.parametrize(
    "left, said",
    [
        ("x-last.ckpt", "continues from runs/finetune/run/checkpoints/x-last.ckpt."),
        ("", None),
        ("x-last-unfinished", None),
        ("x-last.ckpt x-last-unfinished", None),
    ],
)
def test_only_a_run_with_a_checkpoint_is_said_to_continue(planned, monkeypatch, capsys, left, said):
    def interrupted(*arguments):
        plan.adapter.parent.mkdir(parents=True, exist_ok=True)
        for name in left.split():
            (plan.adapter.parent / name).touch()
        raise KeyboardInterrupt

    plan = planned()
    monkeypatch.setattr(launch, "run_logged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(plan)
    over = "Stopped before the first checkpoint. The same command starts over."
    assert (f"Stopped. The same command {said}" if said else over) in capsys.readouterr().out
    assert run_record.read(plan)["status"] == "interrupted"


def test_an_export_without_an_adapter_names_what_lies_beside_it(planned):
    finished = planned()
    finetune(finished)
    with pytest.raises(TrainingFailed):
        finetune(planned("raise ValueError('no fish')", "trainer.max_steps=40", finish=False))
    kept = "An earlier run of that name, with an adapter, is kept as runs/finetune/run.1."
    failed = "runs/finetune/run/workshop/run.json has its training as failed."
    with pytest.raises(NotACheckpoint, match=f"holds no adapter.* {failed} {kept}"):
        find_adapter(finished.run_dir)
    shutil.rmtree(finished.run_dir)
    with pytest.raises(NotACheckpoint, match=f"runs/finetune/run does not exist.* {kept}"):
        find_adapter(finished.run_dir)


def test_a_torn_line_hides_nothing_after_it(planned):
    """A line cut off by a full disk or a kill: the resumed run's events, its record and its bar go
    on."""
    plan = planned(LEAVE, finish=False)
    with pytest.raises(TrainingFailed):
        finetune(plan)
    with plan.events.open("a") as events:
        events.write('{"event": "step", "st')
    trainer = SimpleNamespace(is_global_zero=True, global_step=3, max_steps=9)
    writer = _event_writer(plan.events)
    writer.on_train_start(trainer, None)
    writer.on_train_end(trainer, None)
    assert plan.events.read_text().splitlines()[3] == '{"event": "step", "st'
    kinds = [event["event"] for event in script.read_events(plan.events)]
    assert kinds == ["step"] * 3 + ["start", "end"]
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

    monkeypatch.setattr(launch, "progress_bar", Kept)
    events = tmp_path / "events.jsonl"
    speed = {"loss": 1.25, "tokens_per_second": 90.4, "memory": 1_500_000_000}
    steps = [
        ({"event": "start", "step": 0, "max_steps": 12}, 0, ""),
        ({"event": "step", "step": 4, **speed}, 4, "90 tokens/s, loss 1.250, 1.5 GB"),
        ({"event": "step", "step": 5, "loss": None}, 5, ""),
    ]
    with launch._bar(events) as show:
        show()
        (bar,) = made
        assert (bar.n, bar.total, bar.desc) == (0, None, "loading NeMo and the model")
        for line, step, words in steps:
            with events.open("a") as stream:
                stream.write("\n" + json.dumps(line) + '\n{"ev')  # and a line that is being written
            show()
            seen = (bar.total, bar.desc, bar.n, bar.postfix or "")
            assert seen == (12, "training: ", step, words)


def test_a_run_that_leaves_no_adapter_has_not_finished(planned):
    with pytest.raises(TrainingFailed, match="ended well, but .* is missing"):
        finetune(planned(finish=False))


def test_two_at_once_are_refused(planned):
    plan = planned()
    plan.run_dir.parent.mkdir(parents=True, exist_ok=True)
    said = "Another process is training in .* --name"
    with FileLock(plan.run_dir.with_name(".run.lock")), pytest.raises(WorkshopError, match=said):
        finetune(plan)


def test_a_killed_worker_is_told_from_an_error(planned):
    said = r"was killed \(SIGKILL\)\. Usually the system does that when memory runs out"
    with pytest.raises(TrainingFailed, match=said):
        finetune(planned("os.kill(os.getpid(), 9)", torchrun=True))


LAUNCHER = """
import sys
from workshop_utils.training import script
from pathlib import Path
folder = Path(sys.argv[1])
command = script.torchrun(folder / "sleep.py", [], nproc_per_node=2)
script.run_logged(command, script.training_environment(folder, 2), folder / "log")
"""
SLEEPER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Lightning does
mark = os.path.join(os.path.dirname(__file__), f"up.{os.environ['RANK']}")
code = f"import time; open({mark!r}, 'w').close(); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
time.sleep(600)
"""


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
def test_nothing_is_left_behind(root, victim, number):
    """Whoever is killed, in whatever way, ten seconds later nothing of the run is alive
    (grandchildren included)."""
    (root / "sleep.py").write_text(SLEEPER)
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(root)], env=os.environ)
    wait_for(lambda: all((root / f"up.{rank}").exists() for rank in (0, 1)), 60)
    launcher = psutil.Process(process.pid)
    family, (torchrun,) = launcher.children(recursive=True), launcher.children()
    assert len(family) >= 5, "torchrun, two workers, a child of each"
    victims = {"launcher": launcher, "torchrun": torchrun, "worker": torchrun.children()[0]}
    victims[victim].send_signal(number)
    wait_for(lambda: not any(alive(member) for member in family), 10)
    process.wait(20)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
