"""``.nemo`` archives (NeMo 1): a tar of ``model_config.yaml`` and ``model_weights.ckpt``, read in
place and never unpacked.

A tar can hold more than files: links and devices, names that lead out of the directory, one name
twice (so that two readers see two files). All of these are refused before anything is read. NeMo
itself puts ``./`` before every name and an entry for the directory ``./``; both spellings are
taken, and ``name`` below means the one without it.
"""

import contextlib
import functools
import gzip
import io
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from workshop_utils.checkpoints.formats import safe_text
from workshop_utils.core import paths
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint
from workshop_utils.core.paths import shown

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"

MAX_MEMBERS = 40_000
"""More are refused. A model sharded file by file has some ten thousand."""

MAX_NAME = 1000
"""Characters of a name with its directories."""

MAX_HEADER = 64 * 1024
"""Bytes of an extended header: names and times of one entry."""

MAX_RATIO = 100
FREE_INFLATED = 64 * 1024**2
MAX_INFLATED = 512 * 1024**3
"""What gzip may unpack to: so many times its size, or FREE_INFLATED bytes; never more than
MAX_INFLATED. Weights save a quarter."""

MAX_READ = 4 * 1024**3
"""Bytes that :func:`read_member` takes into memory."""


_BROKEN = (
    tarfile.TarError,
    ValueError,
    OverflowError,
    EOFError,
    OSError,
    zlib.error,
    RecursionError,  # a header before a header before a header...
)


@dataclass(frozen=True, slots=True)
class Member:
    """One file in the archive: its name without a leading ``./``, as it is stored, and its bytes
    ``[start, start + size)``."""

    name: str
    stored_name: str
    start: int
    size: int


def members(path: Path) -> list[Member]:
    """The files in the archive ``path``, in their order, once every entry has been found harmless.

    Raises :class:`NotACheckpoint` (no tar), :class:`UnsafeCheckpoint` (links, devices, duplicates,
    names that lead out, a compression bomb) and :class:`DamagedCheckpoint` (cut off, too many
    entries). ``start`` counts in the tar; see :func:`is_compressed`.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a .nemo file" if path.is_dir() else "does not exist"
        raise NotACheckpoint(f"{shown(path)} {what}.")
    status = path.stat()
    return list(_members(path, (status.st_ino, status.st_size, status.st_mtime_ns)))


@functools.lru_cache(maxsize=2)
def _members(path: Path, version: tuple[int, ...]) -> tuple[Member, ...]:
    """As :func:`members`; what one command asks for several times is unpacked and checked once for
    each ``version`` of the file."""
    names: set[str] = set()
    files: list[Member] = []
    try:
        with _open(path) as file:
            for entry in _entries(path, file):
                member = _checked(path, entry)
                # As a file system would see it that ignores case and the way in which accents are
                # written.
                name = unicodedata.normalize("NFC", member.name).casefold()
                if name in names:
                    raise UnsafeCheckpoint(
                        f"{shown(path)} holds {member.name!r} twice: two readers may see two "
                        "different files."
                    )
                names.add(name)
                if entry.isfile():
                    if member.size:
                        file.seek(member.start + member.size - 1)
                        if not file.read(1):
                            raise DamagedCheckpoint(
                                f"{shown(path)} is cut off inside {member.name!r}. Copy it again."
                            )
                    files.append(member)
                if len(names) > MAX_MEMBERS:
                    raise DamagedCheckpoint(f"{shown(path)} has more than {MAX_MEMBERS:,} entries.")
    except _Sparse:
        raise UnsafeCheckpoint(
            f"{shown(path)} has a sparse entry; a .nemo holds only plain files. Nothing was read."
        ) from None
    except _BROKEN as error:
        if names:
            raise DamagedCheckpoint(
                f"{shown(path)} is damaged after its first {len(names)} entries: {error}. Copy "
                "it again."
            ) from error
        raise NotACheckpoint(f"{shown(path)} is not a .nemo archive (a tar): {error}") from error
    if not files:
        raise NotACheckpoint(f"{shown(path)} is an empty archive.")
    return tuple(files)


def read_config(path: Path) -> dict[str, Any]:
    """``model_config.yaml`` of the archive. Errors as :func:`members`; tags that name Python
    objects are refused."""
    return safe_text.parse_yaml(
        read_member(path, CONFIG, safe_text.MAX_BYTES), f"{shown(path)}:{CONFIG}"
    )


def read_member(path: Path, name: str, max_bytes: int = MAX_READ) -> bytes:
    """The bytes of the file ``name``. Errors as :func:`members`, and :class:`DamagedCheckpoint` if
    it is missing or too large."""
    with open_member(path, name) as file:
        size = file.seek(0, io.SEEK_END)
        if size > max_bytes:
            raise DamagedCheckpoint(
                f"{shown(path)}: {name} has {size:,} bytes; at most {max_bytes:,} are read."
            )
        file.seek(0)
        return file.read()


@contextlib.contextmanager
def open_member(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The file ``name`` of the archive, open for reading; nothing is unpacked to disk. Errors as
    :func:`read_member`.

    In an archive compressed with gzip each step back reads the archive from its start again.
    """
    member = next((member for member in members(path) if member.name == name), None)
    if member is None:
        raise DamagedCheckpoint(f"{shown(path)} has no {name}.")
    entry = tarfile.TarInfo(name)
    entry.offset_data, entry.size = member.start, member.size
    with _open(Path(path)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        yield archive.extractfile(entry)


def is_compressed(path: Path) -> bool:
    """Whether ``path`` is compressed with gzip, as NeMo before 1.7 wrote it: offsets of members are
    then none of the file."""
    with Path(path).open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def write(target: Path, config: dict[str, Any], weights: bytes) -> Path:
    """Write a plain ``.nemo`` of exactly ``model_config.yaml`` and ``model_weights.ckpt``, all or
    nothing, and return its path.

    ``weights`` is what ``torch.save`` wrote. The same arguments always give the same bytes: no
    times, no user names.
    """
    text = yaml.safe_dump(config, sort_keys=False).encode()
    with (
        paths.new_file(Path(target)) as part,
        tarfile.open(part, "w:", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, content in ((CONFIG, text), (WEIGHTS, weights)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return Path(target)


class _Inflated(gzip.GzipFile):
    """A gzip file that is refused where it grows beyond what a checkpoint compresses to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._limit = min(MAX_INFLATED, max(FREE_INFLATED, MAX_RATIO * path.stat().st_size))
        self._where = shown(path)

    def _check(self, end: int) -> None:
        if end > self._limit:
            raise UnsafeCheckpoint(
                f"{self._where} is a compression bomb: it unpacks to more than {self._limit:,} "
                "bytes. Nothing was unpacked to disk."
            )

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check(offset)
        return super().seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        self._check(self.tell() + max(size or 0, 0))
        return super().read(size)


class _Sparse(Exception):
    """An entry whose bytes do not lie one after the other."""


class _Entry(tarfile.TarInfo):
    """A header as tarfile reads it, but for what takes memory by the file's word or hides where an
    entry's bytes lie."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header has {self.size:,} bytes")
        return super()._proc_member(archive)

    def _proc_pax(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # Up to Python 3.11.9 tarfile looks for "hdrcharset" from each digit of a run of digits anew
        # (CVE-2024-6232): a header of 64 KB takes a minute.
        place = archive.fileobj.tell()
        header = archive.fileobj.read(self._block(self.size))
        archive.fileobj.seek(place)
        if _MANY_DIGITS.search(header):
            raise tarfile.ReadError("a header has a number without end")
        return super()._proc_pax(archive)

    def _refuse(self, *arguments: Any) -> None:
        raise _Sparse

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_sparse = _refuse


_MANY_DIGITS = re.compile(rb"\d{256}")
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE)
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _open(path: Path) -> IO[bytes]:
    return _Inflated(path) if is_compressed(path) else path.open("rb")


def _entries(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar, none of which is looked up by tarfile."""
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Entry) as archive:
        for entry in archive:
            # Before the next one, which would be looked for at a place before this one.
            if not 0 <= entry.size < 2**60:
                raise tarfile.ReadError(f"an entry has {entry.size:,} bytes")
            if archive.pax_headers:
                raise UnsafeCheckpoint(
                    f"{shown(path)} changes {', '.join(archive.pax_headers)} for all its entries. "
                    "Nothing was read."
                )
            if "linkpath" in entry.pax_headers or entry.pax_headers.get("hdrcharset") == "BINARY":
                raise UnsafeCheckpoint(
                    f"{shown(path)} has an entry with a link or a character set of its own; a "
                    ".nemo holds only plain files. Nothing was read."
                )
            if not entry.isfile() and entry.size:
                raise UnsafeCheckpoint(
                    f"{shown(path)}: {entry.name!r} is no file but has {entry.size:,} bytes. "
                    "Nothing was read."
                )
            yield entry
        # tarfile ends without a word at a damaged header, and where the end is missing.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut off, or a header is damaged")


def _checked(path: Path, entry: tarfile.TarInfo) -> Member:
    name = entry.name
    if len(name) > MAX_NAME:
        raise DamagedCheckpoint(
            f"{shown(path)} has an entry whose name has {len(name):,} characters."
        )
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
        raise UnsafeCheckpoint(
            f"{shown(path)} holds {name!r}, which leads out of the directory it is unpacked in. "
            "Nothing was read."
        )
    if entry.type not in _PLAIN:
        kind = "a link" if entry.issym() or entry.islnk() else "neither a file nor a directory"
        raise UnsafeCheckpoint(
            f"{shown(path)}: {name!r} is {kind}; a .nemo holds only files. Nothing was read."
        )
    return Member("/".join(parts) or ".", name, entry.offset_data, entry.size)
