"""How training processes are started: torchrun, and the environment that they inherit."""

import os
import sys
from pathlib import Path

from workshop_utils.runtime import processes
from workshop_utils.runtime.device import Device, choose_device, quiet_environment


def notes(run_dir: Path) -> Path:
    """Where a run's log, events and record stand: in a folder, since NeMo's exp_manager moves
    *files* of an earlier start away."""
    return run_dir / "workshop"


def torchrun(script: Path, overrides: list[str], nproc_per_node: int = 1) -> list[str]:
    """The command line. ``--standalone`` picks a free port, so that two runs on one machine do not
    meet."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={nproc_per_node}", str(script), *overrides]


def training_environment(
    run_dir: Path,
    nproc_per_node: int = 1,
    tokens_per_step: float | None = None,
    device: Device | None = None,
) -> dict[str, str]:
    """Environment of the training processes: patches, ``device``, events (with tokens a second
    where ``tokens_per_step`` is known), no telemetry, the cores shared out among the processes."""
    environment = processes.environment(
        WORKSHOP_EVENTS=str(notes(run_dir) / "events.jsonl"), HYDRA_FULL_ERROR="1"
    )
    quiet_environment(environment)
    cores = len(os.sched_getaffinity(0)) // nproc_per_node
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    if tokens_per_step:
        environment["WORKSHOP_TOKENS_PER_STEP"] = str(tokens_per_step)
    environment["WORKSHOP_DEVICE"] = (device or choose_device()).kind
    return environment
