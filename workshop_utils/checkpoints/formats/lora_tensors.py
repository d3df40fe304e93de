"""Rank, targets and kind of a LoRA adapter, as the names and shapes of its tensors have them.

NeMo 2.0 and Megatron-Bridge  ...self_attention.linear_qkv.adapter.linear_in.weight
(layers, r, in) or (r, in)
NeMo 1                        ...self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight  (r,
in)
Hugging Face PEFT             ...self_attn.q_proj.lora_A.weight                                  (r,
in)
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from workshop_utils.checkpoints.formats.tensor import Tensor

_FIRST_HALF = (
    re.compile(r"\.(?P<target>\w+)\.adapter\.(?:adapter_(?P<part>\w+)\.)?linear_in\.weight$"),
    re.compile(r"\.adapter_layer\.(?P<target>\w+)\.(?:\w+\.)?linear_in\.weight$"),
    re.compile(r"\.(?P<target>\w+)\.lora_A(?:\.\w+)?\.weight$"),
)
_MAGNITUDE = re.compile(r"\.(?:adapter\.weight_magnitude|lora_magnitude_vector(?:\.\w+)*)$")
_NEMO1_TARGETS = {
    "lora_kqv_adapter": "attention_qkv",
    "lora_unfused_kqv_adapter": "attention_qkv",
    "lora_dense_attention_adapter": "attention_dense",
    "lora_hto4h_adapter": "mlp_fc1",
    "lora_unfused_hto4h_adapter": "mlp_fc1",
    "lora_4htoh_adapter": "mlp_fc2",
}


@dataclass(frozen=True)
class LoraTensors:
    """``ranks`` are the different ones, sorted; a DoRA adapter has a vector of magnitudes for each
    target as well."""

    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    is_dora: bool

    @property
    def rank(self) -> int | None:
        """The rank, where it is one."""
        return self.ranks[0] if len(self.ranks) == 1 else None


def find(tensors: Iterable[Tensor]) -> LoraTensors | None:
    """What the adapter tensors among ``tensors`` say, or None when there are none."""
    ranks, targets, dora = set(), set(), False
    for tensor in tensors:
        dora = dora or bool(_MAGNITUDE.search(tensor.name))
        match = next(
            (match for pattern in _FIRST_HALF if (match := pattern.search(tensor.name))), None
        )
        if match and len(tensor.shape) >= 2:
            part = match.groupdict().get("part")
            # CanonicalLoRA has one adapter for each of q, k and v, and for up and gate.
            own = f"linear_fc1_{part}" if part in ("up", "gate") else f"linear_{part}"
            targets.add(own if part else _NEMO1_TARGETS.get(match["target"], match["target"]))
            ranks.add(tensor.shape[-2])
    return LoraTensors(tuple(sorted(ranks)), tuple(sorted(targets)), dora) if targets else None
