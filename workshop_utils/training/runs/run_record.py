"""``workshop/run.json`` in a run's directory: what was asked for, where it ran, and how it
ended."""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.runtime.machine import describe_machine
from workshop_utils.training.runs.environment import notes
from workshop_utils.training.runs.events import read_events

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


class Run:
    """A training run: where its files lie, and what decides its outcome. The plan of either path is
    one."""

    run_dir: Path
    seed: int
    """Of the data's order and the adapter's weights."""
    device: object

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
        """JSON beside the run: what was asked for and, once finished, the seconds it took."""
        return notes(self.run_dir) / "run.json"

    def fingerprint(self) -> dict[str, Any]:
        """What decides the outcome. Equal fingerprints, equal runs on one machine."""
        raise NotImplementedError


def read(run: Run) -> dict[str, Any]:
    """The record of the run directory of ``run``; empty where there is none, or none that can be
    read."""
    try:
        found = json.loads(run.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
    _write(run, record)
    return record


def end(
    run: Run,
    record: dict[str, Any],
    status: str,
    seconds: float,
    exit_status: int | None,
    cause: str | None = None,
) -> None:
    """Write how the run of ``record`` ended; ``seconds`` is its wall time, this start alone.

    Where the disk is full and the run has failed, its record stays as it began: the next start sees
    that nothing runs any more.
    """
    steps = [event["step"] for event in read_events(run.events) if event["event"] == "step"]
    ended = {
        "status": status,
        "seconds": seconds,
        "exit_status": exit_status,
        "steps": max(steps, default=0),
    }
    try:
        _write(run, record | ended | ({"cause": cause} if cause else {}))
    except OSError as error:
        if status == FINISHED:
            raise WorkshopError(
                f"{paths.shown(run.record)} cannot be written: {error.strerror}. Make room and "
                "run the same command again."
            ) from error


def how_it_ended(run: Run, record: dict[str, Any]) -> str:
    """A sentence about the last start in this directory, for the next one."""
    steps = max(
        (event["step"] for event in read_events(run.events) if event["event"] == "step"), default=0
    )
    after = f"after step {steps}" if steps else "before its first step"
    if record.get("status") == RUNNING:
        return (
            f"The last start ended without a word {after}: it was killed, or the machine went down."
        )
    if record.get("status") == FAILED:
        return f"The last start failed {after}: {str(record.get('cause')).splitlines()[0]}"
    return f"The last start was interrupted {after}."


def _write(run: Run, record: dict[str, Any]) -> None:
    paths.write_text(run.record, json.dumps(record, indent=2))


def _commit() -> str | None:
    """Commit of the workshop's repository, with "+" when files differ from it; None where there is
    no git.

    An installed package may lie in somebody else's repository, whose commit says nothing.
    """
    if not paths.in_clone():
        return None
    try:

        def git(*arguments: str) -> str:
            """What git prints. Raises OSError without git, CalledProcessError where it fails."""
            return subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()

        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
