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
    saved = {}
    for rank, file in sorted(ranks.items()):
        with files.open(file) as opened:
            saved[rank] = (
                file,
                {tensor.name: tensor for tensor in load(opened, f"{where}:{file}", file)},
            )
    first = saved[0, 0][1].get(prefix + EMBEDDING)
    if first is None:
        raise DamagedCheckpoint(f"{where}: the tensor {prefix + EMBEDDING} is missing.")
    expected = layout(fields, first.shape[0] * width)
    chunks: dict[str, list[Chunk]] = {name: [] for name in expected}
    dtypes: dict[str, set[str]] = {name: set() for name in expected}
    for (rank, stage), (file, tensors) in saved.items():
        for name, tensor in tensors.items():
            place = _locate(
                name.removeprefix(prefix),
                expected,
                fields["num_layers"] // stages * stage,
                f"{where}:{file}",
            )
            # The last stage has a copy of a tied embedding, and every rank one of what is not
            # split.
            if (
                place
                and not (place[0] == EMBEDDING and stage)
                and not (rank and expected[place[0]].split is None)
            ):
                dtypes[place[0]].add(tensor.dtype)
                chunks[place[0]] += _chunks(
                    tensor, file, expected[place[0]], place, rank, width, f"{where}:{file}: {name}"
                )
    for name, weight in expected.items():
        held = {chunk.offsets: math.prod(chunk.shape) for chunk in chunks[name]}
        beyond = any(
            at >= size for offsets in held for at, size in zip(offsets, weight.shape, strict=True)
        )
        if (
            beyond
            or len(held) != len(chunks[name])
            or sum(held.values()) != math.prod(weight.shape)
            or len(dtypes[name]) != 1
        ):
            raise DamagedCheckpoint(
                f"{where}: the tensor {prefix + name} is missing, or a layer of it, or one is "
                "too many."
            )
    return {
        prefix + name: Tensor(
            prefix + name,
            weight.shape,
            dtypes[name].pop(),
            tuple(sorted(chunks[name], key=lambda chunk: chunk.offsets)),
        )
        for name, weight in expected.items()
    }


def _locate(
    name: str, expected: dict[str, Weight], first_layer: int, where: str
) -> tuple[str, tuple[int, ...]] | None:
    """Name in the stacked form and place on its stacked axes; None for what is no weight of its
    own."""
    stacked, at = stacked_name(name, expected)
    if stacked in expected:
        return stacked, (at[0] + first_layer, *at[1:]) if at else at
    if name == OUTPUT or name.endswith("rotary_pos_emb.inv_freq"):
        return None
    raise UnsupportedCheckpoint(
        f"{where} holds {name}, which the model of its configuration does not have."
    )


def _chunks(
    tensor: Tensor,
    file: str,
    weight: Weight,
    place: tuple[str, tuple[int, ...]],
    rank: int,
    width: int,
    where: str,
) -> list[Chunk]:
    """One layer's tensor of one rank as chunks of the stacked tensor."""
    at = place[1]
    stack = (1,) * weight.stacked
    one = weight.shape[weight.stacked :]
    wanted = tuple(size // width if axis == weight.split else size for axis, size in enumerate(one))
    if tensor.nbytes and not tensor.chunks[0].length:
        raise UnsupportedCheckpoint(
            f"{where} is a transposed view of its bytes. Save the file again with every tensor "
            ".contiguous()."
        )
    if tensor.shape != wanted:
        raise DamagedCheckpoint(
            f"{where} has the shape {tensor.shape}; the configuration asks for {wanted}."
        )
    whole = dataclasses.replace(tensor.chunks[0], file=file, shape=stack + wanted)
    if width == 1 or weight.split is None:
        return [dataclasses.replace(whole, offsets=at + (0,) * len(one))]
    if not weight.halves:
        offset = tuple(
            rank * size if axis == weight.split else 0 for axis, size in enumerate(wanted)
        )
        return [dataclasses.replace(whole, offsets=at + offset)]
    # The rank's slice of the gate, and after it that of up: rows, so each is one range of bytes.
    rows, rest = wanted[0] // 2, wanted[1:]
    length = rows * math.prod(rest) * DTYPE_BYTES[tensor.dtype]
    return [
        Chunk(
            at + (half * one[0] // 2 + rank * rows,) + (0,) * len(rest),
            (*stack, rows, *rest),
            file,
            whole.start + half * length,
            length,
        )
        for half in (0, 1)
    ]
