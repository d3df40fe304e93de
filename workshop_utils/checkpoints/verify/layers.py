"""Which layer a tensor belongs to: by a number in its name, or by its place in a tensor that stacks
all layers."""

import re
from collections.abc import Iterable

from workshop_utils.checkpoints.formats.tensor import Chunk, Tensor

_NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk)\.(\d{1,4})\.")
_STACKED = re.compile(r"(?:^|\.)layers\.(?!\d)")


def number(name: str) -> int | None:
    """``model.layers.7.mlp.up_proj.weight`` -> 7."""
    match = _NUMBERED.search(name)
    return int(match[1]) if match else None


def is_stacked(name: str) -> bool:
    """Whether a tensor holds all layers on its first axis, as Megatron-Core stores them:
    ``decoder.layers.mlp.linear_fc1.weight``."""
    return bool(_STACKED.search(name)) and number(name) is None


def family(name: str) -> str:
    """What the tensors of all layers have in common: ``model.layers.*.mlp.up_proj.weight``."""
    match = _NUMBERED.search(name)
    return f"{name[: match.start(1)]}*{name[match.end(1) :]}" if match else name


def without_number(name: str) -> str:
    """``model.layers.7.mlp.up_proj.weight`` -> ``model.layers.mlp.up_proj.weight``."""
    return family(name).replace(".*", "", 1)


def place(tensor: Tensor, chunk: Chunk) -> str:
    """Name of the tensor that ``chunk`` belongs to, with its layer where the name alone does not
    tell it."""
    if not is_stacked(tensor.name) or not chunk.shape:
        return tensor.name
    return f"{tensor.name}, {spans([range(chunk.offsets[0], chunk.offsets[0] + chunk.shape[0])])}"


def spans(parts: Iterable[range | int]) -> str:
    """Layers in words, neighbours together: ``layer 3``, ``layers 0-2, 7``."""
    merged: list[range] = []
    ranges = (part if isinstance(part, range) else range(part, part + 1) for part in parts)
    for part in sorted(ranges, key=lambda part: part.start):
        if merged and part.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(part.stop, merged[-1].stop))
        else:
            merged.append(part)
    text = ", ".join(
        str(part.start) if len(part) == 1 else f"{part.start}-{part.stop - 1}" for part in merged
    )
    return f"layer{'s' if len(merged) > 1 or len(merged[0]) > 1 else ''} {text}"
