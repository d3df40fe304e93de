"""Digests that tell one file from another: of the whole, or of a bounded sample where weights are too large to read each time."""

import hashlib
from collections.abc import Iterable
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


def of_files(files: Iterable[Path], root: Path) -> dict[str, str]:
    """:func:`sampled` of each of ``files``, by its name below ``root``; links count as the files that they lead to."""
    return {str(file.relative_to(root)): sampled(file) for file in files}
