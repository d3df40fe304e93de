"""What this machine is, for records of what was measured on it."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from workshop_utils.runtime.device import gpu_name


def describe_machine() -> dict:
    """System, processor, cores this process may use, memory in GiB, GPU or null, and the versions
    that matter."""
    packages = ("nemo-toolkit", "megatron-core", "torch", "transformers", "peft")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu_name(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _processor() -> str:
    found = re.search(
        r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
    )
    return found[1].strip() if found else platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
