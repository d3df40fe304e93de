"""Child processes: in a group of their own, with NeMo's patches, gone when this process is.

A ``workshop`` command or a job gets a process where it cannot run in a notebook's kernel, in which
Lightning refuses to build NeMo's trainer, or would leave NeMo behind in this process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from workshop_utils.core import paths
from workshop_utils.core.errors import GenerationFailed, WorkshopError
from workshop_utils.runtime import nemo_cpu, orphans

LOOK = 0.5
"""Seconds between two looks at a child."""

PATIENCE = 10.0
"""Seconds that an interrupted ``workshop`` command has to remove what it has half-written."""

_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""Beginnings of what torchrun tells a worker. Our child is none, and would wait for the others."""


def environment(**more: str) -> dict[str, str]:
    """What a child inherits: this process's variables, NeMo's patches, and its end."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_TORCHRUN)}
    nemo_cpu.inherit(own)
    return own | {orphans.VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"} | more


def start(
    command: Sequence[str], output: IO, variables: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Start ``command`` with all it prints in ``output``; ``variables`` are its environment
    (default: :func:`environment`)."""
    # A session of its own: a terminal's Ctrl-C would reach it beside our signal, and the second one
    # would interrupt its cleaning up.
    return subprocess.Popen(
        command,
        env=environment() if variables is None else variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(process: subprocess.Popen, patience: float = PATIENCE) -> int:
    """End what :func:`start` started, if it has not ended: SIGTERM to the whole group, and SIGKILL
    after ``patience`` seconds. Returns the exit status, negative for a signal."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            _has_ended(process, patience)
    return process.wait()


def run(
    command: Sequence[str],
    log: Path,
    variables: Mapping[str, str] | None = None,
    follow: Callable[[], object] = lambda: None,
    patience: float = PATIENCE,
) -> int:
    """Run ``command`` with its output in ``log`` and return its exit status.

    ``follow`` is called every ``LOOK`` seconds; where it returns something true, and after Ctrl-C
    or a notebook's interrupt, the command is ended as :func:`end` does it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = start(command, output, variables)
    try:
        while not (_has_ended(process, LOOK) or follow()):
            pass
    finally:
        status = end(process, patience)
    return status


def _has_ended(process: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def tail(log: Path, lines: int = 15) -> str:
    """What a child wrote last."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run_quietly(*arguments: str) -> None:
    """Run ``workshop ARGUMENTS``. Raises WorkshopError, with what it wrote last, if it fails."""
    with paths.temporary_directory("workshop-") as folder:
        log = folder / "log.txt"
        if run([sys.executable, "-m", "workshop_utils", *arguments], log):
            raise WorkshopError(f"`workshop {' '.join(arguments)}` failed:\n{tail(log)}")


def run_job(module: str, folder: Path, job: dict, checkpoint: Path | str) -> None:
    """Run ``module`` in a process of its own on ``folder/job.json``. Raises GenerationFailed, with
    ``checkpoint`` and what it wrote last, if it fails."""
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = folder / "log.txt"
    if status := run([sys.executable, "-m", module, str(folder)], log):
        raise GenerationFailed(
            f"NeMo could not answer with {paths.shown(checkpoint)} (exit status {status}):\n"
            f"{tail(log)}"
        )
