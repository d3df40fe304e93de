"""Digests that tell one file from another: of the whole, or of a bounded sample where weights are too large to read each time."""

import hashlib
from pathlib import Path

PIECES = 16
PIECE = 1 << 16
"""Bytes of one piece. A file of up to ``PIECES * PIECE`` bytes (1 MiB) is hashed whole."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled(path: Path) -> str:
    """Hex digest of a file's size and of ``PIECES`` pieces spread evenly from its first byte to its last.

    Training changes nearly every byte of every weight, so other weights of the same shape have another digest. A change of a few bytes
    between two pieces is not seen.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= PIECES * PIECE:
            found.update(stream.read())
        else:
            for number in range(PIECES):
                stream.seek((size - PIECE) * number // (PIECES - 1))
                found.update(stream.read(PIECE))
    return found.hexdigest()


def of_contents(path: Path) -> dict[str, str]:
    """:func:`sampled` of the file ``path``, or of each file in the directory ``path`` by its name below it, wherever ``path`` lies. Links count
    as the files that they lead to; what is not there has no entry.
    """
    if path.is_file():
        return {"": sampled(path)}
    return {str(file.relative_to(path)): sampled(file) for file in sorted(path.rglob("*")) if file.is_file()}
