"""Do the byte ranges of the tensors fit the files, one another, and the tensors themselves? Sizes
of files are all that is read."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Chunk, Tensor
from workshop_utils.checkpoints.verify import layers, tiling
from workshop_utils.checkpoints.verify.report import Report

PACKED_SLACK = 4096
"""Most bytes that ``torch.save`` adds to the elements of one chunk; torch 2.13 adds 1.6 kB, and
aligns to 64 bytes."""

SHARING = (".ckpt", ".bin", ".pt", ".pth")
"""Ends of the names of files that ``torch.save`` wrote: tied weights share their bytes there."""


class Range(NamedTuple):
    """Bytes ``[start, end)`` of a file and what they hold: a chunk of a tensor, or an object that
    is none."""

    file: str
    start: int
    end: int
    name: str
    tensor: Tensor | None = None
    chunk: Chunk | None = None

    @property
    def holds(self) -> str:
        """With the layer."""
        return layers.place(self.tensor, self.chunk) if self.tensor else self.name


def ranges(tensors: Iterable[Tensor]) -> list[Range]:
    """The ranges of all chunks whose place is known."""
    return [
        Range(chunk.file, chunk.start, chunk.start + chunk.length, tensor.name, tensor, chunk)
        for tensor in tensors
        for chunk in tensor.chunks
        if chunk.length or not tensor.nbytes
    ]


def check_files(
    report: Report, sizes: Mapping[str, int], held: list[Range], data_starts: Mapping[str, int]
) -> None:
    """Every range lies in a file that is there (``sizes``), and no two overlap.

    ``data_starts`` are the files whose bytes from there on have to belong to exactly one tensor
    each, as safetensors demands.
    """
    by_file: dict[str, list[Range]] = {file: [] for file in data_starts}
    for part in sorted(held, key=lambda part: part[:3]):
        by_file.setdefault(part.file, []).append(part)
    for file, parts in sorted(by_file.items()):
        path = f"{report.where}/{file}"
        if file in sizes:
            _check_file(report, path, sizes[file], parts, data_starts.get(file))
            continue
        names = list(dict.fromkeys(part.name for part in parts))
        text = f"{path} is missing; it holds {some(names)}. Copy the checkpoint again, all of it."
        only = names[0] if len(names) == 1 else None
        report.damaged(text, only, Code.MISSING_FILE, file=path)
    report.checked.append(
        "every file that is named exists, is as long as its byte ranges need, and no two of them "
        "overlap"
    )


def _check_file(
    report: Report, file: str, size: int, parts: list[Range], data_start: int | None
) -> None:
    """``parts`` are sorted; with ``data_start`` no byte from there on may be left over."""
    last, end = None, data_start or 0
    for part in parts:
        if part.end > size:
            text = f"{file} has {size:,} bytes but {part.holds} ends at byte {part.end:,}: the file"
            text += " is cut off. Copy the checkpoint again."
            report.damaged(text, part.name, Code.CUT_OFF, file=file)
        if last and part.start < end and part.start < part.end:
            text = (
                f"{file}: the bytes of {part.holds} [{part.start:,}, {part.end:,}) overlap those "
                f"of {last.holds} [{last.start:,}, {last.end:,})."
            )
            if not file.endswith(SHARING):
                report.damaged(text, part.name, Code.OVERLAP, file=file)
            elif part[1:3] != last[1:3]:
                report.note(text, Code.OVERLAP, file=file)
        if data_start is not None and part.start > end:
            where = f"[{end:,}, {part.start:,}), before {part.holds},"
            text = f"{file}: bytes {where} belong to no tensor."
            report.damaged(text, part.name, Code.NOBODYS_BYTES, file=file)
        if part.end > end:
            last, end = part, part.end
    rest = size - end
    if rest > 0 and data_start is not None:
        text = f"{file}: the last {rest:,} bytes belong to no tensor."
        report.damaged(text, code=Code.NOBODYS_BYTES, file=file)
    elif rest > 0 and file.endswith(".distcp") and report.sound:
        text = f"{file} is {rest:,} bytes longer than what the index names."
        report.note(text, Code.NOBODYS_BYTES, file=file)


def check_chunks(report: Report, tensors: Iterable[Tensor]) -> None:
    """The chunks of each tensor cover it exactly once, and each has as many bytes as its elements
    need."""
    for tensor in tensors:
        if bad := tiling.faults(tensor):
            at = f": {bad[0]}"
            if layers.is_stacked(tensor.name) and tensor.shape:
                at = f", {layers.spans(range(*fault.part[0]) for fault in bad)}{at}"
            more = f" (and so on in {len(bad)} places)" if len(bad) > 1 else ""
            text = f"not whole is {tensor.name}{at} of {list(tensor.shape)}{more}."
            report.damaged(f"{report.where}: {text}", tensor.name, Code.NOT_WHOLE)
        for chunk in tensor.chunks if tensor.dtype in DTYPE_BYTES else ():
            needed = math.prod(chunk.shape) * DTYPE_BYTES[tensor.dtype]
            # Length 0 with elements: the reader could not tell where the bytes are.
            most = needed + PACKED_SLACK if tensor.packed else needed
            if chunk.length and not needed <= chunk.length <= most:
                file, little = f"{report.where}/{chunk.file}", " and a little" * tensor.packed
                text = (
                    f"{file}: {layers.place(tensor, chunk)} has {chunk.length:,} bytes; "
                    f"{list(chunk.shape)} of {tensor.dtype} needs {needed:,}{little}. Its shape or "
                    "dtype is wrong, or its place."
                )
                report.damaged(text, tensor.name, Code.LENGTH, file=file)
    report.checked.append("the chunks of every tensor cover its shape exactly once")
    report.checked.append("every chunk has as many bytes as its elements need")


def some(names: list[str]) -> str:
    """A list of names in words, cut when it is long."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
