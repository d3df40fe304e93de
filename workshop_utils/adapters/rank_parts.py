"""Put together an adapter that several model-parallel ranks wrote; NeMo leaves a part for each and
no reader takes that.

How ``ParallelLinearAdapter``
(``nemo/collections/nlp/modules/common/megatron/adapters/parallel_adapters.py``, NeMo 2.4.1) is
split: ``linear_out`` by rows everywhere. ``linear_in`` by rows (that is, by rank of the adapter)
where the layer it adapts is column-parallel (attention_qkv, mlp_fc1), by columns where that is
row-parallel (attention_dense, mlp_fc2) and its input is split. Each tensor-parallel rank holds its
own slice of the gate and of the up projection, so a gated mlp_fc1 is put together half by half. The
two bottlenecks of peft_scheme=adapter gather their output: ``linear_out`` is split by columns,
their layer norm is whole on every rank. The factors of ia3 are vectors, split as the activations
are. Pipeline stages number their layers from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.checkpoints.formats.lora_layout import parse
from workshop_utils.checkpoints.formats.rank_files import sizes
from workshop_utils.core.errors import DamagedCheckpoint
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_INPUT_IS_SPLIT = ("attention_dense", "mlp_fc2")


def merge(
    source: Path, parts: Mapping[tuple[int, int], Mapping[str, Tensor]], layers: int, gated: bool
) -> dict[str, Tensor]:
    """One flat state from the ``parts`` of each (tensor-parallel rank, pipeline stage).

    ``layers`` is the number of layers of the whole model, ``gated`` whether its feed-forward has a
    gate. Raises :class:`DamagedCheckpoint` when the parts hold different tensors, or shapes that do
    not fit each other.
    """
    tensor, pipeline = sizes(parts)
    if layers % pipeline:
        raise DamagedCheckpoint(
            f"{shown(source)}: {layers} layers cannot have been split over {pipeline} pipeline "
            "stages."
        )
    merged: dict[str, Tensor] = {}
    for stage in range(pipeline):
        ranks = [parts[rank, stage] for rank in range(tensor)]
        if any(part.keys() != ranks[0].keys() for part in ranks):
            raise DamagedCheckpoint(
                f"{shown(source)}: the tensor-parallel parts of pipeline stage {stage} hold "
                "different tensors."
            )
        first = stage * layers // pipeline
        for name in ranks[0]:
            whole = _LAYER.sub(lambda layer, first=first: str(int(layer[0]) + first), name)
            merged[whole] = _joined(source, name, [part[name] for part in ranks], gated)
    return merged


def _joined(source: Path, name: str, slices: list[Tensor], gated: bool) -> Tensor:
    import torch

    bottleneck = re.search(r"\.adapter_layer\.adapter_[12]\.", name)
    if len(slices) == 1 or (bottleneck and ".layer_norm." in name):
        return slices[0]
    if len({piece.shape for piece in slices}) > 1 or slices[0].ndim != (
        1 if "_infused_adapter." in name else 2
    ):
        raise DamagedCheckpoint(
            f"{shown(source)}: the parts of {name} do not have one shape.", name
        )
    key = parse(name)
    target, half = (key.target, key.half) if key else ("", "")
    if gated and (target, half) == ("mlp_fc1", "B"):
        halves = [piece.chunk(2) for piece in slices]
        return torch.cat([rank[side] for side in (0, 1) for rank in halves])
    by_columns = half == "B" if bottleneck else half == "A" and target in _INPUT_IS_SPLIT
    return torch.cat(slices, dim=int(by_columns))
