"""Read the LoRA adapter of NeMo's script path: a ``.nemo``, or the Lightning ``.ckpt`` that a training leaves beside it.

Formats and names: ``PEFT_MODULE_MAP``, ``LoraPEFTConfig`` (``nemo/collections/nlp/parts/peft_config.py``) and ``AdapterName``
(``.../megatron/adapters/parallel_adapters.py``) of nemo-toolkit 2.4.1. The update of a layer is
``alpha / adapter_dim * linear_out @ linear_in`` (``ParallelLinearAdapter.forward``).
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workshop_utils.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint, UnsupportedAdapter
from workshop_utils.export.adapter import TARGETS, Architecture, Halves, LoraAdapter, as_tensor, fingerprint
from workshop_utils.export.qkv import ORDERS, Heads
from workshop_utils.export.rank_parts import merge
from workshop_utils.formats import lightning, nemo_archive, saved_tensors, values
from workshop_utils.formats.findings import Report, stop
from workshop_utils.formats.rank_files import WEIGHTS, rank_files, sizes
from workshop_utils.paths import shown

if TYPE_CHECKING:
    from torch import Tensor

_GROUPS_OF_TARGETS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(TARGETS.values()),
}
_KEY = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:self_attention|mlp)\.adapter_layer\.(\w+)\.(linear_in|linear_out)\.weight")
_ANY_ADAPTER = re.compile(r".*\.adapter_layer\.(\w+)\..*")


class Layout(NamedTuple):
    """What an adapter's configuration and the shapes of its tensors say; fields as in :class:`.adapter.LoraAdapter`."""

    architecture: Architecture
    rank: int
    alpha: float
    targets: tuple[str, ...]
    weights: dict[tuple[int, str], Halves]


def read_nemo(source: Path) -> LoraAdapter:
    """The adapter in the ``.nemo`` ``source``; errors as :func:`workshop_utils.export.adapter.read_adapter`."""
    config = nemo_archive.read_config(source)
    stated_lora(source, config)
    return _adapter(source, config, read_state(source, config))


def read_ckpt(source: Path) -> LoraAdapter:
    """The adapter in the Lightning checkpoint ``source``, with the configuration in it or in ``version_N/hparams.yaml`` beside it.

    Nothing of the file is unpickled by torch: it holds the optimizer's state and objects of Lightning's. Errors as :func:`read_nemo`.
    """
    checkpoint = lightning.describe(source)
    with source.open("rb") as file:
        config, _ = lightning.configuration(source, saved_tensors.read_state(file, shown(source)))
    if not config:
        raise DamagedCheckpoint(
            f"{shown(source)} has no configuration that can be read, and no version_N/hparams.yaml lies beside checkpoints/: rank, alpha "
            "and heads are not known. Give the .nemo of the same run, or put hparams.yaml back."
        )
    stated_lora(source, config)
    state = {tensor.name: as_tensor(values.read_tensor(checkpoint, tensor)) for tensor in checkpoint.tensors}
    return _adapter(source, dict(config), state)


def _adapter(source: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> LoraAdapter:
    layout = read_layout(source, config, state)
    order = _workshop_section(config).get("qkv_order", "interleaved")
    if order not in ORDERS:
        raise DamagedCheckpoint(f"{shown(source)}: workshop.qkv_order is {order!r}; it must be one of {', '.join(ORDERS)}.")
    return LoraAdapter(source, fingerprint(source), config, *layout[:4], order, _base(config), layout.weights)


def read_layout(source: Path, config: dict[str, Any], state: Mapping[str, Any], report: Report = stop) -> Layout:
    """What ``config`` and the shapes of the tensors ``state`` say: halves, ranks, targets and layers, each checked against the others.

    ``state`` maps each key to anything with a ``shape``; no values are looked at. Errors as :func:`read_adapter`; those of one layer or
    tensor go to ``report``.
    """
    lora = stated_lora(source, config)
    architecture = _architecture(source, config)
    rank, alpha = _rank_and_alpha(source, lora)
    weights, broken = _weights(source, state, report)
    targets = _targets(source, lora, {*weights, *broken}, report)
    _check_layers(source, architecture.num_layers, targets, {*weights, *broken}, report)
    _check_shapes(source, architecture, weights, rank, report)
    return Layout(architecture, rank, alpha, targets, weights)


def _workshop_section(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("workshop")
    return section if isinstance(section, dict) else {}


def _base(config: dict[str, Any]) -> str:
    """The base model's name: what an earlier export recorded, else the last part of the path it was restored from."""
    recorded = _workshop_section(config).get("base")
    return str(recorded) if recorded else Path(str(config.get("restore_from_path") or "")).name.removesuffix(".nemo")


def stated_lora(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``peft.lora_tuning`` of the configuration, after checking that this is plain LoRA."""
    peft = config.get("peft")
    scheme = peft.get("peft_scheme") if isinstance(peft, dict) else None
    if scheme != "lora":
        what = "a whole model" if scheme in (None, "none") else f"an adapter of another kind ({scheme})"
        raise NotACheckpoint(f"{shown(source)} is {what}: peft.peft_scheme in model_config.yaml is {scheme!r}, not 'lora'.")
    lora = peft.get("lora_tuning")
    if not isinstance(lora, dict):
        raise DamagedCheckpoint(f"{shown(source)}: model_config.yaml has no section peft.lora_tuning.")
    if lora.get("variant", "nemo") != "nemo":
        raise UnsupportedAdapter(
            f"{shown(source)}: peft.lora_tuning.variant is {lora['variant']!r}; only 'nemo' (fused q, k, v) can be exported."
        )
    for field in ("layer_selection", "weight_tying"):
        if lora.get(field):
            raise UnsupportedAdapter(
                f"{shown(source)}: peft.lora_tuning.{field} is set; only adapters with their own weights in every layer can be "
                "exported."
            )
    return lora


def _number(source: Path, config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DamagedCheckpoint(f"{shown(source)}: {field} in model_config.yaml is {value!r}; it must be a positive integer.")
    return value


def _architecture(source: Path, config: dict[str, Any]) -> Architecture:
    """Defaults as in ``LoraPEFTConfig``: groups default to heads, ``kv_channels`` to ``hidden_size / heads``."""
    hidden, heads = _number(source, config, "hidden_size"), _number(source, config, "num_attention_heads")
    groups = _number(source, config, "num_query_groups", default=heads)
    if heads % groups:
        raise DamagedCheckpoint(f"{shown(source)}: num_attention_heads {heads} is not a multiple of num_query_groups {groups}.")
    if config.get("kv_channels") is None and hidden % heads:
        raise DamagedCheckpoint(
            f"{shown(source)}: kv_channels is not set, and hidden_size {hidden} is not a multiple of num_attention_heads {heads}."
        )
    return Architecture(
        hidden_size=hidden,
        ffn_hidden_size=_number(source, config, "ffn_hidden_size", default=4 * hidden),
        num_layers=_number(source, config, "num_layers"),
        heads=Heads(heads, groups, _number(source, config, "kv_channels", default=hidden // heads)),
        activation=str(config.get("activation")),
    )


def _rank_and_alpha(source: Path, lora: dict[str, Any]) -> tuple[int, float]:
    rank = _number(source, lora, "adapter_dim")
    alpha = lora.get("alpha")
    if alpha is None:
        raise DamagedCheckpoint(
            f"{shown(source)}: model_config.yaml has no peft.lora_tuning.alpha, so the adapter's scale is not recorded. NeMo trains"
            f" with alpha = adapter_dim then: write `alpha: {rank}` there if that is how it was trained."
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise DamagedCheckpoint(f"{shown(source)}: peft.lora_tuning.alpha is {alpha!r}; it must be a positive number.")
    return rank, alpha


def read_state(source: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the archive by name; the parts of several model-parallel ranks are put together. Errors as :func:`read_adapter`."""
    files = rank_files(member.name for member in nemo_archive.members(source))
    if not files:
        raise DamagedCheckpoint(f"{shown(source)} has no {WEIGHTS}.")
    stated = tuple(_number(source, config, f"{kind}_model_parallel_size", default=1) for kind in ("tensor", "pipeline"))
    if stated != sizes(files) or len(files) != stated[0] * stated[1]:
        raise DamagedCheckpoint(
            f"{shown(source)}: model_config.yaml names {stated[0]} tensor-parallel ranks x {stated[1]} pipeline stages, the archive holds "
            f"{', '.join(files.values())}."
        )
    parts = {rank: _load_tensors(source, file) for rank, file in files.items()}
    if len(parts) == 1:
        return parts[0, 0]
    architecture = _architecture(source, config)
    return merge(source, parts, architecture.num_layers, architecture.gated)


def _load_tensors(source: Path, member: str) -> dict[str, Tensor]:
    import torch

    try:
        # From the archive itself: the bytes are never in memory beside the tensors.
        with nemo_archive.open_member(source, member) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "it is not a tensor file"
        raise UnsafeCheckpoint(f"{shown(source)}: {member} holds something else than tensors: {reason}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{shown(source)}: {member} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not state:
        raise NotACheckpoint(f"{shown(source)}: {member} holds no tensors by name.")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise NotACheckpoint(f"{shown(source)}: {key!r} in {member} is a {type(value).__name__}, not a tensor.")
    return state


def _weights(
    source: Path, state: Mapping[str, Tensor], report: Report
) -> tuple[dict[tuple[int, str], Halves], set[tuple[int, str]]]:
    """The flat ``state`` by layer and target, and those that lack a half.

    Prefixes before ``layers.`` differ between versions and are dropped.
    """
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if not match or match[2] not in TARGETS:
            adapter = _ANY_ADAPTER.fullmatch(key)
            if not adapter:
                raise NotACheckpoint(f"{shown(source)} is not a LoRA adapter: it holds the tensor {key!r}.")
            known = ", ".join(TARGETS)
            raise UnsupportedAdapter(f"{shown(source)}: unknown adapter {adapter[1]!r} in the key {key!r}. Known are {known}.")
        one = halves.setdefault((int(match[1]), TARGETS[match[2]]), {})
        if match[3] in one:
            report(
                DamagedCheckpoint(
                    f"{shown(source)}: two tensors for {match[3]} of layer {match[1]}; the second is {key!r}.", key
                )
            )
        one[match[3]] = tensor
    for (layer, target), one in halves.items():
        for half in Halves._fields:
            if half not in one:
                name = short_key(layer, target, half)
                report(DamagedCheckpoint(f"{shown(source)}: layer {layer}, {target} has no {half}.weight.", name))
    whole = [place for place, one in halves.items() if len(one) == len(Halves._fields)]
    whole.sort(key=lambda place: (place[0], list(TARGETS.values()).index(place[1])))
    return {place: Halves(**halves[place]) for place in whole}, halves.keys() - set(whole)


def short_key(layer: int, target: str, half: str) -> str:
    """The key of a tensor, without the prefix that differs between versions."""
    block = "self_attention" if target.startswith("attention") else "mlp"
    adapter = next(name for name, its_target in TARGETS.items() if its_target == target)
    return f"layers.{layer}.{block}.adapter_layer.{adapter}.{half}.weight"


def _targets(source: Path, lora: dict[str, Any], places: set[tuple[int, str]], report: Report) -> tuple[str, ...]:
    """The targets in the tensors, after checking them against ``target_modules`` (NeMo's default is attention_qkv)."""
    named = lora.get("target_modules") or ["attention_qkv"]
    named = [named] if isinstance(named, str) else named
    wanted = {target for name in named for target in _GROUPS_OF_TARGETS.get(name, (name,))}
    unknown = sorted(wanted - set(TARGETS.values()))
    if unknown:
        raise UnsupportedAdapter(f"{shown(source)}: unknown target {unknown[0]!r} in peft.lora_tuning.target_modules.")
    found = {target for _, target in places}
    if found != wanted:
        report(
            DamagedCheckpoint(
                f"{shown(source)}: peft.lora_tuning.target_modules names {', '.join(sorted(wanted))}, but the tensors are for "
                f"{', '.join(sorted(found))}."
            )
        )
    return tuple(target for target in TARGETS.values() if target in found)


def _check_layers(source: Path, count: int, targets: tuple[str, ...], places: set[tuple[int, str]], report: Report) -> None:
    """Every one of ``count`` layers has every target, and there are no others."""
    for layer, target in sorted(places):
        if layer >= count:
            message = f"{shown(source)}: a tensor for layer {layer}, but num_layers is {count}."
            report(DamagedCheckpoint(message, short_key(layer, target, "linear_in")))
    for layer in range(count):
        for target in targets:
            if (layer, target) not in places:
                message = f"{shown(source)}: layer {layer} has no adapter for {target}."
                report(DamagedCheckpoint(message, short_key(layer, target, "linear_in")))


def _check_shapes(
    source: Path, architecture: Architecture, weights: dict[tuple[int, str], Halves], rank: int, report: Report
) -> None:
    """Both halves have the shapes that the configuration implies."""
    for (layer, target), halves in weights.items():
        inputs, outputs = architecture.features(target)
        for half, tensor, shape in zip(Halves._fields, halves, ((rank, inputs), (outputs, rank)), strict=True):
            if tuple(tensor.shape) != shape:
                message = (
                    f"{shown(source)}: layer {layer}, {target} {half}.weight is {list(tensor.shape)}, but model_config.yaml "
                    f"(adapter_dim {rank}, hidden_size {architecture.hidden_size}, ffn_hidden_size "
                    f"{architecture.ffn_hidden_size}, heads/groups/channels {'/'.join(map(str, architecture.heads))}) asks for "
                    f"{list(shape)}."
                )
                report(DamagedCheckpoint(message, short_key(layer, target, half)))
