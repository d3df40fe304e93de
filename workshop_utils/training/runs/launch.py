"""Make a run, of either path: again only where it has to be, in a process of its own, with progress
from its events, and the real cause when it fails."""

import contextlib
import itertools
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from workshop_utils.core import paths
from workshop_utils.core.errors import TrainingFailed, WorkshopError
from workshop_utils.core.progress import progress_bar
from workshop_utils.runtime import processes
from workshop_utils.training.runs import run_record
from workshop_utils.training.runs.events import read_events
from workshop_utils.training.runs.run_record import Run

GRACE = 1.0
"""Seconds that the workers get to end after a signal before they are killed. A checkpoint is whole
at any moment or not there."""

LINGER = 2.0
"""Seconds for the other workers to say their last words when one has failed."""

_LESS_MEMORY = "lower model.micro_batch_size or model.data.train_ds.max_seq_length"
_ADVICE = {
    r"\[Errno (27|28)\]": "The disk is full, or a limit on the size of files is reached. Make "
    "room, and run the same command again.",
    r"MemoryError|bad_alloc|not enough memory|[Cc]annot allocate memory|out of memory": "Memory "
    f"ran out: {_LESS_MEMORY}, or close other programs.",
}

_FULL = 1 << 16
"""Bytes free on a disk that counts as full."""

_UNFINISHED = "-unfinished"
"""End of the name of NeMo's mark beside a checkpoint (``NeMoModelCheckpoint`` in
``nemo/utils/callbacks/nemo_model_checkpoint.py``, 2.4.1)."""

_CLOSING = b"closing signal SIGTERM"
"""What torchrun logs when it begins to stop the other workers because one failed. It then waits
30 s for those that do not listen, as Lightning does not in the middle of a collective operation
(``torch/distributed/elastic/multiprocessing/api.py``, torch 2.13)."""


def make(run: Run, start: Callable[[], None], fresh: bool, resume: bool = True) -> None:
    """Have ``start`` make ``run``, unless an equal run has finished; an unfinished equal one is
    gone on with, any other one is kept under a numbered name. A line says which. ``fresh`` begins
    anew whatever is there, and so does an unfinished run without ``resume``. Raises WorkshopError
    where another process is at it."""
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    where = paths.shown(run.run_dir)
    lock = FileLock(run.run_dir.with_name(f".{run.run_dir.name}.lock"))
    try:
        with lock.acquire(blocking=False):
            if not fresh and run_record.has_finished(run):
                used = f"an identical run has finished; {run.result} is used."
                print(f"{where}: {used} ({run.again}, trains again.)")
                return
            _prepare(run, fresh or not resume)
            start()
    except Timeout:
        raise WorkshopError(
            f"Another process is training in {where}. Wait, or {run.elsewhere}."
        ) from None


def _prepare(run: Run, fresh: bool) -> None:
    """Leave the run directory empty, or as an interrupted start of the same run left it."""
    if not run.run_dir.exists():
        return
    record = run_record.read(run)
    if fresh or record.get("status") == run_record.FINISHED or not run_record.is_same(run, record):
        numbered = (run.run_dir.with_name(f"{run.run_dir.name}.{n}") for n in itertools.count(1))
        kept = run.run_dir.rename(next(place for place in numbered if not place.exists()))
        print(f"The earlier run is kept as {paths.shown(kept)}.")
        return
    print(run_record.how_it_ended(run, record))
    if checkpoint := last_checkpoint(run.run_dir):
        print(f"Continuing from {paths.shown(checkpoint)}. ({run.again}, starts over.)")
    else:
        print("It left no checkpoint: starting from the first step.")
        run.events.unlink(missing_ok=True)


def run_recorded(
    run: Run,
    command: Sequence[str],
    environment: dict[str, str],
    progress: bool,
    cause_of: Callable[[int], str | None],
) -> None:
    """Run ``command``, which makes ``run``, and write down how it ended. ``cause_of`` gives the
    reason why an exit status, or what is there, means that it has failed: then TrainingFailed is
    raised."""
    began = time.monotonic()
    record = run_record.begin(run)
    try:
        status = run_logged(command, environment, run.log, run.events if progress else None)
        cause = cause_of(status)
    except KeyboardInterrupt:
        run_record.end(run, record, run_record.INTERRUPTED, time.monotonic() - began)
        if checkpoint := last_checkpoint(run.run_dir):
            print(f"Stopped. The same command continues from {paths.shown(checkpoint)}.")
        else:
            print("Stopped before the first checkpoint. The same command starts over.")
        raise
    how = run_record.FAILED if cause else run_record.FINISHED
    run_record.end(run, record, how, time.monotonic() - began, status, cause)
    if cause:
        raise TrainingFailed(f"{cause}\nThe whole log: {paths.shown(run.log)}")


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that a run in ``run_dir`` goes on from; one that NeMo had not finished, which
    it marks and removes, is none."""

    def is_whole(path: Path) -> bool:
        mark = path.with_name(path.name.removesuffix(".ckpt") + _UNFINISHED)
        return not path.name.endswith(_UNFINISHED) and not mark.exists()

    return max(filter(is_whole, run_dir.glob("checkpoints/*last*")), default=None)


def run_logged(
    command: Sequence[str],
    environment: dict[str, str],
    log: Path,
    events: Path | None = None,
    doing: str = "training",
    unit: str = "step",
) -> int:
    """Run ``command`` with its output in ``log`` and return its exit status; follow ``events`` with
    a progress bar meanwhile, which says what is being done, and in which ``unit``s.

    Ctrl-C (and a notebook's interrupt) ends the whole process group before it goes on.
    """

    def follow() -> bool:
        show()
        if lost_a_worker := _CLOSING in log.read_bytes():
            time.sleep(LINGER)
        return lost_a_worker

    with _bar(events, doing, unit) as show:
        status = processes.run(command, log, environment, follow, GRACE)
        show()
    return status


@contextlib.contextmanager
def _bar(
    events: Path | None, doing: str = "training", unit: str = "step"
) -> Iterator[Callable[[], None]]:
    """Yield a function that moves a tqdm bar along with the steps in ``events``; without ``events``
    it does nothing."""
    if events is None:
        yield lambda: None
        return

    def show() -> None:
        last = {event["event"]: event for event in read_events(events)}
        if "start" in last and bar.total is None:
            bar.set_description(doing, refresh=False)
            bar.reset(total=last["start"]["max_steps"])
        if step := last.get("step"):
            bar.n = step["step"]
            words = (
                ("tokens_per_second", "{:.0f} tokens/s", 1),
                ("loss", "loss {:.3f}", 1),
                ("memory", "{:.1f} GB", 1e9),
            )
            known = [(key, text, of) for key, text, of in words if step.get(key) is not None]
            bar.set_postfix_str(", ".join(text.format(step[key] / of) for key, text, of in known))

    with progress_bar(desc="loading NeMo and the model", unit=unit, dynamic_ncols=True) as bar:
        yield show


_NO_MESSAGE = re.compile(r"\s*$|Traceback|\[|[EWI]\d{4} |\w+: +\d+%")
"""A message may go on for some lines; NeMo's log and the next traceback do not belong to it."""


def failure_cause(log: Path) -> str:
    """The exception that ended the worker: the last traceback's message that is not torchrun's own
    summary."""
    if shutil.disk_usage(log.parent).free < _FULL:
        # The log itself ends where there was no room left.
        return _with_advice("[Errno 28] No space left on device")
    text = Path(log).read_text(errors="replace").replace(f"{paths.root()}/", "")
    of_torchrun = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
    of_workers = itertools.takewhile(lambda line: of_torchrun not in line, text.splitlines())
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in of_workers]
    for index in range(len(lines) - 1, -1, -1):
        if re.match(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b.*", lines[index]):
            rest = itertools.takewhile(lambda line: not _NO_MESSAGE.match(line), lines[index + 1 :])
            return _with_advice("\n".join([lines[index], *itertools.islice(rest, 5)]))
    ended = re.search(r"exitcode\s*:\s*-(\d+)", text)
    number = int(ended[1]) if ended else 0
    if number == signal.SIGKILL:
        return (
            "A training process was killed (SIGKILL). Usually the system does that when memory "
            f"runs out: {_LESS_MEMORY}."
        )
    by = f", by {signal.Signals(number).name}" if number in set(signal.Signals) else ""
    own = itertools.takewhile(lambda line: "failed (exitcode" not in line, lines)
    last = "\n".join([line for line in own if line.strip()][-5:])
    return _with_advice(
        f"The training process ended without a Python error{by}. Its last words:\n{last}"
    )


def _with_advice(message: str) -> str:
    advice = [advice for signs, advice in _ADVICE.items() if re.search(signs, message)]
    return "\n".join([message, *advice[:1]])
