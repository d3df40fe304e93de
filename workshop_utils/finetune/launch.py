"""Run a plan: torchrun in a process group of its own, progress from its events, the real cause when it fails."""

import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from workshop_utils import paths
from workshop_utils.errors import TrainingFailed
from workshop_utils.export.nemo import merge_parts

from .events import read_events
from .plan import Plan

GRACE = 10.0
"""Seconds that the workers get to end after a signal before they are killed."""


def finetune(plan: Plan, progress: bool = True, reuse: bool = False) -> Path:
    """Train and return the path of the ``.nemo`` adapter that NeMo wrote.

    A finished earlier run of the same name is kept under a numbered name; with ``reuse`` it is used instead when it was made
    from the same overrides, data and base. An unfinished one of the same kind is continued from its last checkpoint, and a
    line says so.

    Raises:
        WorkshopError: the plan's preflight found something that would make the run fail.
        TrainingFailed: with the cause from the worker's log. The log stays beside the run.
    """
    plan.preflight.require()
    same = _read(plan.record).get("fingerprint") == plan.fingerprint()
    if plan.adapter.exists() and reuse and same:
        print(f"{paths.shown(plan.run_dir)}: the adapter of an earlier, identical run is used.")
        return plan.adapter
    if plan.run_dir.exists() and not (same and not plan.adapter.exists()):
        print(f"The earlier run is kept as {paths.shown(_keep(plan.run_dir))}.")
    elif any(plan.run_dir.glob("checkpoints/*.ckpt")):
        print(f"Continuing the interrupted run in {paths.shown(plan.run_dir)} from its last checkpoint.")
    record = {"fingerprint": plan.fingerprint(), "device": str(plan.device)}
    paths.write_text(plan.record, json.dumps(record, indent=2))
    began = time.monotonic()
    status = run_logged(plan.command, plan.environment, plan.log, plan.events if progress else None, plan.tokens_per_step)
    if status != 0:
        raise TrainingFailed(f"{failure_cause(plan.log)}\nThe whole log: {paths.shown(plan.log)}")
    if not plan.adapter.exists():
        raise TrainingFailed(f"torchrun ended well, but {paths.shown(plan.adapter)} is missing. The log: {paths.shown(plan.log)}")
    if plan.config.model.peft.peft_scheme == "lora" and merge_parts(plan.adapter):
        print(f"{paths.shown(plan.adapter)}: the parts of the model-parallel ranks are put together.")
    paths.write_text(plan.record, json.dumps(record | {"seconds": time.monotonic() - began}, indent=2))
    return plan.adapter


def _read(record: Path) -> dict:
    return json.loads(record.read_text()) if record.exists() else {}


def train_seconds(plan: Plan) -> float:
    """Seconds from the start of torchrun to its end, imports and model loading included, of the finished run of ``plan``."""
    return _read(plan.record)["seconds"]


def run_logged(command: Sequence[str], environment: dict[str, str], log: Path, events: Path | None = None,
               tokens_per_step: float | None = None) -> int:  # fmt: skip
    """Run ``command`` with its output in ``log`` and return its exit status; follow ``events`` with a progress bar meanwhile.

    Ctrl-C (and a notebook's interrupt) ends the whole process group before it goes on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if events is not None:
        events.unlink(missing_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait() if events is None else _follow(process, events, tokens_per_step)
        finally:
            _end(process)


def _follow(process: subprocess.Popen, events: Path, tokens_per_step: float | None) -> int:
    """Move a tqdm bar along with the steps until the process ends."""
    from tqdm.auto import tqdm

    with tqdm(desc="loading NeMo and the model", unit="step", dynamic_ncols=True) as bar:
        while True:
            status = process.poll()
            seen = read_events(events)
            steps = [event for event in seen if event["event"] == "step"]
            starts = [event for event in seen if event["event"] == "start"]
            if starts and bar.total is None:
                bar.reset(total=starts[-1]["max_steps"])
                bar.set_description("training")
            if steps:
                bar.n = steps[-1]["step"]
                speed = f"{tokens_per_step / steps[-1]['seconds']:.0f} tokens/s, " if tokens_per_step else ""
                bar.set_postfix_str(f"{speed}loss {steps[-1]['loss']:.3f}" if steps[-1]["loss"] is not None else speed)
            if status is not None:
                return status
            time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    """End the process group: politely, then not. torchrun hands SIGTERM on; Lightning may swallow it, hence SIGKILL."""
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def failure_cause(log: Path) -> str:
    """The exception that ended the worker: the last traceback's message that is not torchrun's own summary."""
    lines = Path(log).read_text(errors="replace").replace(f"{paths.root()}/", "").splitlines()
    cut = next((i for i, line in enumerate(lines) if "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in line), len(lines))
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in lines[:cut]]
    for index in range(len(lines) - 1, -1, -1):
        if re.match(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b.*", lines[index]):
            # A message may go on for some lines; NeMo's log and the next traceback do not belong to it.
            rest = itertools.takewhile(lambda line: line.strip() and not re.match(r"Traceback|\[|[EWI]\d{4} |\w+: +\d+%", line), lines[index + 1 :])
            return "\n".join([lines[index], *itertools.islice(rest, 5)])
    tail = [line for line in lines if line.strip()][-5:]
    return "The training process ended without a Python error. Its last words:\n" + "\n".join(tail)


def _keep(run_dir: Path) -> Path:
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    return run_dir.rename(kept)
