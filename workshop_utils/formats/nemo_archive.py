"""``.nemo`` archives (NeMo 1): a tar of ``model_config.yaml`` and ``model_weights.ckpt``, read in place and never unpacked.

A tar can hold more than files: links and devices, names that lead out of the directory, one name twice (so that two readers see
two files). All of these are refused before anything is read. NeMo itself puts ``./`` before every name and an entry for the
directory ``./``; both spellings are taken, and ``name`` below means the one without it.
"""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import yaml

from workshop_utils import paths
from workshop_utils.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.formats import safe_text
from workshop_utils.paths import shown

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"

MAX_MEMBERS = 200_000
"""More are refused. A model sharded file by file has some ten thousand."""

MAX_READ = 4 * 1024**3
"""Bytes that :func:`read_member` takes into memory."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in the archive: its name without a leading ``./``, as it is stored, and its bytes ``[start, start + size)``."""

    name: str
    stored_name: str
    start: int
    size: int


def members(path: Path) -> list[Member]:
    """The files in the archive ``path``, in their order, once every entry has been found harmless.

    Raises :class:`NotACheckpoint` (no tar), :class:`UnsupportedCheckpoint` (gzip), :class:`UnsafeCheckpoint` (links, devices,
    duplicates, names that lead out) and :class:`DamagedCheckpoint` (cut off, too many entries).
    """
    path = Path(path)
    _check_kind(path)
    length = path.stat().st_size
    names: set[str] = set()
    files: list[Member] = []
    try:
        with tarfile.open(path, "r:") as archive:
            end = -1
            # Not getmembers(): an entry with a negative size would make it read the same entries for ever.
            while (entry := archive.next()) is not None:
                if entry.offset <= end or entry.size < 0 or len(names) == MAX_MEMBERS:
                    raise DamagedCheckpoint(f"{shown(path)}: the entries overlap or are more than {MAX_MEMBERS:,}.")
                end = entry.offset
                member = _checked(path, entry)
                if member.name in names:
                    raise UnsafeCheckpoint(f"{shown(path)} holds {member.name!r} twice: two readers may see two different files.")
                names.add(member.name)
                if entry.isfile():
                    if member.start + member.size > length:
                        raise DamagedCheckpoint(f"{shown(path)} is cut off inside {member.name!r}. Copy it again.")
                    files.append(member)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        if names:
            raise DamagedCheckpoint(f"{shown(path)} is damaged after its first {len(names)} entries: {error}. Copy it again.") from error
        raise NotACheckpoint(f"{shown(path)} is not a .nemo archive (a tar): {error}") from error
    if not files:
        raise NotACheckpoint(f"{shown(path)} is an empty archive.")
    return files


def member_names(path: Path) -> list[str]:
    """Names of the files in the archive, as they are stored; errors as :func:`members`."""
    return [member.stored_name for member in members(path)]


def read_config(path: Path) -> dict[str, Any]:
    """``model_config.yaml`` of the archive. Errors as :func:`members`; tags that name Python objects are refused."""
    return safe_text.parse_yaml(read_member(path, CONFIG, safe_text.MAX_BYTES), f"{shown(path)}:{CONFIG}")


def read_member(path: Path, name: str, max_bytes: int = MAX_READ) -> bytes:
    """The bytes of the file ``name``. Errors as :func:`members`, and :class:`DamagedCheckpoint` if it is missing or too large."""
    with open_member(path, name) as file:
        size = file.seek(0, io.SEEK_END)
        if size > max_bytes:
            raise DamagedCheckpoint(f"{shown(path)}: {name} has {size:,} bytes; at most {max_bytes:,} are read.")
        file.seek(0)
        return file.read()


@contextlib.contextmanager
def open_member(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The file ``name`` of the archive, open for reading; nothing is unpacked. Errors as :func:`read_member`."""
    wanted = next((member for member in members(path) if member.name == name), None)
    if wanted is None:
        raise DamagedCheckpoint(f"{shown(path)} has no {name}.")
    with tarfile.open(path, "r:") as archive:
        # members() has seen that this name is there once, as a regular file.
        yield archive.extractfile(wanted.stored_name)


def write(target: Path, config: dict[str, Any], weights: bytes) -> Path:
    """Write a plain ``.nemo`` of exactly ``model_config.yaml`` and ``model_weights.ckpt``, all or nothing, and return its path.

    ``weights`` is what ``torch.save`` wrote. The same arguments always give the same bytes: no times, no user names.
    """
    text = yaml.safe_dump(config, sort_keys=False).encode()
    with paths.new_file(Path(target)) as part, tarfile.open(part, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in ((CONFIG, text), (WEIGHTS, weights)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return Path(target)


def _check_kind(path: Path) -> None:
    if not path.is_file():
        what = "is a directory, not a .nemo file" if path.is_dir() else "does not exist"
        raise NotACheckpoint(f"{shown(path)} {what}.")
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        raise UnsupportedCheckpoint(
            f"{shown(path)} is compressed with gzip, as NeMo before 1.7 wrote it. Unpack that layer: gzip -dc < {path.name} > NEW.nemo"
        )


def _checked(path: Path, entry: tarfile.TarInfo) -> Member:
    name = entry.name
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise UnsafeCheckpoint(f"{shown(path)} holds {name!r}, which leads out of the directory it is unpacked in. Nothing was read.")
    if entry.issparse() or not (entry.isfile() or entry.isdir()):
        kind = "a link" if entry.issym() or entry.islnk() else "neither a file nor a directory"
        raise UnsafeCheckpoint(f"{shown(path)}: {name!r} is {kind}; a .nemo holds only files. Nothing was read.")
    return Member("/".join(parts) or ".", name, entry.offset_data, entry.size)
