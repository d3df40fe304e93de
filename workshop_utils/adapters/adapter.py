"""A LoRA adapter in memory, whoever wrote it: NeMo's script path, NeMo 2.0, or Hugging Face PEFT.

A target is a linear layer of NeMo (``attention_qkv``: q, k and v fused) or of Hugging Face
(``self_attn.q_proj``); :mod:`.modules` goes from the one to the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.lora_layout import Halves, Place
from workshop_utils.checkpoints.formats.qkv import Order
from workshop_utils.core.hashing import sha256, sha256_of_text

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""An adapter's name: a directory, a model's id and a word in a URL alike."""
NAME_RULE = "up to 128 letters, digits, '.', '_' and '-', a letter or digit first"


@dataclass(frozen=True)
class LoraAdapter:
    """``weights`` maps (layer from 0, target) to the two matrices, in the file's dtype.

    ``config`` has the names of NeMo's ``model_config.yaml``, also where another format was read.
    ``architecture`` is None for a PEFT adapter whose base is not known. ``magnitudes`` are DoRA's,
    ``[out]``. ``notes`` say what reading it changed. ``some_layers``: PEFT was told to adapt only
    the layers, or the modules of a layer, that are there.
    """

    source: Path
    sha256: str
    config: dict[str, Any]
    architecture: Architecture | None
    rank: int
    alpha: float
    targets: tuple[str, ...]
    qkv_order: Order
    base: str
    weights: dict[Place, Halves]
    magnitudes: dict[Place, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    some_layers: bool = False

    @property
    def scale(self) -> float:
        """What the reader multiplies ``linear_out @ linear_in`` with."""
        return self.alpha / self.rank

    @property
    def layers(self) -> int:
        """Layers of the base, or as far as the adapter tells."""
        if self.architecture:
            return self.architecture.layers
        return 1 + max(layer for layer, _ in self.weights)


def fingerprint(*files: Path) -> str:
    """sha256 of one file, or of the digests of several, in hexadecimal."""
    digests = [sha256(file) for file in files]
    together = sha256_of_text("\n".join(digests))
    return digests[0] if len(digests) == 1 else together


def as_tensor(array: numpy.ndarray) -> Tensor:
    """``array`` as a tensor, also of ml_dtypes' bfloat16, which torch does not take."""
    import torch

    # A copy where the bytes belong to a file: torch warns otherwise.
    plain = array.reshape(-1).view("uint8")
    plain = plain if plain.flags.writeable else plain.copy()
    return torch.from_numpy(plain).view(getattr(torch, array.dtype.name)).reshape(array.shape)
