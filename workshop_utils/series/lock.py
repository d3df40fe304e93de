"""The lock file, ``requirements.txt``, and the ``environment.yml`` that repeats it:
``python -m workshop_utils.series.lock`` (``make lock``) writes it anew."""

import re
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;#]+)")

_ENVIRONMENT = """\
# For conda, Binder and repo2docker. Written by "make lock" from requirements.txt, which is the source: do not edit.
name: nemo-lora-workshop
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - pip:
{pins}
"""  # noqa: E501


def lock_file() -> Path:
    """``requirements.txt``, of the repository or as it came with an installed package."""
    return paths.repository_file("requirements.txt")


def read_lock(file: Path) -> dict[str, str]:
    """Name (lower case, dashes) → version; WorkshopError for a line that is no pin, or a second."""
    pins: dict[str, str] = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        line, where = line.strip(), f"{paths.shown(file)}, line {number}"
        if not line or line.startswith("#"):
            continue
        pin = _PIN.fullmatch(line)
        if pin is None:
            raise WorkshopError(f"{where}: {line!r} is not a pin. Write it as name==version.")
        name = normalised(pin["name"])
        if name in pins:
            raise WorkshopError(f"{where}: {name} is pinned twice. Keep one of the lines.")
        pins[name] = pin["version"]
    return pins


def normalised(name: str) -> str:
    """The form in which two names of the same distribution are equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def environment_yaml(pins: dict[str, str]) -> str:
    """The text of ``environment.yml`` for these pins."""
    lines = "\n".join(f"      - {name}=={version}" for name, version in pins.items())
    return _ENVIRONMENT.format(pins=lines)


if __name__ == "__main__":
    target = paths.root() / "environment.yml"
    print("wrote", paths.shown(paths.write_text(target, environment_yaml(read_lock(lock_file())))))
