"""Caches and settings in the workshop's own folder where the home cannot be written to: a container
that runs as a stranger to it, a home on a read-only file system, no home at all.

    python -m workshop_utils.core.home COMMAND [ARGUMENT...]     run JupyterLab with such places
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from workshop_utils.core import paths

MOVED = "WORKSHOP_HOME_MOVED"
"""Variable that names the folder which took the home's place, also to the processes that this one
starts."""


def places() -> dict[str, Path]:
    """Variable -> the place where libraries write, by that variable, the XDG ones or the home."""
    home = Path(os.path.expanduser("~"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    usual = {
        "XDG_CACHE_HOME": cache,
        "HF_HOME": cache / "huggingface",
        "NEMO_HOME": home / ".cache" / "nemo",
        "NEMORUN_HOME": home / ".nemo_run",
        "TRITON_CACHE_DIR": home / ".triton" / "cache",
        "MPLCONFIGDIR": config / "matplotlib",
        "JUPYTER_CONFIG_DIR": home / ".jupyter",
        "JUPYTER_DATA_DIR": data / "jupyter",
        "IPYTHONDIR": home / ".ipython",
    }
    return {variable: Path(os.environ.get(variable) or place) for variable, place in usual.items()}


def stand_in() -> Path:
    """``.home/`` of the workshop. Holds nothing unless a home cannot be written to."""
    return paths.root() / ".home"


def use_writable_places() -> None:
    """Set each variable of :func:`places` whose place cannot be written to, to one below
    :func:`stand_in`, and HOME where it is no directory that can be entered.

    What a person has set stays. ``~/.config`` is not moved: pip and others only read there.
    """
    home = Path(os.path.expanduser("~"))  # stays "~" for a user that the system does not know
    homeless = not (home.is_absolute() and os.path.isdir(home) and os.access(home, os.X_OK))
    shut = [
        variable
        for variable, place in places().items()
        if not os.environ.get(variable) and not can_be_written(place)
    ]
    if not (homeless or shut):
        return
    if can_be_written(folder := stand_in()):
        folder.mkdir(mode=0o700, exist_ok=True)
    else:  # one that goes with this process
        folder = Path(tempfile.mkdtemp(prefix="workshop-home-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if homeless:
        os.environ["HOME"] = str(folder)
    os.environ.update({variable: str(folder / variable.lower()) for variable in shut})
    os.environ[MOVED] = str(folder)


def can_be_written(place: Path) -> bool:
    """Whether ``place`` is a directory that can be written to, or one that can be made."""
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)


if __name__ == "__main__":
    use_writable_places()
    os.execvp(sys.argv[1], sys.argv[1:])
