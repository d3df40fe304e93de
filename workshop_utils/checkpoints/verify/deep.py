"""Read every value of a checkpoint once: is each chunk what the index says it is, and is every
number finite?"""

import dataclasses
import io
import itertools
import zlib
from typing import TYPE_CHECKING

from workshop_utils.checkpoints.formats import torch_archive, values
from workshop_utils.checkpoints.formats.findings import Code, Finding
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.tensor import Chunk, Tensor
from workshop_utils.checkpoints.verify import layers
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core.errors import CheckpointError, UnsupportedCheckpoint
from workshop_utils.core.paths import shown
from workshop_utils.core.progress import progress_bar

if TYPE_CHECKING:
    import numpy

_BLOCK = 1 << 20


def check(
    report: Report, checkpoint: Checkpoint, tensors: list[Tensor], progress: bool = False
) -> None:
    """Read the chunks of ``tensors`` file by file; memory stays near twice the largest chunk."""
    work = [(tensor, chunk) for tensor in tensors for chunk in tensor.chunks if chunk.length]
    work.sort(key=lambda item: (item[1].file, item[1].start))
    total = sum(chunk.length for _, chunk in work)
    unread: set[str] = set()
    options = {"unit": "B", "unit_scale": True, "desc": "verify --deep", "shown": progress}
    with progress_bar(total=total, **options) as bar:
        for file, held in itertools.groupby(work, key=lambda item: item[1].file):
            where = f"{shown(checkpoint.path)}: {file}"
            try:
                with values.open_part(checkpoint, file) as part:
                    for tensor, chunk in held:
                        part.seek(chunk.start)
                        content = part.read(chunk.length)
                        try:
                            _check_chunk(report, where, content, tensor, chunk)
                        except UnsupportedCheckpoint:
                            unread.add(tensor.dtype)
                        bar.update(chunk.length)
            except (OSError, EOFError, zlib.error) as error:
                report.damaged(f"{where} cannot be read: {error}.", file=file)
            except CheckpointError as error:
                report.add(error)
    report.checked.append(
        f"every one of {total:,} bytes of weights was read: each chunk is what the index says, "
        "and every number is finite"
    )
    if unread:
        kinds = ", ".join(sorted(unread))
        report.unknown(f"whether the values of quantised tensors ({kinds}) make sense", Code.VALUES)
    hidden = [t for t in tensors if t.nbytes and not any(chunk.length for chunk in t.chunks)]
    if hidden:
        text = f"whether the values of {len(hidden)} tensors are finite"
        report.unknown(f"{text}: their bytes could not be told", Code.VALUES)


def _check_chunk(report: Report, where: str, content: bytes, tensor: Tensor, chunk: Chunk) -> None:
    """Raises :class:`UnsupportedCheckpoint` for a dtype whose values cannot be read."""
    place = layers.place(tensor, chunk)
    try:
        # The archive of a chunk states dtype and shape itself: they have to be those of the index.
        if tensor.packed:
            saved = torch_archive.read_state(io.BytesIO(content), f"{where}, {place}")
            text = ""
            if not isinstance(saved, torch_archive.SavedTensor):
                text = f"a {type(saved).__name__}, not a tensor"
            elif (saved.dtype, saved.shape) != (tensor.dtype, chunk.shape):
                text = (
                    f"{list(saved.shape)} of {saved.dtype}, but the index says "
                    f"{list(chunk.shape)} of {tensor.dtype}. The file may be from another save"
                )
            if text:
                text = f"{where}: {place} holds {text}."
                report.damaged(text, tensor.name, Code.CONTENT, file=chunk.file)
        numbers = values.parse_chunk(content, tensor, chunk, where)
    except UnsupportedCheckpoint:
        raise
    except CheckpointError as error:
        # Readers of archives do not know which tensor theirs is.
        finding = Finding.of(error)
        report.keep(dataclasses.replace(finding, tensor=error.tensor or tensor.name))
    else:
        _check_finite(report, where, numbers, tensor, chunk)


def _check_finite(
    report: Report, where: str, numbers: "numpy.ndarray", tensor: Tensor, chunk: Chunk
) -> None:
    import numpy

    if numbers.dtype.kind in "iub":
        return
    flat = numbers.reshape(-1)
    # In blocks: the answer for all numbers at once would take a quarter more memory.
    bad, first = 0, None
    for start in range(0, flat.size, _BLOCK):
        finite = numpy.isfinite(flat[start : start + _BLOCK])
        if not finite.all():
            bad += int(finite.size - finite.sum())
            first = start + int(finite.argmin()) if first is None else first
    if first is None:
        return
    inside = numpy.unravel_index(first, numbers.shape)
    place = [int(at) + offset for at, offset in zip(inside, chunk.offsets, strict=True)]
    report.damaged(
        f"{where}: {layers.place(tensor, chunk)} has {bad:,} values of {flat.size:,} in this "
        f"chunk that are not finite; the first is {flat[first]} at {place}. The training "
        "diverged, or the file is damaged.",
        tensor.name,
        Code.NOT_FINITE,
        file=chunk.file,
    )
