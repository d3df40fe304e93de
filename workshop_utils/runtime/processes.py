"""A ``workshop`` command in a process of its own: for what cannot run in a notebook's kernel, where
Lightning refuses to build NeMo's trainer, and for what would leave NeMo behind in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.core import paths
from workshop_utils.core.errors import GenerationFailed, WorkshopError
from workshop_utils.runtime import nemo_cpu, orphans

if TYPE_CHECKING:
    pass

_LOG_LINES = 15
_PATIENCE = 10
"""Seconds that an interrupted command has to remove what it has half-written."""
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""Beginnings of what torchrun tells a worker. The command is no worker, and would wait for the
others."""


def run_quietly(*arguments: str) -> None:
    """Run ``workshop ARGUMENTS``; what it printed is shown only if it fails. It ends with this
    process; at Ctrl-C it cleans up first.

    Raises:
        WorkshopError: it failed; with what it wrote last.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_OF_TORCHRUN)
    }
    environment[orphans.VARIABLE] = str(os.getpid())
    nemo_cpu.inherit(environment)
    command = [sys.executable, "-m", "workshop_utils", *arguments]
    # A session of its own: a terminal's Ctrl-C would reach it beside our signal, and the second one
    # would interrupt its cleaning up.
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate()
        except KeyboardInterrupt:
            process.terminate()
            try:
                process.communicate(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if process.returncode:
        tail = "\n".join((printed + errors).splitlines()[-_LOG_LINES:])
        raise WorkshopError(f"`workshop {' '.join(arguments)}` failed:\n{tail}")


def run_job(module: str, folder: Path, job: dict, checkpoint: Path | str) -> None:
    """Start ``module`` as a process of its own on ``folder/job.json``; it ends with this one. Its
    output goes to ``folder/log.txt``.

    Raises:
        GenerationFailed: it failed; the message names ``checkpoint`` and ends with what it wrote
            last.
    """
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = folder / "log.txt"
    environment = os.environ | {orphans.VARIABLE: str(os.getpid())}
    nemo_cpu.inherit(environment)
    with log.open("wb") as stream:
        command = [sys.executable, "-m", module, str(folder)]
        code = subprocess.run(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        raise GenerationFailed(
            f"NeMo could not answer with {paths.shown(checkpoint)} (exit status {code}):\n{tail}"
        )
