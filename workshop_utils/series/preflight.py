"""Is this machine ready? One check a line, each with what to do. Imports no torch."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.home import MOVED, can_be_written, places, stand_in, use_writable_places
from workshop_utils.runtime.device import choose_device
from workshop_utils.series.lock import lock_file, normalised, read_lock

GIB = 2**30
DISK_NEEDED = 3 * GIB
"""The default model in its forms, the training's checkpoints and the exports take 1.3 GiB,
temporary files come on top."""
DISK_LEAST = 1 * GIB
"""Below this even a second run, which uses again what is there, may stop half-way."""
MEMORY_NEEDED = 6 * GIB
"""Training the default model takes about 4 GiB; JupyterLab and the system want the rest."""


@dataclass(frozen=True)
class Check:
    """``status``: OK, WARN (it works, but mind this) or FAIL; ``fix`` is empty when it is OK."""

    status: str
    name: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{f'[{self.status}]':6} {self.name}: {self.found}"
        return f"{line}\n       {self.fix}" if self.fix else line


def preflight() -> list[Check]:
    """All checks, in the order in which to put things right."""
    return [system(), python(), cores(), memory(), disk(), home(), packages(), kernel(), device()]


def system() -> Check:
    """Linux on x86-64; other processors may lack wheels, other systems lack NeMo."""
    status, fix = "OK", ""
    if platform.system() != "Linux":
        status, fix = "FAIL", "NeMo runs on Linux only. Use a Linux machine, WSL 2 on Windows, "
        fix += "or a Linux container."
    elif platform.machine() not in ("x86_64", "AMD64"):
        status, fix = "WARN", "The pinned packages were tried on x86-64 only; here some may have "
        fix += "to be compiled."
    return Check(status, "system", f"{platform.system()} {platform.machine()}", fix)


def python() -> Check:
    """Python 3.11, the version that the pinned packages are for."""
    fix = "Install Python 3.11, then run: make clean && make workshop PYTHON=python3.11"
    status, fix = ("OK", "") if sys.version_info[:2] == (3, 11) else ("FAIL", fix)
    return Check(status, "Python", platform.python_version(), fix)


def cores() -> Check:
    """Two cores or more."""
    known = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    fix = "It works with one core, but takes about twice the times given in the README."
    status, fix = ("OK", "") if count > 1 else ("WARN", fix)
    return Check(status, "cores", str(count), fix)


def memory() -> Check:
    """Six GiB, as far as a container's limit allows."""
    limit = memory_limit()
    fix = f"Training may be killed: it wants {MEMORY_NEEDED / GIB:.0f} GiB. Close other programs."
    status, fix = ("WARN", fix) if limit < MEMORY_NEEDED * 0.95 else ("OK", "")
    return Check(status, "memory", f"{limit / GIB:.1f} GiB", fix)


def disk() -> Check:
    """Room where models and runs go, which must be writable."""
    root = paths.root()
    free = shutil.disk_usage(root).free
    if not os.access(root, os.W_OK):
        fix = "Work in a folder of your own, or set WORKSHOP_ROOT to one."
        return Check("FAIL", "disk", f"{root} cannot be written to", fix)
    status, fix = "OK", ""
    if free < DISK_NEEDED:
        status = "FAIL" if free < DISK_LEAST else "WARN"
        fix = f"A first run wants {DISK_NEEDED / GIB:.0f} GiB for models and runs. "
        fix += f"Free some space where {root} lies."
    return Check(status, "disk", f"{free / GIB:.1f} GiB free", fix)


def home() -> Check:
    """Places for caches and settings, which NeMo and JupyterLab write to as soon as they start."""
    use_writable_places()
    shut = [f"{name} ({place})" for name, place in places().items() if not can_be_written(place)]
    if shut:
        fix = "Set that to a folder of your own, or unset it."
        return Check("FAIL", "home", f"cannot be written to: {_some(shut)}", fix)
    folder = Path(os.environ.get(MOVED, stand_in()))
    names = ("HOME", *places())
    moved = [name for name in names if Path(os.environ.get(name, "")).is_relative_to(folder)]
    if not moved:
        return Check("OK", "home", "can be written to")
    lasting = folder == stand_in()
    where = paths.shown(folder) if lasting else "a folder that goes with each command"
    fix = "To have caches and settings in a place of your own, set HOME to a folder that is yours."
    says = f"cannot be written to; {where} takes its place for {_some(moved)}"
    return Check("WARN", "home", says, fix)


def packages() -> Check:
    """Every package of the lock in its version; torch's build (+cpu, +cu128) may differ."""
    if not lock_file().is_file():
        fix = "Run this in a clone of the repository, or set WORKSHOP_ROOT to one."
        return Check("FAIL", "packages", f"no {lock_file()}", fix)
    try:
        pins = read_lock(lock_file())
    except WorkshopError as error:
        return Check("FAIL", "packages", "the lock cannot be read", str(error))
    installed = {
        normalised(package.metadata["Name"]): package.version.split("+")[0]
        for package in metadata.distributions()
    }
    missing = sorted(set(pins) - set(installed))
    if missing:
        return Check("FAIL", "packages", f"missing: {_some(missing)}", f"Run: {_install()}")
    other = [
        f"{name} {installed[name]} (pinned: {version})"
        for name, version in pins.items()
        if installed[name] != version
    ]
    if other:
        clean = "make clean && " if paths.in_clone() else ""
        fix = f"Nothing else was tried. For the pinned versions: {clean}{_install()}"
        return Check("WARN", "packages", _some(other), fix)
    return Check("OK", "packages", f"{len(pins)} as pinned")


def kernel() -> Check:
    """The kernel that runs the notebooks."""
    if util.find_spec("ipykernel") is None:
        return Check("FAIL", "Jupyter kernel", "ipykernel is missing", f"Run: {_install()}")
    return Check("OK", "Jupyter kernel", paths.shown(sys.executable))


def device() -> Check:
    """Where training will run, and why."""
    try:
        chosen = choose_device()
    except WorkshopError as error:
        return Check("FAIL", "device", "not usable", str(error))
    if chosen.kind == "cpu" and "CPU build" in chosen.reason:
        fix = "For the GPU, install the CUDA build of torch from your package index."
        return Check("WARN", "device", str(chosen), fix)
    return Check("OK", "device", str(chosen))


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may use: the machine's, or less in a container (cgroup v1 or v2)."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        text = file.read_text().strip() if file.is_file() else "max"
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


def _install() -> str:
    """The command that brings the pinned packages."""
    return "make env" if paths.in_clone() else f"{sys.executable} -m pip install -r {lock_file()}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
