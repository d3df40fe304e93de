"""Read an adapter of NeMo 2.0: LoRA, DoRA or CanonicalLoRA, in a torch_dist directory with
``weights/adapter_metadata.json``.

    ....adapter.linear_in.weight              [layers, r, in]
    ....adapter.weight_magnitude              [layers, out]     DoRA
    ....adapter.adapter_q.linear_in.weight    [layers, r, in]   CanonicalLoRA

Rank, alpha and kind are ``model_transform`` of ``context/model.yaml``. Source:
``nemo/collections/llm/peft/`` (NeMo 2.4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters.adapter import LoraAdapter, as_tensor, fingerprint
from workshop_utils.adapters.modules import of_one_rank, synthetic_config
from workshop_utils.checkpoints.formats import gpt_config, nemo2, values
from workshop_utils.checkpoints.formats.architecture import Architecture, number
from workshop_utils.checkpoints.formats.lora_layout import (
    TARGETS,
    Halves,
    Place,
    faults,
    features,
    nemo1_key,
    ordered,
    parse,
)
from workshop_utils.checkpoints.formats.nemo1_config import ACTIVATIONS
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor

_TARGETS = {target.nemo2: name for name, target in TARGETS.items()}
#: Class -> default of alpha.
_KINDS = {"LoRA": 32, "DoRA": 64, "CanonicalLoRA": 32}
_CANONICAL = {"attention_qkv": ("q", "k", "v"), "mlp_fc1": ("gate", "up")}

Parts = dict[tuple[str, str], "Tensor"]
"""(part, half) of one layer's adapter; the part is empty but for CanonicalLoRA."""


def read(source: Path) -> LoraAdapter:
    """The adapter in the directory ``source``; errors as
    :func:`workshop_utils.adapters.read.read_adapter`."""
    checkpoint = nemo2.read(source)
    model, where = checkpoint.model, shown(source / "context" / "model.yaml")
    kind, alpha = _transform(model, where)
    fields = gpt_config.read_fields(model, where)
    if fields["num_moe_experts"]:
        raise UnsupportedAdapter(
            f"{shown(source)}: its base is a mixture of experts, whose adapters cannot be "
            "exported here."
        )
    sizes = base_architecture(fields)
    layers = _layers(source, sizes.layers)
    weights = {place: _halves(source, *place, parts) for place, parts in sorted(layers.items())}
    magnitudes = {
        place: layers[place]["", "magnitude"]
        for place in weights
        if ("", "magnitude") in layers[place]
    }
    _check_shapes(source, sizes, weights, magnitudes)
    targets = ordered(target for _, target in weights)
    if fields["add_qkv_bias"] and magnitudes and "attention_qkv" in targets:
        raise UnsupportedAdapter(
            f"{shown(source)}: its base adds a bias to q, k and v. NeMo's DoRA scales that bias, "
            "PEFT's does not, so that no other form gives the same answers. Train with LoRA, or "
            "without linear_qkv among the targets."
        )
    # Of one part, where CanonicalLoRA has several.
    rank = min(
        tensor.shape[0]
        for parts in layers.values()
        for (_, half), tensor in parts.items()
        if half == "A"
    )
    stated = model["model_transform"].get("dim", 32)
    if stated != rank:
        raise DamagedCheckpoint(
            f"{where}: model_transform.dim is {stated!r}, but the tensors have rank {rank}."
        )
    recorded = checkpoint.adapter.get("model_ckpt_path")
    # NeMo records a checkpoint, or the weights/ in it.
    base = recorded.removesuffix("/").removesuffix("/weights") if isinstance(recorded, str) else ""
    notes = ()
    if kind == "CanonicalLoRA" and "attention_qkv" in targets:
        notes = (
            "CanonicalLoRA of NeMo 2.4 to 2.7.3 adds its q, k and v one after the other to rows "
            "that are interleaved by group (fixed in Megatron-Bridge, #1818). What it learnt is "
            f"therefore no adapter of q, k and v alone: it is exported at rank {3 * rank}, exactly",
        )
    files = [source / "context" / "model.yaml"]
    adapter = of_one_rank(
        LoraAdapter(
            source=source,
            sha256=fingerprint(*files, *(source / "weights" / name for name in checkpoint.files)),
            config={},
            architecture=sizes,
            rank=rank,
            alpha=float(alpha),
            targets=targets,
            qkv_order="interleaved",
            base=Path(base).name,
            weights=weights,
            magnitudes=magnitudes,
            notes=notes,
        )
    )
    described = (adapter.rank, adapter.alpha, targets, adapter.base, sizes)
    adapter.config.update(synthetic_config(*described))
    return adapter


def base_architecture(fields: Mapping[str, Any]) -> Architecture:
    """The sizes in ``fields`` (of
    :func:`workshop_utils.checkpoints.formats.gpt_config.read_fields`)."""
    function = fields["activation_func"], fields["gated_linear_unit"]
    return Architecture(
        layers=fields["num_layers"],
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        groups=fields["num_query_groups"],
        head_dim=fields["kv_channels"],
        ffn=fields["ffn_hidden_size"],
        activation=next((name for name, its in ACTIVATIONS.items() if its == function), None),
    )


def _transform(model: Mapping[str, Any], where: str) -> tuple[str, float]:
    """Kind and alpha of the adapter, from ``model_transform``."""
    transform = model.get("model_transform")
    if not isinstance(transform, Mapping):
        raise DamagedCheckpoint(
            f"{where} has no model_transform: alpha and the kind of the adapter are not recorded."
        )
    kind = str(transform.get("_target_")).rpartition(".")[2]
    if kind not in _KINDS:
        raise UnsupportedAdapter(
            f"{where}: model_transform is {transform.get('_target_')!r}; {', '.join(_KINDS)} can "
            "be exported."
        )
    alpha = number(transform, "alpha", _KINDS[kind])
    if not 0 < alpha < 1e9:
        raise DamagedCheckpoint(
            f"{where}: model_transform.alpha is {alpha!r}; it must be a positive number."
        )
    return kind, alpha


def _layers(source: Path, count: int) -> dict[Place, Parts]:
    """The tensors of each layer's adapters. NeMo stacks the layers; one that has a number of its
    own is taken, too."""
    checkpoint = nemo2.describe(source)
    layers: dict[Place, Parts] = {}
    for tensor in checkpoint.tensors:
        key = parse(tensor.name)
        target = _TARGETS.get(key.module) if key and key.style == "nemo2" else None
        if not target or not tensor.name.startswith("module.decoder.layers."):
            raise UnsupportedAdapter(
                f"{shown(source)}: {tensor.name} is no adapter of {', '.join(_TARGETS)}."
            )
        stacked = as_tensor(values.read_tensor(checkpoint, tensor))
        if key.layer is None and stacked.shape[:1] != (count,):
            raise DamagedCheckpoint(
                f"{shown(source)}: {tensor.name} is {list(tensor.shape)}, but its base has "
                f"{count} layers.",
                tensor.name,
            )
        rows = enumerate(stacked) if key.layer is None else [(key.layer, stacked)]
        for layer, row in rows:
            layers.setdefault((layer, target), {})[key.part, key.half] = row
    if not layers:
        raise NotACheckpoint(f"{shown(source)} holds no adapter.")
    return layers


def _halves(source: Path, layer: int, target: str, parts: Parts) -> Halves:
    """One A and one B; those of CanonicalLoRA's parts as NeMo adds them, one after the other."""
    import torch

    names = _CANONICAL.get(target, ()) if any(part for part, _ in parts) else ("",)
    try:
        halves = [Halves(parts[name, "A"], parts[name, "B"]) for name in names]
    except KeyError as missing:
        part, half = missing.args[0]
        name = f"{part and part + '.'}linear_{'in' if half == 'A' else 'out'}"
        raise DamagedCheckpoint(
            f"{shown(source)}: layer {layer}, {target} has no {name}."
        ) from missing
    if len(halves) == 1:
        return halves[0]
    return Halves(torch.cat([a for a, _ in halves]), torch.block_diag(*(b for _, b in halves)))


def _check_shapes(
    source: Path,
    sizes: Architecture,
    weights: Mapping[Place, Halves],
    magnitudes: Mapping[Place, Tensor],
) -> None:
    def shapes(layer: int, target: str):
        inputs, outputs = features(sizes, target)
        rank = weights[layer, target].linear_in.shape[0]
        return (rank, inputs), (outputs, rank)

    places = {place: {"A": a, "B": b} for place, (a, b) in weights.items()}
    layers = {layer for layer, _ in weights}
    wrong = [fault for _, fault, _ in faults(places, layers, shapes, nemo1_key, "its base")]
    wrong += [
        f"layer {layer}, {target}: weight_magnitude is no [{features(sizes, target)[1]}]"
        for (layer, target), lengths in magnitudes.items()
        if lengths.shape != (features(sizes, target)[1],)
    ]
    if wrong:
        raise DamagedCheckpoint(f"{shown(source)}: {wrong[0]}.")
