"""Which device and precision to use, and why. Answers in milliseconds: torch is not imported."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core.errors import WorkshopError


@dataclass(frozen=True)
class Device:
    """``kind`` is "cpu" or "gpu"; ``precision`` is what Lightning's Trainer takes; ``reason`` says
    why it was chosen."""

    kind: str
    precision: str
    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.dtype} ({self.reason})"


def choose_device() -> Device:
    """A GPU in bf16 where the driver and this torch can use one, else the CPU in fp32.
    ``WORKSHOP_DEVICE=cpu|gpu`` overrides.

    Raises:
        WorkshopError: ``WORKSHOP_DEVICE`` is neither of these.
    """
    wanted = os.environ.get("WORKSHOP_DEVICE") or "auto"
    if wanted not in ("auto", "cpu", "gpu"):
        raise WorkshopError(
            f"WORKSHOP_DEVICE is {wanted!r}; set it to cpu or gpu, or leave it out to have one "
            "chosen."
        )
    if wanted == "cpu":
        return Device("cpu", "32", "fp32", "WORKSHOP_DEVICE=cpu")
    if wanted == "gpu":
        return Device("gpu", "bf16-mixed", "bf16", "WORKSHOP_DEVICE=gpu")
    name = gpu_name()
    if name is None:
        return Device("cpu", "32", "fp32", "no NVIDIA GPU found")
    if not torch_has_cuda():
        return Device("cpu", "32", "fp32", f"{name} found, but the installed torch is a CPU build")
    return Device("gpu", "bf16-mixed", "bf16", f"{name} found")


def gpu_name() -> str | None:
    """The first GPU that ``nvidia-smi`` lists and ``CUDA_VISIBLE_DEVICES`` does not hide, or
    None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return None
    answer = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return (
        answer.stdout.splitlines()[0].strip()
        if answer.returncode == 0 and answer.stdout.strip()
        else None
    )


def torch_has_cuda() -> bool:
    """True if the installed torch was built with CUDA, read from its ``version.py`` without
    importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text()
    return re.search(r"^cuda\s*(:[^=]*)?=\s*['\"]", text, re.MULTILINE) is not None


def quiet_environment(environment: dict[str, str]) -> None:
    """Turn off telemetry of NeMo, Weights & Biases and Hugging Face, and leave unset what a person
    has set otherwise."""
    for name, value in {
        "WANDB_MODE": "disabled",
        "WANDB_DISABLED": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "NEMO_ONELOGGER_ENABLED": "0",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # torch warns about a package that nvidia-resiliency-ext requires, in every process that
        # imports it.
        "PYTHONWARNINGS": "ignore:The pynvml package is deprecated:FutureWarning",
    }.items():
        environment.setdefault(name, value)
