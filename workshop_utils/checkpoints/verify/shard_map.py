"""Which file of a checkpoint holds what, layer by layer."""

import math
from dataclasses import dataclass

from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Chunk, Tensor
from workshop_utils.checkpoints.verify import layers


@dataclass(frozen=True)
class ShardMap:
    """Bytes by file and layer: ``cells[file][layer]``; None is what is outside the layers."""

    files: tuple[str, ...]
    layers: tuple[int, ...]
    cells: dict[str, dict[int | None, int]]

    @property
    def mixed(self) -> list[int]:
        """Layers whose weights lie in more than one file."""
        held = self.cells.values()
        return [layer for layer in self.layers if sum(layer in cells for cells in held) > 1]

    @property
    def finding(self) -> str:
        """The map in one sentence."""
        if not self.files:
            return "The checkpoint does not tell where its tensors lie."
        if not self.layers:
            return f"{len(self.files)} files; no tensor belongs to a layer."
        if len(self.files) == 1:
            return f"All {len(self.layers)} layers are in one file."
        return (
            f"{len(self.mixed)} of {len(self.layers)} layers have weights in more than one of "
            f"the {len(self.files)} files."
        )


def shard_map(checkpoint: Checkpoint) -> ShardMap:
    cells: dict[str, dict[int | None, int]] = {}
    for tensor in checkpoint.tensors:
        for chunk in tensor.chunks:
            held = cells.setdefault(chunk.file, {})
            for layer, elements in _layers(tensor, chunk):
                held[layer] = held.get(layer, 0) + elements * DTYPE_BYTES.get(tensor.dtype, 0)
    numbers = sorted({layer for held in cells.values() for layer in held if layer is not None})
    return ShardMap(tuple(sorted(cells)), tuple(numbers), cells)


def _layers(tensor: Tensor, chunk: Chunk) -> list[tuple[int | None, int]]:
    """(layer, elements) of ``chunk``. NeMo 2.0 stacks all layers on the first axis, the other
    formats number them in the name."""
    elements = math.prod(chunk.shape)
    if layers.is_stacked(tensor.name) and chunk.shape:
        first, count = chunk.offsets[0], chunk.shape[0]
        return [(layer, elements // count) for layer in range(first, first + count)]
    return [(layers.number(tensor.name), elements)]
