"""The linear layers of NeMo and those of Hugging Face: q, k, v and gate, up are fused in the one,
separate in the other.

A fused layer has one A for all its parts; separate ones have an A each. Separating is exact: A is
shared, B is cut. Fusing is exact, too: at the same rank where the parts share one A, else at the
sum of the ranks, with the As one below the other and the Bs on a diagonal of blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.lora_layout import (
    TARGETS,
    Halves,
    features,
    modules_of,
    ordered,
)
from workshop_utils.checkpoints.formats.qkv import join, split
from workshop_utils.core.errors import UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor


def separated(adapter: LoraAdapter) -> LoraAdapter:
    """``adapter`` with Hugging Face's modules as targets. The parts of one fused layer share their
    A: the same tensor.

    Raises:
        UnsupportedAdapter: the base has an MLP that no family in Hugging Face's layout here has.
    """
    weights, magnitudes = {}, {}
    for (layer, target), (a, b) in adapter.weights.items():
        for module, part in _parts(adapter, target, b):
            weights[layer, module] = Halves(a, part)
        if (layer, target) in adapter.magnitudes:
            for module, part in _parts(adapter, target, adapter.magnitudes[layer, target][:, None]):
                magnitudes[layer, module] = part[:, 0]
    targets = ordered(module for _, module in weights)
    return dataclasses.replace(adapter, weights=weights, magnitudes=magnitudes, targets=targets)


def fused(adapter: LoraAdapter) -> LoraAdapter:
    """``adapter`` with NeMo's targets, its rows in ``qkv_order``, every layer there, all of one
    rank.

    Raises:
        UnsupportedAdapter: it is DoRA, whose magnitudes need the base, or the base's sizes are not
            known.
    """
    if adapter.magnitudes:
        raise UnsupportedAdapter(
            f"{shown(adapter.source)} is a DoRA adapter, and a .nemo holds LoRA only. Export it "
            "with --to hf-peft, or merge it: --to hf-merged."
        )
    if adapter.architecture is None:
        raise UnsupportedAdapter(
            f"{shown(adapter.source)}: a .nemo fuses q, k and v, for which the base's heads have "
            "to be known. Name the base's directory: --base DIR."
        )
    targets = nemo_targets(adapter.targets)
    weights = {
        (layer, target): _fused(adapter, layer, target)
        for layer in range(adapter.layers)
        for target in targets
    }
    of_nemo = of_one_rank(dataclasses.replace(adapter, weights=weights, targets=targets))
    if of_nemo.rank == adapter.rank:
        return of_nemo
    note = (
        f"q, k and v (or gate and up) have an A each: fused exactly, at rank {of_nemo.rank} in "
        f"place of {adapter.rank}"
    )
    return dataclasses.replace(of_nemo, notes=(*adapter.notes, note))


def of_one_rank(adapter: LoraAdapter) -> LoraAdapter:
    """``adapter`` with every matrix at the largest rank that one has: rows and columns of zeros
    change nothing. The scale stays."""
    from torch.nn.functional import pad

    rank = max(a.shape[0] for a, _ in adapter.weights.values())
    if all(a.shape[0] == rank == adapter.rank for a, _ in adapter.weights.values()):
        return adapter
    weights = {
        place: Halves(pad(a, (0, 0, 0, rank - a.shape[0])), pad(b, (0, rank - b.shape[1])))
        for place, (a, b) in adapter.weights.items()
    }
    alpha = adapter.alpha * rank / adapter.rank
    return dataclasses.replace(adapter, weights=weights, rank=rank, alpha=alpha)


def of_dtype(adapter: LoraAdapter, dtype: str) -> LoraAdapter:
    """``adapter`` with every tensor as ``dtype``."""
    import torch

    to = getattr(torch, dtype)
    weights = {place: Halves(a.to(to), b.to(to)) for place, (a, b) in adapter.weights.items()}
    magnitudes = {place: tensor.to(to) for place, tensor in adapter.magnitudes.items()}
    return dataclasses.replace(adapter, weights=weights, magnitudes=magnitudes)


def updated(weight: Tensor, adapter: LoraAdapter, layer: int, module: str) -> Tensor:
    """The base's ``weight`` ``[out, in]`` with what ``adapter`` (of :func:`separated`) adds to it,
    in single precision.

    LoRA: ``W + s B A``. DoRA (NeMo's ``DoRALinear``, PEFT's ``DoraLinearLayer``): each row of that,
    at the length in ``magnitudes``.
    """
    a, b = adapter.weights[layer, module]
    total = weight.float().addmm(b.float(), a.float(), alpha=adapter.scale)
    if (layer, module) in adapter.magnitudes:
        total *= (adapter.magnitudes[layer, module].float() / total.norm(dim=1))[:, None]
    return total


def _parts(adapter: LoraAdapter, target: str, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's modules for ``target``, each with its part of ``rows`` ``[out, n]``."""
    sizes = adapter.architecture
    if target == "mlp_fc1" and not sizes.gated and sizes.activation != "squared-relu":
        raise UnsupportedAdapter(
            f"{shown(adapter.source)}: mlp_fc1 with activation {sizes.activation!r} has no gate; "
            "only gated models (fast-swiglu: gate_proj and up_proj) and Nemotron (squared-relu: "
            "up_proj) have a form in Hugging Face's layout here."
        )
    modules = modules_of(target, sizes)
    if target == "attention_qkv":
        return zip(modules, split(rows, sizes.qkv, adapter.qkv_order), strict=True)
    return zip(modules, rows.chunk(len(modules)), strict=True)


def _fused(adapter: LoraAdapter, layer: int, target: str) -> Halves:
    import torch

    if (layer, target) in adapter.weights:
        return adapter.weights[layer, target]
    inputs, rows = features(adapter.architecture, target)
    modules = modules_of(target, adapter.architecture)
    parts = [adapter.weights.get((layer, module)) for module in modules]
    there = [halves for halves in parts if halves]
    like = next(iter(adapter.weights.values())).linear_out
    if not there:
        return Halves(like.new_zeros(adapter.rank, inputs), like.new_zeros(rows, adapter.rank))
    shared = all(torch.equal(halves.linear_in, there[0].linear_in) for halves in there)
    a = there[0].linear_in if shared else torch.cat([halves.linear_in for halves in there])
    blocks, at = [], 0
    for module, halves in zip(modules, parts, strict=True):
        block = like.new_zeros(features(adapter.architecture, module)[1], a.shape[0])
        if halves:
            width = halves.linear_out.shape[1]
            block[:, at : at + width] = halves.linear_out
            at += 0 if shared else width
        blocks.append(block)
    if target == "attention_qkv":
        return Halves(a, join(*blocks, adapter.architecture.qkv, adapter.qkv_order))
    return Halves(a, torch.cat(blocks))


def nemo_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """NeMo's targets for ``targets``, NeMo's or Hugging Face's."""
    return tuple(name for name, known in TARGETS.items() if {name, *known.modules} & set(targets))


def synthetic_config(
    adapter_dim: int,
    alpha: float,
    targets: Iterable[str],
    base: str,
    architecture: Architecture | None,
) -> dict:
    """The fields of NeMo's ``model_config.yaml`` that describe an adapter which another program
    wrote."""
    lora = {
        "variant": "nemo",
        "target_modules": list(nemo_targets(targets)),
        "adapter_dim": adapter_dim,
        "alpha": alpha,
    }
    config = {
        "peft": {"peft_scheme": "lora", "lora_tuning": lora},
        "restore_from_path": base or None,
    }
    if architecture is None:
        return config
    sizes = {
        "num_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "ffn_hidden_size": architecture.ffn,
        "num_attention_heads": architecture.qkv.attention,
        "num_query_groups": architecture.qkv.groups,
        "kv_channels": architecture.qkv.channels,
        "activation": architecture.activation,
    }
    return sizes | config | {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
