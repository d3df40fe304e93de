"""Read an adapter of NeMo 2.0: LoRA, DoRA or CanonicalLoRA, in a torch_dist directory with
``weights/adapter_metadata.json``.

    module.decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight     [layers, r, in]
    ....adapter.weight_magnitude                                                 [layers, out]
    DoRA
    ....adapter.adapter_q.linear_in.weight                                       [layers, r, in]
    CanonicalLoRA

Rank, alpha and kind are ``model_transform`` of ``context/model.yaml``. Source:
``nemo/collections/llm/peft/`` (NeMo 2.4.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters.adapter import LoraAdapter, as_tensor, fingerprint
from workshop_utils.adapters.modules import of_one_rank, synthetic_config
from workshop_utils.checkpoints.formats import gpt_config, nemo2, values
from workshop_utils.checkpoints.formats.architecture import number
from workshop_utils.checkpoints.formats.lora_layout import Architecture, Halves
from workshop_utils.checkpoints.formats.nemo1_config import ACTIVATIONS
from workshop_utils.checkpoints.formats.qkv import Heads
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor

#: NeMo 2.0's names of the linear layers, and the targets that they are.
LAYERS = {
    "self_attention.linear_qkv": "attention_qkv",
    "self_attention.linear_proj": "attention_dense",
    "mlp.linear_fc1": "mlp_fc1",
    "mlp.linear_fc2": "mlp_fc2",
}
_KEY = re.compile(
    r"module\.decoder\.layers\.(?:(\d+)\.)?([\w.]+?)\.adapter\.(?:adapter_(q|k|v|up|gate)\.)?(linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
#: Class -> default of alpha.
_KINDS = {"LoRA": 32, "DoRA": 64, "CanonicalLoRA": 32}
_CANONICAL = {"attention_qkv": "qkv", "mlp_fc1": ("gate", "up")}

Parts = dict[str, "Tensor"]
"""``linear_in``, ``linear_out`` and ``weight_magnitude`` of one layer's adapter, or of a part
(``q.linear_in``)."""


def read(source: Path) -> LoraAdapter:
    """The adapter in the directory ``source``; errors as
    :func:`workshop_utils.adapters.read.read_adapter`."""
    found = nemo2.read(source)
    where = shown(source / "context" / "model.yaml")
    kind, alpha = _transform(found.model, where)
    fields = gpt_config.read_fields(found.model, where)
    if fields["num_moe_experts"]:
        raise UnsupportedAdapter(
            f"{shown(source)}: its base is a mixture of experts, whose adapters cannot be "
            "exported here."
        )
    architecture = base_architecture(fields)
    layers = _layers(source, architecture.num_layers)
    weights, magnitudes = {}, {}
    for (layer, target), parts in sorted(layers.items()):
        weights[layer, target] = _halves(source, layer, target, parts)
        if "weight_magnitude" in parts:
            magnitudes[layer, target] = parts["weight_magnitude"]
    _check_shapes(source, architecture, weights, magnitudes)
    if (
        magnitudes
        and fields["add_qkv_bias"]
        and any(target == "attention_qkv" for _, target in magnitudes)
    ):
        raise UnsupportedAdapter(
            f"{shown(source)}: its base adds a bias to q, k and v. NeMo's DoRA scales that bias, "
            "PEFT's does not, so that no other form gives the same answers. Train with LoRA, or "
            "without linear_qkv among the targets."
        )
    recorded = found.adapter.get("model_ckpt_path")
    rank = min(
        tensor.shape[0]
        for parts in layers.values()
        for name, tensor in parts.items()
        if name.endswith("linear_in")
    )
    # NeMo records a checkpoint, or the weights/ in it.
    base = (
        Path(recorded.removesuffix("/").removesuffix("/weights")).name
        if isinstance(recorded, str)
        else ""
    )
    targets = tuple(
        target for target in LAYERS.values() if any(target == its for _, its in weights)
    )
    adapter = LoraAdapter(
        source=source,
        sha256=fingerprint(
            source / "context" / "model.yaml", *(source / "weights" / name for name in found.files)
        ),
        config={},
        architecture=architecture,
        rank=rank,
        alpha=rank * (alpha / _stated_rank(found.model, rank, where)),
        targets=targets,
        qkv_order="interleaved",
        base=base,
        weights=weights,
        magnitudes=magnitudes,
        notes=_notes(kind, rank, targets),
    )
    made = of_one_rank(adapter)
    made.config.update(synthetic_config(made.rank, made.alpha, targets, base, architecture))
    return made


def base_architecture(fields: Mapping[str, Any]) -> Architecture:
    """The sizes in ``fields`` (of
    :func:`workshop_utils.checkpoints.formats.gpt_config.read_fields`)."""
    function = fields["activation_func"], fields["gated_linear_unit"]
    return Architecture(
        fields["hidden_size"],
        fields["ffn_hidden_size"],
        fields["num_layers"],
        Heads(fields["num_attention_heads"], fields["num_query_groups"], fields["kv_channels"]),
        next((name for name, stands_for in ACTIVATIONS.items() if stands_for == function), None),
    )


def _notes(kind: str, rank: int, targets: tuple[str, ...]) -> tuple[str, ...]:
    if kind != "CanonicalLoRA" or "attention_qkv" not in targets:
        return ()
    note = (
        "CanonicalLoRA of NeMo 2.4 to 2.7.3 adds its q, k and v one after the other to rows "
        "that are interleaved by group (fixed in Megatron-Bridge, #1818). What it learnt is "
        f"therefore no adapter of q, k and v alone: it is exported at rank {3 * rank}, exactly"
    )
    return (note,)


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


def _stated_rank(model: Mapping[str, Any], rank: int, where: str) -> int:
    stated = model["model_transform"].get("dim", 32)
    if stated != rank:
        raise DamagedCheckpoint(
            f"{where}: model_transform.dim is {stated!r}, but the tensors have rank {rank}."
        )
    return rank


def _layers(source: Path, count: int) -> dict[tuple[int, str], Parts]:
    """The tensors of each layer's adapters. NeMo stacks the layers; one that has a number of its
    own is taken, too."""
    checkpoint = nemo2.describe(source)
    found: dict[tuple[int, str], Parts] = {}
    for tensor in checkpoint.tensors:
        match = _KEY.fullmatch(tensor.name)
        if not match or match[2] not in LAYERS:
            raise UnsupportedAdapter(
                f"{shown(source)}: {tensor.name} is no adapter of {', '.join(LAYERS)}."
            )
        name = f"{match[3]}.{match[4]}" if match[3] else match[4]
        values_of_all = as_tensor(values.read_tensor(checkpoint, tensor))
        if match[1] is None and (not tensor.shape or tensor.shape[0] != count):
            raise DamagedCheckpoint(
                f"{shown(source)}: {tensor.name} is {list(tensor.shape)}, but its base has "
                f"{count} layers.",
                tensor.name,
            )
        rows = {int(match[1]): values_of_all} if match[1] else dict(enumerate(values_of_all))
        for layer, row in rows.items():
            found.setdefault((layer, LAYERS[match[2]]), {})[name.removesuffix(".weight")] = row
    if not found:
        raise NotACheckpoint(f"{shown(source)} holds no adapter.")
    return found


def _halves(source: Path, layer: int, target: str, parts: Parts) -> Halves:
    """One A and one B; those of CanonicalLoRA's parts as NeMo adds them, one after the other."""
    import torch

    names = _CANONICAL.get(target, ()) if any("." in name for name in parts) else ("",)
    try:
        halves = [
            Halves(*(parts[f"{name}.{half}" if name else half] for half in Halves._fields))
            for name in names
        ]
    except KeyError as missing:
        raise DamagedCheckpoint(
            f"{shown(source)}: layer {layer}, {target} has no {missing.args[0]}."
        ) from missing
    if len(halves) == 1:
        return halves[0]
    return Halves(torch.cat([a for a, _ in halves]), torch.block_diag(*(b for _, b in halves)))


def _check_shapes(
    source: Path,
    architecture: Architecture,
    weights: Mapping[tuple[int, str], Halves],
    magnitudes: Mapping,
) -> None:
    for (layer, target), (a, b) in weights.items():
        inputs, outputs = architecture.features(target)
        rank = a.shape[0]
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise DamagedCheckpoint(
                f"{shown(source)}: layer {layer}, {target}: linear_in is {list(a.shape)} and "
                f"linear_out {list(b.shape)}, but its base asks for [r, {inputs}] and "
                f"[{outputs}, r]."
            )
        if (layer, target) in magnitudes and magnitudes[layer, target].shape != (outputs,):
            raise DamagedCheckpoint(
                f"{shown(source)}: layer {layer}, {target}: weight_magnitude is no [{outputs}]."
            )
