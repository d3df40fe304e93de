"""Do the byte ranges of the tensors fit the files, one another, and the tensors themselves? Sizes
of files are all that is read."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Chunk, Tensor
from workshop_utils.checkpoints.verify import layers, tiling
from workshop_utils.checkpoints.verify.report import Report

PACKED_SLACK = 4096
"""Most bytes that ``torch.save`` adds to the elements of one chunk; torch 2.13 adds 1.6 kB, and
aligns to 64 bytes."""

SHARING = (".ckpt", ".bin", ".pt", ".pth")
"""Ends of the names of files that ``torch.save`` wrote."""


class Range(NamedTuple):
    """Bytes ``[start, start + length)`` of a file and what they hold: a chunk of a tensor, or an
    object that is none."""

    file: str
    start: int
    length: int
    name: str
    tensor: Tensor | None = None
    chunk: Chunk | None = None

    @property
    def holds(self) -> str:
        """What they hold, with the layer."""
        return layers.place(self.tensor, self.chunk) if self.tensor and self.chunk else self.name


def ranges(tensors: Iterable[Tensor]) -> list[Range]:
    """The ranges of all chunks whose place is known."""
    return [
        Range(chunk.file, chunk.start, chunk.length, tensor.name, tensor, chunk)
        for tensor in tensors
        for chunk in tensor.chunks
        if chunk.length or not tensor.nbytes
    ]


def check_files(
    report: Report,
    where: str,
    sizes: Mapping[str, int],
    found: Iterable[Range],
    data_starts: Mapping[str, int] | None = None,
) -> None:
    """Every range lies in a file that is there, and no two overlap. ``where`` is the directory or
    archive of the files ``sizes``.

    ``data_starts`` are the files whose bytes from there on have to belong to exactly one tensor
    each, as safetensors demands. Tensors in what ``torch.save`` wrote may share their bytes, as
    tied weights do.
    """
    by_file: dict[str, list[Range]] = {}
    for one in found:
        by_file.setdefault(one.file, []).append(one)
    for file, held in sorted(by_file.items()):
        held.sort(key=lambda one: (one.start, one.length))
        if file not in sizes:
            names = list(dict.fromkeys(one.name for one in held))
            only = names[0] if len(names) == 1 else None
            report.damaged(
                f"{where}/{file} is missing; it holds {some(names)}. Copy the checkpoint again, "
                "all of it.",
                only,
            )
            continue
        _check_ends(report, f"{where}/{file}", sizes[file], held)
        _check_neighbours(
            report, f"{where}/{file}", held, (data_starts or {}).get(file), file.endswith(SHARING)
        )
    for file, start in (data_starts or {}).items():
        end = max((one.start + one.length for one in by_file.get(file, ())), default=start)
        if end < sizes.get(file, 0):
            report.damaged(
                f"{where}/{file}: the last {sizes[file] - end:,} bytes belong to no tensor."
            )
    report.checked.append(
        "every file that is named exists, is as long as its byte ranges need, and no two of them "
        "overlap"
    )


def _check_ends(report: Report, file: str, size: int, held: list[Range]) -> None:
    for one in held:
        if one.start + one.length > size:
            end = one.start + one.length
            report.damaged(
                f"{file} has {size:,} bytes but {one.holds} ends at byte {end:,}: the file is "
                "cut off. Copy the checkpoint again.",
                one.name,
            )
    end = max(one.start + one.length for one in held)
    if end < size and file.endswith(".distcp") and report.sound:
        report.note(f"{file} is {size - end:,} bytes longer than what the index names.")


def _check_neighbours(
    report: Report, file: str, held: list[Range], data_start: int | None, sharing: bool
) -> None:
    """``held`` are the ranges of one file, sorted; with ``data_start`` no byte between them may be
    left over."""
    last, end = None, data_start or 0
    for one in held:
        stop = one.start + one.length
        if last and one.start < end and one.length:
            text = (
                f"{file}: the bytes of {one.holds} [{one.start:,}, {stop:,}) overlap those of "
                f"{last.holds} [{last.start:,}, {last.start + last.length:,})."
            )
            if not sharing:
                report.damaged(text, one.name)
            elif (one.start, one.length) != (last.start, last.length):
                report.note(text)
        if data_start is not None and one.start > end:
            report.damaged(
                f"{file}: bytes [{end:,}, {one.start:,}), before {one.holds}, belong to no tensor.",
                one.name,
            )
        if stop > end:
            last, end = one, stop


def check_chunks(report: Report, where: str, tensors: Iterable[Tensor]) -> None:
    """The chunks of each tensor cover it exactly once, and each has as many bytes as its elements
    need."""
    for tensor in tensors:
        bad = tiling.faults(tensor)
        if bad:
            at = f": {bad[0]}"
            if layers.is_stacked(tensor.name) and tensor.shape:
                at = f", {layers.spans(range(*fault.part[0]) for fault in bad)}: {bad[0]}"
            more = f" (and so on in {len(bad)} places)" if len(bad) > 1 else ""
            report.damaged(
                f"{where}: not whole is {tensor.name}{at} of {list(tensor.shape)}{more}.",
                tensor.name,
            )
        _check_lengths(report, where, tensor)
    report.checked.append("the chunks of every tensor cover its shape exactly once")
    report.checked.append("every chunk has as many bytes as its elements need")


def _check_lengths(report: Report, where: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPE_BYTES:
        return
    for chunk in tensor.chunks:
        needed = math.prod(chunk.shape) * DTYPE_BYTES[tensor.dtype]
        most = needed + PACKED_SLACK if tensor.packed else needed
        # Length 0 with elements: the reader could not tell where the bytes are.
        if chunk.length and not needed <= chunk.length <= most:
            report.damaged(
                f"{where}/{chunk.file}: {layers.place(tensor, chunk)} has {chunk.length:,} "
                f"bytes; {list(chunk.shape)} of {tensor.dtype} needs "
                f"{needed:,}{' and a little' if tensor.packed else ''}. Its shape or dtype is "
                "wrong, or its place.",
                tensor.name,
            )


def some(names: list[str]) -> str:
    """A list of names in words, cut when it is long."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
