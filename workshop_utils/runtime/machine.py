"""What this machine is, for records of what was measured on it."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from workshop_utils.runtime.device import gpu_name

_PACKAGES = ("nemo-toolkit", "megatron-core", "torch", "transformers", "peft")


def describe_machine() -> dict:
    """System, processor, cores this process may use, memory in GiB, GPU or null, and the versions
    that matter (null where a package is not installed)."""
    model = re.search(r"(?m)^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"))
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model[1].strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory() / 2**30, 1),
        "gpu": gpu_name(),
        "python": platform.python_version(),
        "versions": {
            name: next((package.version for package in metadata.distributions(name=name)), None)
            for name in _PACKAGES
        },
    }


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
