"""A manifest: size and sha256 of every file of a checkpoint, taken while it was whole.

No format of this world says which save a file comes from: two files of the same size, one of them
from another save, look alike to every reader. A manifest that was written after the save is the
proof that nothing was exchanged since.

    {"format": "workshop manifest", "version": 1, "checkpoint": "NAME", "files":
    {"weights/__0_0.distcp": {"bytes": 1, "sha256": "..."}}}
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.core import paths
from workshop_utils.core.errors import DamagedCheckpoint
from workshop_utils.core.paths import shown
from workshop_utils.core.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

_FORMAT = {"format": "workshop manifest", "version": 1}
_BLOCK = 4 * 1024**2


@dataclass
class Differences:
    """How the files differ from a manifest; names are relative to the checkpoint."""

    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.new)


def default_path(checkpoint: Path) -> Path:
    """``NAME.manifest.json`` beside the checkpoint."""
    here = Path(os.path.abspath(checkpoint))
    return here.with_name(f"{here.name}.manifest.json")


def write(checkpoint: Path, target: Path | None = None, progress: bool = False) -> Path:
    """Write the manifest of the file or directory ``checkpoint``, all or nothing, and return its
    path.

    Every byte of the checkpoint is read. Links count as what they lead to.
    """
    target = Path(target) if target else default_path(checkpoint)
    files = _files(checkpoint, target)
    name = Path(os.path.abspath(checkpoint)).name
    with _bar(sum(file.stat().st_size for file in files.values()), progress) as bar:
        entries = {
            name: {"bytes": file.stat().st_size, "sha256": _sha256(file, bar)}
            for name, file in files.items()
        }
    content = _FORMAT | {"checkpoint": name, "files": entries}
    return paths.write_text(target, json.dumps(content, indent=1) + "\n")


def compare(checkpoint: Path, manifest: Path, progress: bool = False) -> Differences:
    """How the file or directory ``checkpoint`` differs from ``manifest``. A file of another size is
    not read.

    Raises :class:`DamagedCheckpoint` when ``manifest`` is missing or no manifest.
    """
    expected = _read(Path(manifest))
    files = _files(checkpoint, Path(manifest))
    both = sorted(files.keys() & expected.keys())
    same_size = [name for name in both if files[name].stat().st_size == expected[name]["bytes"]]
    with _bar(sum(expected[name]["bytes"] for name in same_size), progress) as bar:
        same = {name for name in same_size if _sha256(files[name], bar) == expected[name]["sha256"]}
    return Differences(
        changed=[name for name in both if name not in same],
        missing=sorted(expected.keys() - files.keys()),
        new=sorted(files.keys() - expected.keys()),
    )


def _read(manifest: Path) -> dict[str, dict[str, Any]]:
    content = read_json(manifest)
    files = content.get("files")
    known = all(content.get(key) == value for key, value in _FORMAT.items())
    if not known or not isinstance(files, dict) or not files:
        raise DamagedCheckpoint(
            f"{shown(manifest)} is no manifest of version 1: `workshop verify PATH "
            "--write-manifest` writes one."
        )
    for name, entry in files.items():
        sizes = entry if isinstance(entry, dict) else {}
        if type(sizes.get("bytes")) is not int or not isinstance(sizes.get("sha256"), str):
            raise DamagedCheckpoint(
                f"{shown(manifest)}: the entry {name!r} has no bytes and sha256."
            )
    return files


def _files(checkpoint: Path, manifest: Path) -> dict[str, Path]:
    """Name in the manifest -> file, sorted; the manifest itself is left out. A single file goes by
    its own name."""
    checkpoint = Path(checkpoint)
    if checkpoint.is_file():
        return {checkpoint.name: checkpoint}
    files, seen = {}, set()
    for folder, folders, names in os.walk(checkpoint, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            # A link to a folder above: never ends otherwise.
            folders.clear()
            continue
        seen.add(real)
        for file in (Path(folder, name) for name in names):
            if file.is_file() and not (manifest.exists() and file.samefile(manifest)):
                files[file.relative_to(checkpoint).as_posix()] = file
    return dict(sorted(files.items()))


def _sha256(file: Path, bar: "tqdm") -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        raise DamagedCheckpoint(f"{shown(file)} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _bar(total: int, progress: bool) -> "tqdm":
    return progress_bar(total=total, unit="B", unit_scale=True, desc="sha256", shown=progress)
