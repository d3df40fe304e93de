"""A tensor of a checkpoint, in one vocabulary for every format: what it is, and which bytes of
which files hold it."""

import math
from dataclasses import dataclass

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element of each dtype that a checkpoint may hold."""
DTYPES = ("float32", "bfloat16", "float16")
"""What weights can be written in."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored piece of a tensor: where it begins in the tensor, its shape, and its bytes
    ``[start, start + length)`` of a file.

    ``file`` is relative to the directory of the weights, or the name of a member of the archive.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: ``dtype`` is a name such as ``bfloat16``, ``chunks`` are in the order of the
    index.

    The bytes of a chunk are the elements themselves (row-major, little-endian), or a small
    ``torch.save`` archive of them when ``packed``: ``length`` is then more than the bytes of the
    elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]
    packed: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements alone; 0 where the dtype is not known."""
        return self.elements * DTYPE_BYTES.get(self.dtype, 0)

    @property
    def files(self) -> list[str]:
        return sorted({chunk.file for chunk in self.chunks})


def whole(
    name: str, shape: tuple[int, ...], dtype: str, file: str, start: int, length: int
) -> Tensor:
    """A tensor that is stored in one piece of plain bytes."""
    return Tensor(name, shape, dtype, (Chunk((0,) * len(shape), shape, file, start, length),))
