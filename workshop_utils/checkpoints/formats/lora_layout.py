"""Names, shapes, ranks and scales of LoRA adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.nemo1_config import ACTIVATIONS
from workshop_utils.checkpoints.formats.qkv import Heads
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor


#: The adapter's name in a key of NeMo's script path, and the target it belongs to, in the order of
#: a forward pass.
TARGETS = {
    "lora_kqv_adapter": "attention_qkv",
    "lora_dense_attention_adapter": "attention_dense",
    "lora_hto4h_adapter": "mlp_fc1",
    "lora_4htoh_adapter": "mlp_fc2",
}


class Halves(NamedTuple):
    """The two matrices of one adapter: ``linear_in`` (A) ``[r, in]`` and ``linear_out`` (B) ``[out,
    r]``."""

    linear_in: Tensor
    linear_out: Tensor


@dataclass(frozen=True)
class Architecture:
    """The numbers of the base model that fix the shapes of an adapter. ``activation`` is that of
    the MLP, by NeMo 1's name."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    heads: Heads
    activation: str | None

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate: mlp_fc1 is then gate_proj and up_proj, else up_proj alone."""
        return ACTIVATIONS.get(self.activation, ("", False))[1]

    def features(self, target: str) -> tuple[int, int]:
        """Input and output features of the linear layer that ``target`` names, NeMo's or Hugging
        Face's."""
        attention, groups = (
            self.heads.attention * self.heads.channels,
            self.heads.groups * self.heads.channels,
        )
        return {
            "attention_qkv": (self.hidden_size, self.heads.rows),
            "attention_dense": (attention, self.hidden_size),
            "mlp_fc1": (self.hidden_size, self.ffn_hidden_size * (2 if self.gated else 1)),
            "mlp_fc2": (self.ffn_hidden_size, self.hidden_size),
            "self_attn.q_proj": (self.hidden_size, attention),
            "self_attn.k_proj": (self.hidden_size, groups),
            "self_attn.v_proj": (self.hidden_size, groups),
            "self_attn.o_proj": (attention, self.hidden_size),
            "mlp.gate_proj": (self.hidden_size, self.ffn_hidden_size),
            "mlp.up_proj": (self.hidden_size, self.ffn_hidden_size),
            "mlp.down_proj": (self.ffn_hidden_size, self.hidden_size),
        }[target]


def of_pattern(config: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """What the table ``name`` (``rank_pattern``, ``alpha_pattern``) gives ``module``, else
    ``default``.

    PEFT's rule: a key matches the end of the module's name. It takes keys as regular expressions;
    those of a stranger may run for ever, so only plain names are looked at. Raises
    :class:`UnsupportedAdapter` for another key.
    """
    pattern = config.get(name)
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        plain = str(key).removeprefix("^").removeprefix("base_model.model.").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise UnsupportedAdapter(
                f"adapter_config.json: the key {key!r} of {name} is a pattern; only plain names "
                "are read."
            )
        if module == plain or module.endswith(f".{plain}"):
            return value
    return default


_GROUPS_OF_TARGETS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(TARGETS.values()),
}


_KEY = re.compile(
    r"(?:.*\.)?layers\.(\d+)\.(?:self_attention|mlp)\.adapter_layer\.(\w+)\.(linear_in|linear_out)\.weight"
)


_ANY_ADAPTER = re.compile(r".*\.adapter_layer\.(\w+)\..*")


class Layout(NamedTuple):
    """What an adapter's configuration and the shapes of its tensors say; fields as in
    :class:`.adapter.LoraAdapter`."""

    architecture: Architecture
    rank: int
    alpha: float
    targets: tuple[str, ...]
    weights: dict[tuple[int, str], Halves]


def read_layout(
    source: Path, config: dict[str, Any], state: Mapping[str, Any], report: Report = stop
) -> Layout:
    """What ``config`` and the shapes of the tensors ``state`` say: halves, ranks, targets and
    layers, each checked against the others.

    ``state`` maps each key to anything with a ``shape``; no values are looked at. Errors as
    :func:`read_adapter`; those of one layer or tensor go to ``report``.
    """
    lora = stated_lora(source, config)
    architecture = architecture_of(source, config)
    rank, alpha = _rank_and_alpha(source, lora)
    weights, broken = _weights(source, state, report)
    targets = _targets(source, lora, {*weights, *broken}, report)
    _check_layers(source, architecture.num_layers, targets, {*weights, *broken}, report)
    _check_shapes(source, architecture, weights, rank, report)
    return Layout(architecture, rank, alpha, targets, weights)


def stated_lora(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``peft.lora_tuning`` of the configuration, after checking that this is plain LoRA."""
    peft = config.get("peft")
    scheme = peft.get("peft_scheme") if isinstance(peft, dict) else None
    if scheme != "lora":
        what = (
            "a whole model"
            if scheme in (None, "none")
            else f"an adapter of another kind ({scheme})"
        )
        raise NotACheckpoint(
            f"{shown(source)} is {what}: peft.peft_scheme in model_config.yaml is {scheme!r}, "
            "not 'lora'."
        )
    lora = peft.get("lora_tuning")
    if not isinstance(lora, dict):
        raise DamagedCheckpoint(
            f"{shown(source)}: model_config.yaml has no section peft.lora_tuning."
        )
    if lora.get("variant", "nemo") != "nemo":
        raise UnsupportedAdapter(
            f"{shown(source)}: peft.lora_tuning.variant is {lora['variant']!r}; only 'nemo' "
            "(fused q, k, v) can be exported."
        )
    for field in ("layer_selection", "weight_tying"):
        if lora.get(field):
            raise UnsupportedAdapter(
                f"{shown(source)}: peft.lora_tuning.{field} is set; only adapters with their own "
                "weights in every layer can be exported."
            )
    return lora


def number_of(source: Path, config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DamagedCheckpoint(
            f"{shown(source)}: {field} in model_config.yaml is {value!r}; it must be a positive "
            "integer."
        )
    return value


def architecture_of(source: Path, config: dict[str, Any]) -> Architecture:
    """Defaults as in ``LoraPEFTConfig``: groups default to heads, ``kv_channels`` to ``hidden_size
    / heads``."""
    hidden, heads = (
        number_of(source, config, "hidden_size"),
        number_of(source, config, "num_attention_heads"),
    )
    groups = number_of(source, config, "num_query_groups", default=heads)
    if heads % groups:
        raise DamagedCheckpoint(
            f"{shown(source)}: num_attention_heads {heads} is not a multiple of num_query_groups "
            f"{groups}."
        )
    if config.get("kv_channels") is None and hidden % heads:
        raise DamagedCheckpoint(
            f"{shown(source)}: kv_channels is not set, and hidden_size {hidden} is not a "
            f"multiple of num_attention_heads {heads}."
        )
    return Architecture(
        hidden_size=hidden,
        ffn_hidden_size=number_of(source, config, "ffn_hidden_size", default=4 * hidden),
        num_layers=number_of(source, config, "num_layers"),
        heads=Heads(
            heads, groups, number_of(source, config, "kv_channels", default=hidden // heads)
        ),
        activation=str(config.get("activation")),
    )


def _rank_and_alpha(source: Path, lora: dict[str, Any]) -> tuple[int, float]:
    rank = number_of(source, lora, "adapter_dim")
    alpha = lora.get("alpha")
    if alpha is None:
        raise DamagedCheckpoint(
            f"{shown(source)}: model_config.yaml has no peft.lora_tuning.alpha, so the adapter's "
            "scale is not recorded. NeMo trains with alpha = adapter_dim then: write `alpha: "
            f"{rank}` there if that is how it was trained."
        )
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not math.isfinite(alpha)
        or alpha <= 0
    ):
        raise DamagedCheckpoint(
            f"{shown(source)}: peft.lora_tuning.alpha is {alpha!r}; it must be a positive number."
        )
    return rank, alpha


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
                raise NotACheckpoint(
                    f"{shown(source)} is not a LoRA adapter: it holds the tensor {key!r}."
                )
            known = ", ".join(TARGETS)
            raise UnsupportedAdapter(
                f"{shown(source)}: unknown adapter {adapter[1]!r} in the key {key!r}. Known are "
                f"{known}."
            )
        one = halves.setdefault((int(match[1]), TARGETS[match[2]]), {})
        if match[3] in one:
            report(
                DamagedCheckpoint(
                    f"{shown(source)}: two tensors for {match[3]} of layer {match[1]}; the "
                    f"second is {key!r}.",
                    key,
                )
            )
        one[match[3]] = tensor
    for (layer, target), one in halves.items():
        for half in Halves._fields:
            if half not in one:
                name = short_key(layer, target, half)
                report(
                    DamagedCheckpoint(
                        f"{shown(source)}: layer {layer}, {target} has no {half}.weight.", name
                    )
                )
    whole = [place for place, one in halves.items() if len(one) == len(Halves._fields)]
    whole.sort(key=lambda place: (place[0], list(TARGETS.values()).index(place[1])))
    return {place: Halves(**halves[place]) for place in whole}, halves.keys() - set(whole)


def short_key(layer: int, target: str, half: str) -> str:
    """The key of a tensor, without the prefix that differs between versions."""
    block = "self_attention" if target.startswith("attention") else "mlp"
    adapter = next(name for name, its_target in TARGETS.items() if its_target == target)
    return f"layers.{layer}.{block}.adapter_layer.{adapter}.{half}.weight"


def _targets(
    source: Path, lora: dict[str, Any], places: set[tuple[int, str]], report: Report
) -> tuple[str, ...]:
    """The targets in the tensors, after checking them against ``target_modules`` (NeMo's default is
    attention_qkv)."""
    named = lora.get("target_modules") or ["attention_qkv"]
    named = [named] if isinstance(named, str) else named
    wanted = {target for name in named for target in _GROUPS_OF_TARGETS.get(name, (name,))}
    unknown = sorted(wanted - set(TARGETS.values()))
    if unknown:
        raise UnsupportedAdapter(
            f"{shown(source)}: unknown target {unknown[0]!r} in peft.lora_tuning.target_modules."
        )
    found = {target for _, target in places}
    if found != wanted:
        report(
            DamagedCheckpoint(
                f"{shown(source)}: peft.lora_tuning.target_modules names "
                f"{', '.join(sorted(wanted))}, but the tensors are for "
                f"{', '.join(sorted(found))}."
            )
        )
    return tuple(target for target in TARGETS.values() if target in found)


def _check_layers(
    source: Path, count: int, targets: tuple[str, ...], places: set[tuple[int, str]], report: Report
) -> None:
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
    source: Path,
    architecture: Architecture,
    weights: dict[tuple[int, str], Halves],
    rank: int,
    report: Report,
) -> None:
    """Both halves have the shapes that the configuration implies."""
    for (layer, target), halves in weights.items():
        inputs, outputs = architecture.features(target)
        for half, tensor, shape in zip(
            Halves._fields, halves, ((rank, inputs), (outputs, rank)), strict=True
        ):
            if tuple(tensor.shape) != shape:
                message = (
                    f"{shown(source)}: layer {layer}, {target} {half}.weight is "
                    f"{list(tensor.shape)}, but model_config.yaml (adapter_dim {rank}, "
                    f"hidden_size {architecture.hidden_size}, ffn_hidden_size "
                    f"{architecture.ffn_hidden_size}, heads/groups/channels "
                    f"{'/'.join(map(str, architecture.heads))}) asks for {list(shape)}."
                )
                report(DamagedCheckpoint(message, short_key(layer, target, half)))
