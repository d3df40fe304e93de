"""Write a tar member by member, the size of a member being known only after its last byte: nothing
is put together on disk first."""

import contextlib
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

BLOCK = tarfile.BLOCKSIZE


class ArchiveWriter:
    """A new plain tar with names as NeMo writes them (``./NAME``), without times and user names. A
    context manager."""

    def __init__(self, path: Path) -> None:
        self._archive = tarfile.open(path, "w:", format=tarfile.GNU_FORMAT)  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def add(self, name: str, file: Path) -> None:
        with file.open("rb") as opened, self.member(name) as written:
            shutil.copyfileobj(opened, written)

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write the content of the member ``name`` to; ``tell`` counts from its first
        byte."""
        file, start = self._archive.fileobj, self._archive.offset
        file.write(bytes(BLOCK))  # the header, once the size is known
        written = _Member(file)
        yield written
        entry = tarfile.TarInfo(f"./{name}")
        entry.size, entry.mode = written.tell(), 0o644
        header = entry.tobuf(tarfile.GNU_FORMAT)
        if len(header) != BLOCK:
            raise ValueError(f"the name {name!r} is too long for one block")
        file.write(bytes(-entry.size % BLOCK))
        self._archive.offset = file.tell()
        file.seek(start)
        file.write(header)
        # tarfile goes on, and ends the archive, where the file is.
        file.seek(self._archive.offset)


class _Member:
    """The part of a file that begins where it is now."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()

    def write(self, content: bytes) -> int:
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def flush(self) -> None:
        self._file.flush()
