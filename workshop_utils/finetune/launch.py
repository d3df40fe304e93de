"""Run a plan: torchrun in a process group of its own, progress from its events, the real cause when it fails."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from workshop_utils import paths
from workshop_utils.errors import TrainingFailed, WorkshopError
from workshop_utils.export.nemo import merge_parts
from workshop_utils.progress import progress_bar

from . import run_record
from .events import read_events
from .plan import Plan
from .schemes import SECTIONS

GRACE = 1.0
"""Seconds that the workers get to end after a signal before they are killed. A checkpoint is whole at any moment or not there."""

LINGER = 2.0
"""Seconds for the other workers to say their last words when one has failed."""

_LESS_MEMORY = "lower model.micro_batch_size or model.data.train_ds.max_seq_length"
_ADVICE = {
    r"\[Errno (27|28)\]": "The disk is full, or a limit on the size of files is reached. Make room, and run the same command again.",
    r"MemoryError|bad_alloc|not enough memory|[Cc]annot allocate memory|out of memory": f"Memory ran out: {_LESS_MEMORY}, or close "
                                                                                       "other programs.",
}  # fmt: skip

_FULL = 1 << 16
"""Bytes free on a disk that counts as full."""

_UNFINISHED = "-unfinished"
"""End of the name of NeMo's mark beside a checkpoint (``NeMoModelCheckpoint`` in ``nemo/utils/callbacks/nemo_model_checkpoint.py``, 2.4.1)."""

_CLOSING = b"closing signal SIGTERM"


def finetune(plan: Plan, progress: bool = True, fresh: bool = False) -> Path:
    """Train and return the path of the ``.nemo`` adapter that NeMo wrote, merged if several model-parallel ranks wrote it.

    A finished run of the same overrides, script, data and base is used as it is; an unfinished one is continued from its last
    checkpoint. A line says which. Any other earlier run of the same name is kept under a numbered name, as is the same one with
    ``fresh``.

    Raises:
        WorkshopError: the plan's preflight found something that would make the run fail, or another process trains there.
        TrainingFailed: with the cause from the worker's log. The log stays beside the run.
    """
    plan.preflight.require()
    plan.run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.run_dir.with_name(f".{plan.run_dir.name}.lock"))
    try:
        with lock.acquire(blocking=False):
            if not fresh and (done := _identical(plan)):
                return done
            prepare(plan, fresh or not plan.config.exp_manager.resume_if_exists)
            return _train(plan, progress)
    except Timeout:
        raise WorkshopError(f"Another process is training in {paths.shown(plan.run_dir)}. Wait, or give the run another --name.") from None


def _identical(plan: Plan) -> Path | None:
    """The adapter of a finished run that was asked for in the same words."""
    record = run_record.read(plan)
    if record.get("fingerprint") != plan.fingerprint() or record.get("status") != run_record.FINISHED or not plan.adapter.exists():
        return None
    print(f"{paths.shown(plan.run_dir)}: an identical run has finished; its adapter is used. (--fresh, or fresh=True, trains again.)")
    return plan.adapter


def prepare(plan: Plan, fresh: bool, switch: str = "--fresh, or fresh=True") -> None:
    """Leave the run directory as the run is to find it: empty, or as an interrupted start left it. ``switch`` is what ``fresh`` is called."""
    if not plan.run_dir.exists():
        return
    record = run_record.read(plan)
    continues = not fresh and record.get("fingerprint") == plan.fingerprint() and record.get("status") != run_record.FINISHED
    if not continues:
        print(f"The earlier run is kept as {paths.shown(_keep(plan.run_dir))}.")
        return
    print(run_record.how_it_ended(plan, record))
    if checkpoint := last_checkpoint(plan.run_dir):
        print(f"Continuing from {paths.shown(checkpoint)}. ({switch}, starts over.)")
    else:
        print("It left no checkpoint: starting from the first step.")
        plan.events.unlink(missing_ok=True)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that a run in ``run_dir`` goes on from; one that NeMo had not finished, which it marks and removes, is none."""
    found = [path for path in run_dir.glob("checkpoints/*last*") if not path.name.endswith(_UNFINISHED)]
    return max((path for path in found if not path.with_name(path.name.removesuffix(".ckpt") + _UNFINISHED).exists()), default=None)


def stopped(run_dir: Path) -> str:
    """What to tell after Ctrl-C: whether the same command continues a run in ``run_dir`` or starts over."""
    if checkpoint := last_checkpoint(run_dir):
        return f"Stopped. The same command continues from {paths.shown(checkpoint)}."
    return "Stopped before the first checkpoint. The same command starts over."


def _train(plan: Plan, progress: bool) -> Path:
    """Run the plan's command, and write down how it ended."""
    began = time.monotonic()
    record = run_record.begin(plan)
    status, cause = None, None
    try:
        status = run_logged(plan.command, plan.environment, plan.log, plan.events if progress else None)
        if status != 0:
            cause = failure_cause(plan.log)
        elif not plan.adapter.exists():
            cause = f"torchrun ended well, but {paths.shown(plan.adapter)} is missing."
        elif plan.config.model.peft.peft_scheme in SECTIONS and merge_parts(plan.adapter):
            print(f"{paths.shown(plan.adapter)}: the parts of the model-parallel ranks are put together.")
    except KeyboardInterrupt:
        run_record.end(plan, record, run_record.INTERRUPTED, time.monotonic() - began, None)
        print(stopped(plan.run_dir))
        raise
    run_record.end(plan, record, run_record.FAILED if cause else run_record.FINISHED, time.monotonic() - began, status, cause)
    if cause:
        raise TrainingFailed(f"{cause}\nThe whole log: {paths.shown(plan.log)}")
    return plan.adapter


def train_seconds(plan: Plan) -> float:
    """Seconds from the start of torchrun to its end, imports and model loading included, of the last start of the finished ``plan``."""
    return run_record.read(plan)["seconds"]


def run_logged(
    command: Sequence[str], environment: dict[str, str], log: Path, events: Path | None = None, doing: str = "training", unit: str = "step"
) -> int:
    """Run ``command`` with its output in ``log`` and return its exit status; follow ``events`` with a progress bar meanwhile,
    which says what is being done, and in which ``unit``s.

    Ctrl-C (and a notebook's interrupt) ends the whole process group before it goes on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            with _bar(events, doing, unit) as show:
                while (status := process.poll()) is None:
                    show()
                    if _has_lost_a_worker(log):
                        time.sleep(LINGER)
                        break
                    time.sleep(0.5)
                show()
                return status if status is not None else _end(process)
        finally:
            _end(process)


def _has_lost_a_worker(log: Path) -> bool:
    """Whether torchrun has begun to stop the other workers because one failed. It then waits 30 s for those that do not listen, as
    Lightning does not in the middle of a collective operation (``torch/distributed/elastic/multiprocessing/api.py``, torch 2.13).
    """
    return _CLOSING in log.read_bytes()


@contextlib.contextmanager
def _bar(events: Path | None, doing: str = "training", unit: str = "step") -> Iterator[Callable[[], None]]:
    """Yield a function that moves a tqdm bar along with the steps in ``events``; without ``events`` it does nothing."""
    if events is None:
        yield lambda: None
        return
    def show() -> None:
        """Bring the bar to the last step in ``events``."""
        seen = read_events(events)
        steps = [event for event in seen if event["event"] == "step"]
        starts = [event for event in seen if event["event"] == "start"]
        if starts and bar.total is None:
            bar.set_description(doing, refresh=False)
            bar.reset(total=starts[-1]["max_steps"])
        if steps:
            bar.n = steps[-1]["step"]
            said = (("tokens_per_second", "{:.0f} tokens/s", 1), ("loss", "loss {:.3f}", 1), ("memory", "{:.1f} GB", 1e9))
            bar.set_postfix_str(", ".join(text.format(steps[-1][key] / unit) for key, text, unit in said if steps[-1].get(key) is not None))

    with progress_bar(desc="loading NeMo and the model", unit=unit, dynamic_ncols=True) as bar:
        yield show


def _end(process: subprocess.Popen) -> int:
    """End the process group: politely, then not; returns its exit status. torchrun hands SIGTERM on; Lightning may swallow it."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(patience)
    return process.wait()


def failure_cause(log: Path) -> str:
    """The exception that ended the worker: the last traceback's message that is not torchrun's own summary."""
    if shutil.disk_usage(log.parent).free < _FULL:
        # The log itself ends where there was no room left.
        return _with_advice("[Errno 28] No space left on device")
    text = Path(log).read_text(errors="replace").replace(f"{paths.root()}/", "")
    lines = text.splitlines()
    cut = next((i for i, line in enumerate(lines) if "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in line), len(lines))
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in lines[:cut]]
    for index in range(len(lines) - 1, -1, -1):
        if re.match(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b.*", lines[index]):
            # A message may go on for some lines; NeMo's log and the next traceback do not belong to it.
            rest = itertools.takewhile(lambda line: line.strip() and not re.match(r"Traceback|\[|[EWI]\d{4} |\w+: +\d+%", line), lines[index + 1 :])
            return _with_advice("\n".join([lines[index], *itertools.islice(rest, 5)]))
    ended = re.search(r"exitcode\s*:\s*-(\d+)", text)
    name = signal.Signals(int(ended[1])).name if ended and int(ended[1]) in set(signal.Signals) else None
    if name == "SIGKILL":
        return f"A training process was killed (SIGKILL). Usually the system does that when memory runs out: {_LESS_MEMORY}."
    own = itertools.takewhile(lambda line: "failed (exitcode" not in line, lines)
    tail = "\n".join([line for line in own if line.strip()][-5:])
    return _with_advice(f"The training process ended without a Python error{f', by {name}' if name else ''}. Its last words:\n{tail}")


def _with_advice(message: str) -> str:
    """``message``, and what to do where that is always the same."""
    for signs, advice in _ADVICE.items():
        if re.search(signs, message):
            return f"{message}\n{advice}"
    return message


def _keep(run_dir: Path) -> Path:
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    return run_dir.rename(kept)
