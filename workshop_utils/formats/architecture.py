"""The shape of a Llama-like decoder, in one vocabulary for every checkpoint format."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder-only transformer. ``rope_scaling`` is None or the four numbers of Llama 3.1's rule."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int | None
    tied: bool
    rope_base: float
    rope_scaling: dict[str, Any] | None = None
