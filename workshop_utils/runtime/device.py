"""Which device and precision to use, and why. Answers in milliseconds: torch is not imported."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.settings import load_settings


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
    """A GPU in bf16 where the driver and this torch can use one, else the CPU in fp32; the
    settings (``WORKSHOP_DEVICE=cpu|gpu``, ``workshop.yaml``) override."""
    chosen = load_settings().device
    stated = "WORKSHOP_DEVICE" if os.environ.get("WORKSHOP_DEVICE") else "workshop.yaml: device"
    if chosen not in ("auto", "cpu", "gpu"):
        raise WorkshopError(
            f"{stated} is {chosen!r}; set it to cpu or gpu, or leave it out to have one chosen."
        )
    reason = f"{stated}={chosen}"
    if chosen == "auto":
        name = gpu_name()
        chosen = "gpu" if name and torch_has_cuda() else "cpu"
        reason = f"{name} found" if name else "no NVIDIA GPU found"
        if name and chosen == "cpu":
            reason += ", but the installed torch is a CPU build"
    return Device(chosen, *{"cpu": ("32", "fp32"), "gpu": ("bf16-mixed", "bf16")}[chosen], reason)


def gpu_name() -> str | None:
    """The first GPU that ``nvidia-smi`` lists and ``CUDA_VISIBLE_DEVICES`` does not hide."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    names = answer.stdout.strip().splitlines()
    return names[0].strip() if answer.returncode == 0 and names else None


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, by its ``version.py``."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text()
    return re.search(r"^cuda\s*(:[^=]*)?=\s*['\"]", text, re.MULTILINE) is not None


def quiet_environment(environment: MutableMapping[str, str]) -> None:
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
