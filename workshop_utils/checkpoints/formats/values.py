"""Read the values of one tensor, or of one layer, and nothing else of a checkpoint; without torch.

A chunk of a torch_dist file is a small ``torch.save`` archive, a zip whose only entry of any size
is the tensor's elements (``torch/distributed/checkpoint/filesystem.py``, torch 2.13). Everything
else stores the elements as they are.
"""

import contextlib
import io
import math
import zipfile
from typing import IO, TYPE_CHECKING

from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.summary import Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Chunk, Tensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    import numpy


def open_part(checkpoint: Checkpoint, file: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """The file of ``checkpoint`` that a chunk names, open for reading where it lies."""
    if checkpoint.kind in (Kind.NEMO1_ARCHIVE, Kind.NEMO1_ARCHIVE_ADAPTER):
        return nemo_archive.open_member(checkpoint.path, file)
    path = checkpoint.path
    return (path if path.is_file() else path / checkpoint.folder / file).open("rb")


def read_tensor(
    checkpoint: Checkpoint, tensor: Tensor, layer: int | None = None
) -> "numpy.ndarray":
    """The values of ``tensor``, of its shape, or of one ``layer`` of a stacked tensor, of its shape
    without the first axis.

    Only the chunks that hold what was asked for are read. Raises :class:`DamagedCheckpoint` (a
    chunk is broken or missing) and :class:`UnsupportedCheckpoint` (a quantised dtype).
    """
    import numpy

    chosen = tensor.chunks
    if layer is not None:
        chosen = [c for c in chosen if c.offsets[0] <= layer < c.offsets[0] + c.shape[0]]
    values = numpy.empty(tensor.shape if layer is None else (1, *tensor.shape[1:]), dtype(tensor))
    if sum(math.prod(chunk.shape) for chunk in chosen) < values.size:
        raise DamagedCheckpoint(
            f"{shown(checkpoint.path)}: the chunks of {tensor.name} do not cover it.", tensor.name
        )
    for chunk in chosen:
        piece = read_chunk(checkpoint, tensor, chunk)
        pairs = zip(chunk.offsets, chunk.shape, strict=True)
        place = tuple(slice(start, start + size) for start, size in pairs)
        if layer is not None:
            piece = piece[layer - chunk.offsets[0]][None]
            place = (slice(0, 1), *place[1:])
        values[place] = piece
    return values if layer is None else values[0]


def read_chunk(checkpoint: Checkpoint, tensor: Tensor, chunk: Chunk) -> "numpy.ndarray":
    """The values of one ``chunk`` of ``tensor``, of the chunk's shape; errors as
    :func:`read_tensor`."""
    with open_part(checkpoint, chunk.file) as file:
        file.seek(chunk.start)
        content = file.read(chunk.length)
    return parse_chunk(content, tensor, chunk, f"{shown(checkpoint.path)}: {chunk.file}")


def parse_chunk(content: bytes, tensor: Tensor, chunk: Chunk, where: str) -> "numpy.ndarray":
    """The values in ``content``, the bytes of ``chunk``; ``where`` names their file in errors."""
    import numpy

    needed = math.prod(chunk.shape) * DTYPE_BYTES.get(tensor.dtype, 0)
    if tensor.packed:
        content = _elements(content, needed, tensor, where)
    if len(content) != needed:
        raise DamagedCheckpoint(
            f"{where} has {len(content):,} bytes for {tensor.name} at {chunk.offsets}; its shape "
            f"needs {needed:,}.",
            tensor.name,
        )
    return numpy.frombuffer(content, dtype(tensor)).reshape(chunk.shape)


def dtype(tensor: Tensor) -> "numpy.dtype":
    """numpy's dtype for ``tensor``; ml_dtypes has those that numpy lacks. Raises
    :class:`UnsupportedCheckpoint` for quantised ones."""
    import ml_dtypes
    import numpy

    if tensor.dtype not in DTYPE_BYTES:
        raise UnsupportedCheckpoint(
            f"{tensor.name} is stored as {tensor.dtype}, whose values are not read here.",
            tensor.name,
        )
    return numpy.dtype(getattr(ml_dtypes, tensor.dtype, tensor.dtype))


def _elements(content: bytes, needed: int, tensor: Tensor, where: str) -> bytes:
    """The elements in the ``torch.save`` archive ``content``."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            stored = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
            sound = [e for e in stored if e.compress_type == zipfile.ZIP_STORED]
            if len(stored) != 1 or not sound or sound[0].file_size != needed:
                raise DamagedCheckpoint(
                    f"{where}: {tensor.name} has no {needed:,} bytes of elements where the index "
                    "says.",
                    tensor.name,
                )
            return archive.read(stored[0])
    # NotImplementedError is a RuntimeError; ValueError: a place before the start of the bytes.
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        raise DamagedCheckpoint(
            f"{where}: the bytes of {tensor.name} are damaged: {error}", tensor.name
        ) from error
