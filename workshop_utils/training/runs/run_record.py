"""``workshop/run.json`` in a run's directory: what was asked for, where it ran, and how it ended.
By it a run that was made before is known again."""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.runtime.machine import describe_machine
from workshop_utils.training.runs.environment import notes
from workshop_utils.training.runs.events import last_step

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


class Run:
    """A training run: where its files lie, and what decides its outcome. The plan of either path is
    one.

    ``again`` is the switch that trains anew, ``elsewhere`` the advice for a directory that is
    taken, ``result`` what a run is made for; they are words for people.
    """

    run_dir: Path
    seed: int
    """Of the data's order and the adapter's weights."""
    device: object
    again = ""
    elsewhere = ""
    result = "it"

    @property
    def events(self) -> Path:
        """JSON lines that the training process writes (see :mod:`.events`)."""
        return notes(self.run_dir) / "events.jsonl"

    @property
    def log(self) -> Path:
        """Everything that torchrun and its workers print."""
        return notes(self.run_dir) / "torchrun.log"

    @property
    def record(self) -> Path:
        """JSON: what was asked for and, once finished, the seconds it took."""
        return notes(self.run_dir) / "run.json"

    def fingerprint(self) -> dict[str, Any]:
        """What decides the outcome. Equal fingerprints, equal runs on one machine."""
        raise NotImplementedError

    def is_there(self) -> bool:
        """Whether the result of the finished run is where it was left."""
        return True


def read(run: Run) -> dict[str, Any]:
    """The record in the directory of ``run``; empty where there is none that can be read."""
    try:
        record = json.loads(run.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_same(run: Run, record: dict[str, Any]) -> bool:
    """Whether ``record`` is of a run that would come out as ``run``."""
    return record.get("fingerprint") == run.fingerprint()


def has_finished(run: Run) -> bool:
    """Whether an equal run has finished in the directory of ``run``."""
    record = read(run)
    return record.get("status") == FINISHED and run.is_there() and is_same(run, record)


def begin(run: Run) -> dict[str, Any]:
    """Write the record of a run that starts now, and return it."""
    record = {
        "status": RUNNING,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fingerprint": run.fingerprint(),
        "command": str(run),
        "seed": run.seed,
        "commit": _commit(),
        "device": str(run.device),
        "machine": describe_machine(),
    }
    paths.write_text(run.record, json.dumps(record, indent=2))
    return record


def end(
    run: Run,
    record: dict[str, Any],
    status: str,
    seconds: float,
    exit_status: int | None = None,
    cause: str | None = None,
) -> None:
    """Write how the run of ``record`` ended; ``seconds`` is its wall time, this start alone.

    Where the disk is full and the run has failed, its record stays as it began: the next start sees
    that nothing runs any more.
    """
    ended = {"status": status, "seconds": seconds, "exit_status": exit_status}
    ended |= {"steps": last_step(run.events)} | ({"cause": cause} if cause else {})
    try:
        paths.write_text(run.record, json.dumps(record | ended, indent=2))
    except OSError as error:
        if status == FINISHED:
            raise WorkshopError(
                f"{paths.shown(run.record)} cannot be written: {error.strerror}. Make room and "
                "run the same command again."
            ) from error


def how_it_ended(run: Run, record: dict[str, Any]) -> str:
    """A sentence about the last start in this directory, for the next one."""
    steps = last_step(run.events)
    after = f"after step {steps}" if steps else "before its first step"
    match record.get("status"):
        case "running":
            how = f"ended without a word {after}: it was killed, or the machine went down."
        case "failed":
            how = f"failed {after}: {str(record.get('cause')).splitlines()[0]}"
        case _:
            how = f"was interrupted {after}."
    return f"The last start {how}"


def _commit() -> str | None:
    """Commit of the workshop's repository, with "+" when files differ from it; None where there is
    no git.

    An installed package may lie in somebody else's repository, whose commit says nothing.
    """
    if not paths.in_clone():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
