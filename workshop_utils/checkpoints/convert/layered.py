"""Weights in one file for each rank, every layer under a name of its own, as tensors of the stacked
form.

The names of the files: :mod:`workshop_utils.checkpoints.formats.rank_files`. Nothing is put
together here: a layer, an expert or a rank's slice becomes one chunk of the stacked tensor, at its
offset.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import IO

from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.megatron_layout import (
    EMBEDDING,
    OUTPUT,
    Weight,
    layout,
    stacked_name,
)
from workshop_utils.checkpoints.formats.rank_files import sizes
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Chunk, Tensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

Read = Callable[[IO[bytes], str, str], list[Tensor]]
"""(opened file, its name for errors, its name for chunks) -> its tensors, as
:func:`workshop_utils.checkpoints.formats.saved_tensors.read`."""


def read(
    files: Files, fields: dict, ranks: dict[tuple[int, int], str], prefix: str, load: Read
) -> dict[str, Tensor]:
    """Name in the stacked form, with ``prefix`` -> tensor. ``fields`` is the architecture,
    ``ranks`` which file each wrote, and ``load`` reads one file, whose names begin with ``prefix``.

    Raises :class:`DamagedCheckpoint` (a rank or a tensor is missing, shapes do not fit) and
    :class:`UnsupportedCheckpoint` (a tensor that the model does not have).
    """
    where = shown(files.place)
    width, stages = sizes(ranks)
    if len(ranks) != width * stages:
        raise DamagedCheckpoint(
            f"{where} holds {len(ranks)} files of weights; {width} x {stages} ranks were meant. "
            "Copy it again."
        )
    saved: dict[tuple[int, int], dict[str, Tensor]] = {}
    for rank, file in sorted(ranks.items()):
        with files.open(file) as opened:
            tensors = load(opened, f"{where}:{file}", file)
        saved[rank] = {tensor.name: tensor for tensor in tensors}
    first = saved[0, 0].get(prefix + EMBEDDING)
    if first is None:
        raise DamagedCheckpoint(f"{where}: the tensor {prefix + EMBEDDING} is missing.")
    expected = layout(fields, first.shape[0] * width)
    chunks: dict[str, list[Chunk]] = {name: [] for name in expected}
    dtypes: dict[str, set[str]] = {name: set() for name in expected}
    for (rank, stage), tensors in saved.items():
        file = ranks[rank, stage]
        first_layer = fields["num_layers"] // stages * stage
        for name, tensor in tensors.items():
            plain = name.removeprefix(prefix)
            stacked, place = stacked_name(plain, expected)
            if (weight := expected.get(stacked)) is None:
                if plain == OUTPUT or plain.endswith("rotary_pos_emb.inv_freq"):
                    continue  # no weight of its own
                raise UnsupportedCheckpoint(
                    f"{where}:{file} holds {plain}, which the model of its configuration does not "
                    "have."
                )
            # The last stage has a copy of a tied embedding, and every rank one of what is not
            # split.
            if (stacked == EMBEDDING and stage) or (rank and weight.split is None):
                continue
            place = (place[0] + first_layer, *place[1:]) if place else ()
            dtypes[stacked].add(tensor.dtype)
            at = f"{where}:{file}: {name}"
            chunks[stacked] += _chunks(tensor, file, weight, place, rank, width, at)
    stacked = {}
    for name, weight in expected.items():
        held = {chunk.offsets: math.prod(chunk.shape) for chunk in chunks[name]}
        inside = all(
            at < size for offsets in held for at, size in zip(offsets, weight.shape, strict=True)
        )
        whole = len(held) == len(chunks[name]) and sum(held.values()) == math.prod(weight.shape)
        if not (inside and whole and len(dtypes[name]) == 1):
            raise DamagedCheckpoint(
                f"{where}: the tensor {prefix + name} is missing, or a layer of it, or one is "
                "too many."
            )
        in_order = tuple(sorted(chunks[name], key=lambda chunk: chunk.offsets))
        (dtype,) = dtypes[name]
        stacked[prefix + name] = Tensor(prefix + name, weight.shape, dtype, in_order)
    return stacked


def _chunks(
    tensor: Tensor,
    file: str,
    weight: Weight,
    place: tuple[int, ...],
    rank: int,
    width: int,
    where: str,
) -> list[Chunk]:
    """One layer's tensor of one rank as chunks of the stacked tensor, at its ``place`` there."""
    stack, own = (1,) * weight.stacked, weight.shape[weight.stacked :]
    shape = tuple(size // width if axis == weight.split else size for axis, size in enumerate(own))
    if tensor.nbytes and not tensor.chunks[0].length:
        raise UnsupportedCheckpoint(
            f"{where} is a transposed view of its bytes. Save the file again with every tensor "
            ".contiguous()."
        )
    if tensor.shape != shape:
        raise DamagedCheckpoint(
            f"{where} has the shape {tensor.shape}; the configuration asks for {shape}."
        )
    start = tensor.chunks[0].start
    if width == 1 or weight.split is None or not weight.halves:
        offset = tuple(rank * size * (axis == weight.split) for axis, size in enumerate(shape))
        whole = dataclasses.replace(tensor.chunks[0], file=file, shape=stack + shape)
        return [dataclasses.replace(whole, offsets=place + offset)]
    # The rank's slice of the gate, and after it that of up: rows, so each is one range of bytes.
    rows, rest = shape[0] // 2, shape[1:]
    length = rows * math.prod(rest) * DTYPE_BYTES[tensor.dtype]
    part = (*stack, rows, *rest)
    return [
        Chunk(
            (*place, half * own[0] // 2 + rank * rows, *(0 for _ in rest)),
            part,
            file,
            start + half * length,
            length,
        )
        for half in (0, 1)
    ]
