"""Digests that tell one file from another: of the whole, or of a bounded sample where weights are
too large to read each time."""

import hashlib
import io
import os
from pathlib import Path

PIECES = 256
PIECE = 1 << 14
"""Bytes of one piece. A file of up to ``PIECES * PIECE`` bytes (4 MiB) is hashed whole."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled(file: Path | bytes) -> str:
    """Hex digest of the size of a file, or of what is to be one, and of ``PIECES`` pieces spread
    evenly from its first byte to its last.

    Training changes whole tensors, so other weights of the same shape have another digest. A change
    between two pieces is not seen.
    """
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        if size <= PIECES * PIECE:
            found.update(stream.read())
        else:
            for number in range(PIECES):
                stream.seek((size - PIECE) * number // (PIECES - 1))
                found.update(stream.read(PIECE))
    return found.hexdigest()


def of_contents(path: Path) -> dict[str, str]:
    """:func:`sampled` of the file ``path``, or of each file in the directory ``path`` by its name
    below it, wherever ``path`` lies. Links to files count as the files; what is not there has no
    entry. Raises OSError for what cannot be read.
    """
    if path.is_file():
        return {"": sampled(path)}
    files = [
        Path(folder, name) for folder, _, names in os.walk(path, onerror=_fail) for name in names
    ]
    return {str(file.relative_to(path)): sampled(file) for file in sorted(files) if file.is_file()}


def _fail(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
