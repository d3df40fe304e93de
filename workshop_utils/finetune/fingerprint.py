"""Digests that tell one file from another: whole for rows and adapters, a bounded sample of large weights."""

import hashlib
from collections.abc import Iterator
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


def of_base(base: Path) -> dict[str, str]:
    """Digest of each file that a base is loaded from, by name; links count as the files that they lead to. ``base`` is a ``.nemo`` or a
    directory with ``model_config.yaml`` and ``model_weights/``.
    """
    return {str(file.relative_to(base.parent)): sampled(file) for file in _files(base)}


def _files(base: Path) -> Iterator[Path]:
    if base.is_file():
        yield base
        return
    yield base / "model_config.yaml"
    yield from sorted(file for file in (base / "model_weights").rglob("*") if file.is_file())
