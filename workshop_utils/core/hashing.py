"""Digests of a whole file, or of a bounded sample where weights are too large to read each time."""

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


def sha256_of_text(text: str) -> str:
    """Hex digest of ``text`` in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sampled(file: Path | bytes) -> str:
    """Hex digest of the size of a file, or of what is to be one, and of ``PIECES`` pieces spread
    evenly from its first byte to its last.

    Training changes whole tensors, so other weights of the same shape have another digest. A change
    between two pieces is not seen.
    """
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        if size <= PIECES * PIECE:
            digest.update(stream.read())
        else:
            for number in range(PIECES):
                stream.seek((size - PIECE) * number // (PIECES - 1))
                digest.update(stream.read(PIECE))
    return digest.hexdigest()


def of_contents(path: Path) -> dict[str, str]:
    """Name below ``path`` -> :func:`sampled` of each file there ("" for ``path`` itself, a file).
    Links count as files; what is not there has no entry; OSError for what cannot be read."""
    if path.is_file():
        return {"": sampled(path)}

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    walk = os.walk(path, onerror=fail)
    files = [Path(folder, name) for folder, _, names in walk for name in names]
    return {str(file.relative_to(path)): sampled(file) for file in sorted(files) if file.is_file()}
