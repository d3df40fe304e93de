"""Do the byte ranges of the tensors fit the files, one another, and the tensors themselves? Sizes of files are all that is read."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from workshop_utils.doctor import layers, tiling
from workshop_utils.doctor.report import Report
from workshop_utils.formats.tensor import DTYPE_BYTES, Tensor

PACKED_SLACK = 8192
"""Most bytes that ``torch.save`` adds to the elements of one chunk; torch 2.13 adds 1.6 kB, and aligns to 64 bytes."""


class Range(NamedTuple):
    """Bytes ``[start, start + length)`` of a file, and what they hold, in words and as the name of a tensor."""

    file: str
    start: int
    length: int
    holds: str
    name: str


def ranges(tensors: Iterable[Tensor]) -> list[Range]:
    """The ranges of all chunks whose place is known."""
    return [
        Range(chunk.file, chunk.start, chunk.length, layers.place(tensor, chunk), tensor.name)
        for tensor in tensors
        for chunk in tensor.chunks
        if chunk.length or not tensor.nbytes
    ]


def check_files(
    report: Report, where: str, sizes: Mapping[str, int], found: Iterable[Range], *, shared: bool, full: bool
) -> None:
    """Every range lies in a file that is there, and no two overlap. ``where`` is the directory or archive of the files ``sizes``.

    ``shared``: tensors may share their bytes, as tied weights do in what ``torch.save`` wrote. ``full``: the format wants every byte
    of the data in exactly one tensor (safetensors); ``sizes`` are then the bytes of the data, and ranges count from their start.
    """
    by_file: dict[str, list[Range]] = {}
    for one in found:
        by_file.setdefault(one.file, []).append(one)
    for file, held in sorted(by_file.items()):
        held.sort(key=lambda one: (one.start, one.length))
        if file not in sizes:
            names = list(dict.fromkeys(one.name for one in held))
            report.damaged(
                f"{where}/{file} is missing; it holds {some(names)}. Copy the checkpoint again, all of it.", _only(names)
            )
            continue
        _check_file(report, f"{where}/{file}", sizes[file], held, shared, full)
    report.checked.append("every file that is named exists and is as long as its byte ranges need")
    report.checked.append("tensors that share bytes share all of them" if shared else "no two byte ranges of a file overlap")


def _check_file(report: Report, file: str, size: int, held: list[Range], shared: bool, full: bool) -> None:
    """``held`` are the ranges of one file, in the order of their first bytes."""
    last, end = None, 0
    for one in held:
        stop = one.start + one.length
        if stop > size:
            report.damaged(
                f"{file} is cut off: {one.holds} ends at byte {stop:,} of {size:,}. Copy the checkpoint again.", one.name
            )
        if one.start < end and one.length and not (shared and (one.start, one.length) == (last.start, last.length)):
            report.damaged(
                f"{file}: the bytes of {one.holds} [{one.start:,}, {stop:,}) overlap those of {last.holds} "
                f"[{last.start:,}, {last.start + last.length:,}).",
                one.name,
            )
        if full and one.start > end:
            report.damaged(
                f"{file}: bytes [{end:,}, {one.start:,}) of the data, before {one.holds}, belong to no tensor.", one.name
            )
        if stop > end:
            last, end = one, stop
    if end < size and full:
        report.damaged(f"{file}: the last {size - end:,} bytes belong to no tensor.")
    elif end < size and not shared:
        report.note(f"{file} is {size - end:,} bytes longer than what the index names.")


def check_chunks(report: Report, where: str, tensors: Iterable[Tensor]) -> None:
    """The chunks of each tensor cover it exactly once, and each has as many bytes as its elements need."""
    for tensor in tensors:
        bad = tiling.faults(tensor)
        if bad:
            at = ""
            if layers.is_stacked(tensor.name) and tensor.shape:
                at = f", {layers.spans(range(*fault.part[0]) for fault in bad)}"
            more = f", and {len(bad) - 1} more such places" if len(bad) > 1 else ""
            report.damaged(f"{where}: {tensor.name}{at} is not whole: {bad[0]} of {list(tensor.shape)}{more}.", tensor.name)
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
                f"{where}/{chunk.file}: {layers.place(tensor, chunk)} has {chunk.length:,} bytes; {list(chunk.shape)} of {tensor.dtype} "
                f"needs {needed:,}{' and a little' if tensor.packed else ''}. Its shape or dtype is wrong, or its place.",
                tensor.name,
            )


def some(names: list[str], most: int = 4) -> str:
    """A list of names in words, cut when it is long."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None
