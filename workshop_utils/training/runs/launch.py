"""Run a plan: torchrun in a process group of its own, progress from its events, the real cause when
it fails."""

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

from workshop_utils.core import paths
from workshop_utils.core.progress import progress_bar
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
    r"\[Errno (27|28)\]": (
        "The disk is full, or a limit on the size of files is reached. Make room, and run the "
        "same command again."
    ),
    r"MemoryError|bad_alloc|not enough memory|[Cc]annot allocate memory|out of memory": f"Memory ran out: {_LESS_MEMORY}, or close other programs.",  # noqa: E501
}

_FULL = 1 << 16
"""Bytes free on a disk that counts as full."""

_UNFINISHED = "-unfinished"
"""End of the name of NeMo's mark beside a checkpoint (``NeMoModelCheckpoint`` in
``nemo/utils/callbacks/nemo_model_checkpoint.py``, 2.4.1)."""

_CLOSING = b"closing signal SIGTERM"


def prepare(run: Run, fresh: bool, switch: str = "--fresh, or fresh=True") -> None:
    """Leave the run directory as the run is to find it: empty, or as an interrupted start left it.
    ``switch`` is what ``fresh`` is called."""
    if not run.run_dir.exists():
        return
    record = run_record.read(run)
    continues = (
        not fresh
        and record.get("fingerprint") == run.fingerprint()
        and record.get("status") != run_record.FINISHED
    )
    if not continues:
        print(f"The earlier run is kept as {paths.shown(_keep(run.run_dir))}.")
        return
    print(run_record.how_it_ended(run, record))
    if checkpoint := last_checkpoint(run.run_dir):
        print(f"Continuing from {paths.shown(checkpoint)}. ({switch}, starts over.)")
    else:
        print("It left no checkpoint: starting from the first step.")
        run.events.unlink(missing_ok=True)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that a run in ``run_dir`` goes on from; one that NeMo had not finished, which
    it marks and removes, is none."""
    found = [
        path for path in run_dir.glob("checkpoints/*last*") if not path.name.endswith(_UNFINISHED)
    ]
    return max(
        (
            path
            for path in found
            if not path.with_name(path.name.removesuffix(".ckpt") + _UNFINISHED).exists()
        ),
        default=None,
    )


def stopped(run_dir: Path) -> str:
    """What to tell after Ctrl-C: whether the same command continues a run in ``run_dir`` or starts
    over."""
    if checkpoint := last_checkpoint(run_dir):
        return f"Stopped. The same command continues from {paths.shown(checkpoint)}."
    return "Stopped before the first checkpoint. The same command starts over."


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
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
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
    """Whether torchrun has begun to stop the other workers because one failed. It then waits 30 s
    for those that do not listen, as Lightning does not in the middle of a collective operation
    (``torch/distributed/elastic/multiprocessing/api.py``, torch 2.13).
    """
    return _CLOSING in log.read_bytes()


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
        """Bring the bar to the last step in ``events``."""
        seen = read_events(events)
        steps = [event for event in seen if event["event"] == "step"]
        starts = [event for event in seen if event["event"] == "start"]
        if starts and bar.total is None:
            bar.set_description(doing, refresh=False)
            bar.reset(total=starts[-1]["max_steps"])
        if steps:
            bar.n = steps[-1]["step"]
            said = (
                ("tokens_per_second", "{:.0f} tokens/s", 1),
                ("loss", "loss {:.3f}", 1),
                ("memory", "{:.1f} GB", 1e9),
            )
            bar.set_postfix_str(
                ", ".join(
                    text.format(steps[-1][key] / unit)
                    for key, text, unit in said
                    if steps[-1].get(key) is not None
                )
            )

    with progress_bar(desc="loading NeMo and the model", unit=unit, dynamic_ncols=True) as bar:
        yield show


def _end(process: subprocess.Popen) -> int:
    """End the process group: politely, then not; returns its exit status. torchrun hands SIGTERM
    on; Lightning may swallow it."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(patience)
    return process.wait()


def failure_cause(log: Path) -> str:
    """The exception that ended the worker: the last traceback's message that is not torchrun's own
    summary."""
    if shutil.disk_usage(log.parent).free < _FULL:
        # The log itself ends where there was no room left.
        return _with_advice("[Errno 28] No space left on device")
    text = Path(log).read_text(errors="replace").replace(f"{paths.root()}/", "")
    lines = text.splitlines()
    cut = next(
        (
            i
            for i, line in enumerate(lines)
            if "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in line
        ),
        len(lines),
    )
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in lines[:cut]]
    for index in range(len(lines) - 1, -1, -1):
        if re.match(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b.*", lines[index]):
            # A message may go on for some lines; NeMo's log and the next traceback do not belong to
            # it.
            rest = itertools.takewhile(
                lambda line: (
                    line.strip() and not re.match(r"Traceback|\[|[EWI]\d{4} |\w+: +\d+%", line)
                ),
                lines[index + 1 :],
            )
            return _with_advice("\n".join([lines[index], *itertools.islice(rest, 5)]))
    ended = re.search(r"exitcode\s*:\s*-(\d+)", text)
    name = (
        signal.Signals(int(ended[1])).name
        if ended and int(ended[1]) in set(signal.Signals)
        else None
    )
    if name == "SIGKILL":
        return (
            "A training process was killed (SIGKILL). Usually the system does that when memory "
            f"runs out: {_LESS_MEMORY}."
        )
    own = itertools.takewhile(lambda line: "failed (exitcode" not in line, lines)
    tail = "\n".join([line for line in own if line.strip()][-5:])
    return _with_advice(
        f"The training process ended without a Python error{f', by {name}' if name else ''}. Its "
        f"last words:\n{tail}"
    )


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
