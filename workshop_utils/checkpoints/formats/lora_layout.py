"""LoRA adapters on disk: what their tensors are called, and their targets, layers, ranks, scales
and shapes. Whoever reads, writes, verifies or serves an adapter asks here.

    NeMo 1     model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight
    NeMo 2.0   module.decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight
               (stacked: [layers, r, in]; Megatron-Bridge numbers the layers)
    PEFT       base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

Half A is ``linear_in`` or ``lora_A``, ``[r, in]``; half B is ``linear_out`` or ``lora_B``,
``[out, r]``.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workshop_utils.checkpoints.formats.architecture import Architecture, number, size
from workshop_utils.checkpoints.formats.findings import Code, Report, stop
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor

PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""What PEFT expects in front of the base's own name of a module."""


class Target(NamedTuple):
    """A linear layer of NeMo: its adapter's name in NeMo 1, its own in NeMo 2.0, and Hugging Face's
    modules for it, in the order of B's rows."""

    nemo1: str
    nemo2: str
    modules: tuple[str, ...]


#: In the order of a forward pass.
TARGETS = {
    "attention_qkv": Target(
        "lora_kqv_adapter",
        "self_attention.linear_qkv",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    "attention_dense": Target(
        "lora_dense_attention_adapter", "self_attention.linear_proj", ("self_attn.o_proj",)
    ),
    "mlp_fc1": Target("lora_hto4h_adapter", "mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp_fc2": Target("lora_4htoh_adapter", "mlp.linear_fc2", ("mlp.down_proj",)),
}
MODULES = tuple(module for target in TARGETS.values() for module in target.modules)
"""Hugging Face's, of a Llama-like layer."""
_ORDER = [*TARGETS, *MODULES]
_GROUPS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(TARGETS),
}
_NEMO1_FUSED = {target.nemo1: name for name, target in TARGETS.items()}
_NEMO1_TARGETS = _NEMO1_FUSED | {
    "lora_unfused_kqv_adapter": "attention_qkv",
    "lora_unfused_hto4h_adapter": "mlp_fc1",
}
#: What stands at the end of a tensor's name, by the program that wrote it.
_ENDS = {
    "nemo1": r"\.adapter_layer\.(?P<adapter>\w+)(?:\.(?P<part>\w+))?\.linear_(?P<half>in|out)",
    "nemo2": r"\.adapter\.(?:adapter_(?P<part>\w+)\.)?(?:linear|weight)_(?P<half>in|out|magnitude)",
    "peft": r"\.lora_(?:embedding_)?(?P<half>A|B|magnitude)(?:_vector)?"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)\w+))?",
}
_ENDS = {style: re.compile(rf"{end}(?:\.weight)?$") for style, end in _ENDS.items()}
_LAYER = re.compile(r"(?:^|\.)layers\.(?:(\d{1,6})\.)?(.+)")


class Key(NamedTuple):
    """What the name of an adapter's tensor says. ``stem`` is the module in full, ``module`` what
    follows its layer; ``layer`` is None where layers are stacked, or outside of them; ``half`` is
    A, B or magnitude; ``part`` is one of q, k, v, gate, up of an adapter of their own; ``adapter``
    is NeMo 1's name, or the one that PEFT keeps in memory."""

    style: str
    stem: str
    layer: int | None
    module: str
    half: str
    part: str
    adapter: str

    @property
    def target(self) -> str:
        """What it adapts, in the words of the program that wrote it."""
        if self.style == "nemo1":
            return _NEMO1_TARGETS.get(self.adapter, self.adapter)
        name = self.module.rpartition(".")[2]
        if not self.part:
            return name
        # CanonicalLoRA has one adapter for each of q, k and v, and for up and gate.
        return f"linear_fc1_{self.part}" if self.part in ("up", "gate") else f"linear_{self.part}"


def parse(name: str) -> Key | None:
    """What ``name`` says, or None where it is no adapter's."""
    for style, pattern in _ENDS.items():
        if end := pattern.search(name):
            stem, said = name[: end.start()], end.groupdict()
            layer = _LAYER.search(stem)
            return Key(
                style,
                stem,
                int(layer[1]) if layer and layer[1] else None,
                layer[2] if layer else stem,
                {"in": "A", "out": "B"}.get(said["half"], said["half"]),
                said.get("part") or "",
                said.get("adapter") or "",
            )
    return None


def nemo1_key(layer: int, target: str, half: str) -> str:
    """NeMo 1's name of a tensor, without the prefix that differs between versions."""
    block = "self_attention" if target.startswith("attention") else "mlp"
    side = "linear_in" if half == "A" else "linear_out"
    return f"layers.{layer}.{block}.adapter_layer.{TARGETS[target].nemo1}.{side}.weight"


def peft_key(layer: int, module: str, half: str) -> str:
    """PEFT's name of a tensor of ``module`` (as in :data:`MODULES`)."""
    end = "lora_magnitude_vector" if half == "magnitude" else f"lora_{half}.weight"
    return f"{PEFT_PREFIX}model.layers.{layer}.{module}.{end}"


def is_peft_key(name: str) -> bool:
    """Whether PEFT finds the place of ``name`` in a Llama-like model, and servers do."""
    key = parse(name)
    return bool(key and key.layer is not None and name == peft_key(key.layer, key.module, key.half))


@dataclass(frozen=True)
class LoraTensors:
    """What tensors say of their adapter. ``ranks`` are the different ones, sorted; DoRA has a
    vector of magnitudes for each target as well."""

    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    is_dora: bool

    @property
    def rank(self) -> int | None:
        """The rank, where it is one."""
        return self.ranks[0] if len(self.ranks) == 1 else None


def find(tensors: Iterable[Any]) -> LoraTensors | None:
    """What the adapter tensors among ``tensors`` say, or None when there are none."""
    keys = [(key, tensor) for tensor in tensors if (key := parse(tensor.name))]
    first = [(key, tensor) for key, tensor in keys if key.half == "A" and len(tensor.shape) >= 2]
    if not first:
        return None
    return LoraTensors(
        tuple(sorted({tensor.shape[-2] for _, tensor in first})),
        tuple(sorted({key.target for key, _ in first})),
        any(key.half == "magnitude" for key, _ in keys),
    )


class Halves(NamedTuple):
    """The two matrices of one adapter: ``linear_in`` (A) ``[r, in]`` and ``linear_out`` (B) ``[out,
    r]``."""

    linear_in: Tensor
    linear_out: Tensor


def features(sizes: Architecture, target: str) -> tuple[int, int]:
    """Input and output features of the linear layer that ``target`` names, NeMo's or Hugging
    Face's, in a base of ``sizes``."""
    hidden, ffn = sizes.hidden, sizes.ffn
    query, group = sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    return {
        "attention_qkv": (hidden, sizes.qkv.rows),
        "attention_dense": (query, hidden),
        "mlp_fc1": (hidden, ffn * (2 if sizes.gated else 1)),
        "mlp_fc2": (ffn, hidden),
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, group),
        "self_attn.v_proj": (hidden, group),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, ffn),
        "mlp.up_proj": (hidden, ffn),
        "mlp.down_proj": (ffn, hidden),
    }[target]


def modules_of(target: str, sizes: Architecture | None) -> tuple[str, ...]:
    """Hugging Face's modules for ``target`` in a base of ``sizes``, in the order of B's parts; a
    module of Hugging Face's is itself."""
    if target == "mlp_fc1" and sizes and not sizes.gated:
        return ("mlp.up_proj",)
    return TARGETS[target].modules if target in TARGETS else (target,)


def ordered(targets: Iterable[str]) -> tuple[str, ...]:
    """``targets``, NeMo's or Hugging Face's, each once, in the order of a forward pass."""
    return tuple(sorted(set(targets), key=_ORDER.index))


_MOST_PLACES = 1_000_000

Place = tuple[int, str]
"""Layer (-1: outside of the layers, or all of them stacked) and module."""
Shape = tuple[int | None, ...]
"""None for a size that is not known."""


def faults(
    places: Mapping[Place, Mapping[str, Any]],
    layers: Collection[int],
    shapes: Callable[[int, str], tuple[Shape, Shape]],
    name: Callable[[int, str, str], str],
    stated: str,
) -> Iterator[tuple[Code, str, str]]:
    """What is wrong with an adapter, and the tensor each time: every place has both halves, of one
    rank and in the ``shapes`` of (A, B) that ``stated`` asks for, and each of ``layers``, and no
    other, has every module.

    ``places`` maps to the halves, A ``[..., r, in]`` and B ``[..., out, r]``: anything with a
    ``shape``. ``name`` is the name of a half.
    """
    modules = {module for layer, module in places if layer >= 0}
    if len(layers) * len(modules) > _MOST_PLACES:
        text = f"{len(layers):,} layers and {len(modules):,} modules are no adapter"
        yield Code.LAYERS, text, ""
        return
    for (layer, module), halves in sorted(places.items()):
        title = module.rpartition("*.")[2]
        spot = f"layer {layer}, {title}" if layer >= 0 else title
        axes = shapes(layer, module)
        for half, shape in zip("AB", axes, strict=True):
            tensor = name(layer, module, half)
            end = ".".join(tensor.split(".")[-2:])
            if half not in halves:
                yield Code.HALF, f"{spot} has no {end}: {tensor} is missing", tensor
                continue
            have = tuple(halves[half].shape)
            # A convolution, which only PEFT adapts, has two more.
            more = len(have) - len(shape)
            fit = all(want in (None, its) for want, its in zip(shape, have, strict=False))
            if not fit or more < 0 or (more and None not in shape):
                asked = ", ".join("*" if want is None else str(want) for want in shape)
                text = f"{spot} {end} is {[*have]}, but {stated} asks for [{asked}]"
                yield Code.SHAPE, text, tensor
        a, b = (tuple(halves[half].shape) if half in halves else () for half in "AB")
        at = len(axes[0]) - 2
        if a and b and axes[0][at] is None and a[at : at + 1] != b[at + 1 : at + 2]:
            text = f"{spot}: A is {[*a]} and B is {[*b]}, of another rank"
            yield Code.RANK, text, name(layer, module, "B")
        if layer >= 0 and layer not in layers:
            text = f"a tensor for layer {layer}, but {stated} has {len(layers)} layers"
            yield Code.LAYERS, text, name(layer, module, "A")
    for layer, module in itertools.product(sorted(layers), sorted(modules)):
        if (layer, module) not in places:
            text = f"layer {layer} has no adapter for {module.rpartition('*.')[2]}"
            yield Code.MISSING_TENSOR, text, name(layer, module, "A")


class Layout(NamedTuple):
    """What the configuration of NeMo 1's adapter and the shapes of its tensors say."""

    architecture: Architecture
    rank: int
    alpha: float
    targets: tuple[str, ...]
    weights: dict[Place, Halves]


def read_layout(
    source: Path, config: dict[str, Any], state: Mapping[str, Any], report: Report = stop
) -> Layout:
    """What ``config`` and the shapes of the tensors ``state`` say: halves, ranks, targets and
    layers, each checked against the others.

    ``state`` maps each key to anything with a ``shape``; no values are looked at. Errors as
    :func:`workshop_utils.adapters.read.read_adapter`; those of one layer or tensor go to
    ``report``.
    """
    where = shown(source)
    lora = stated_lora(source, config)
    architecture = architecture_of(source, config)
    rank = number_of(source, lora, "adapter_dim")
    alpha = lora.get("alpha")
    if alpha is None:
        raise DamagedCheckpoint(
            f"{where}: model_config.yaml has no peft.lora_tuning.alpha, so the adapter's scale is "
            f"not recorded. NeMo trains with alpha = adapter_dim then: write `alpha: {rank}` there "
            "if that is how it was trained."
        )
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise DamagedCheckpoint(
            f"{where}: peft.lora_tuning.alpha is {alpha!r}; it must be a positive number."
        )
    places: dict[Place, dict[str, Any]] = {}
    for name, tensor in state.items():
        key = parse(name)
        if not key or key.style != "nemo1":
            if ".adapter_layer." not in name:
                raise NotACheckpoint(
                    f"{where} is not a LoRA adapter: it holds the tensor {name!r}."
                )
        elif key.layer is not None and not key.part and key.adapter in _NEMO1_FUSED:
            halves = places.setdefault((key.layer, key.target), {})
            if key.half in halves:
                message = f"{where}: two tensors for {nemo1_key(key.layer, key.target, key.half)}; "
                report(DamagedCheckpoint(f"{message}the second is {name!r}.", name))
            halves[key.half] = tensor
            continue
        raise UnsupportedAdapter(
            f"{where}: unknown adapter in the key {name!r}. Known are {', '.join(_NEMO1_FUSED)}."
        )
    targets = _targets(source, lora, {target for _, target in places}, report)
    stated = (
        f"model_config.yaml (adapter_dim {rank}, hidden_size {architecture.hidden}, "
        f"ffn_hidden_size {architecture.ffn}, num_layers {architecture.layers}, "
        f"heads/groups/channels {'/'.join(map(str, architecture.qkv))})"
    )

    def shapes(_: int, target: str) -> tuple[Shape, Shape]:
        inputs, outputs = features(architecture, target)
        return (rank, inputs), (outputs, rank)

    layers = range(architecture.layers)
    for code, fault, name in faults(places, layers, shapes, nemo1_key, stated):
        report(DamagedCheckpoint(f"{where}: {fault}.", name, code))
    weights = {
        place: Halves(places[place]["A"], places[place]["B"])
        for place in sorted(places, key=lambda place: (place[0], _ORDER.index(place[1])))
        if len(places[place]) == 2
    }
    return Layout(architecture, rank, alpha, targets, weights)


def stated_lora(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``peft.lora_tuning`` of the configuration, after checking that this is plain LoRA."""
    where = shown(source)
    peft = config.get("peft")
    scheme = peft.get("peft_scheme") if isinstance(peft, dict) else None
    if scheme != "lora":
        whole = scheme in (None, "none")
        what = "a whole model" if whole else f"an adapter of another kind ({scheme})"
        raise NotACheckpoint(
            f"{where} is {what}: peft.peft_scheme in model_config.yaml is {scheme!r}, not 'lora'."
        )
    lora = peft.get("lora_tuning")
    if not isinstance(lora, dict):
        raise DamagedCheckpoint(f"{where}: model_config.yaml has no section peft.lora_tuning.")
    if lora.get("variant", "nemo") != "nemo":
        raise UnsupportedAdapter(
            f"{where}: peft.lora_tuning.variant is {lora['variant']!r}; only 'nemo' (fused q, k, "
            "v) can be exported."
        )
    for field in ("layer_selection", "weight_tying"):
        if lora.get(field):
            raise UnsupportedAdapter(
                f"{where}: peft.lora_tuning.{field} is set; only adapters with their own weights "
                "in every layer can be exported."
            )
    return lora


def number_of(source: Path, config: dict[str, Any], field: str, default: int | None = None) -> int:
    """The positive integer ``field`` of NeMo 1's configuration."""
    value = default if config.get(field) is None else config[field]
    if type(value) is not int or value < 1:
        raise DamagedCheckpoint(
            f"{shown(source)}: {field} in model_config.yaml is {value!r}; it must be a positive "
            "integer."
        )
    return value


def architecture_of(source: Path, config: dict[str, Any]) -> Architecture:
    """Defaults as in ``LoraPEFTConfig``: groups default to heads, ``kv_channels`` to ``hidden_size
    / heads``."""
    hidden, heads = (
        number_of(source, config, name) for name in ("hidden_size", "num_attention_heads")
    )
    groups = number_of(source, config, "num_query_groups", default=heads)
    uneven = ""
    if heads % groups:
        uneven = f"num_attention_heads {heads} is not a multiple of num_query_groups {groups}"
    elif config.get("kv_channels") is None and hidden % heads:
        uneven = (
            f"kv_channels is not set, and hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}"
        )
    if uneven:
        raise DamagedCheckpoint(f"{shown(source)}: {uneven}.")
    return Architecture(
        layers=number_of(source, config, "num_layers"),
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_dim=number_of(source, config, "kv_channels", default=hidden // heads),
        ffn=number_of(source, config, "ffn_hidden_size", default=4 * hidden),
        activation=str(config.get("activation")),
    )


def _targets(
    source: Path, lora: dict[str, Any], there: set[str], report: Report
) -> tuple[str, ...]:
    """The targets in the tensors, after checking them against ``target_modules`` (NeMo's default is
    attention_qkv)."""
    named = lora.get("target_modules") or ["attention_qkv"]
    named = [named] if isinstance(named, str) else named
    stated = {target for name in named for target in _GROUPS.get(name, (name,))}
    if unknown := sorted(stated - TARGETS.keys()):
        raise UnsupportedAdapter(
            f"{shown(source)}: unknown target {unknown[0]!r} in peft.lora_tuning.target_modules."
        )
    if there != stated:
        report(
            DamagedCheckpoint(
                f"{shown(source)}: peft.lora_tuning.target_modules names "
                f"{', '.join(sorted(stated))}, but the tensors are for {', '.join(sorted(there))}.",
                code=Code.TARGETS,
            )
        )
    return ordered(there)


#: Fields of PEFT's LoraConfig (0.10 to 0.21) that are read here, or change nothing once the
#: adapter is trained.
PEFT_UNDERSTOOD = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
})  # fmt: skip
#: And those that change what is computed, and that nobody but PEFT takes into account.
PEFT_ONLY = frozenset({
    "alora_invocation_tokens", "arrow_config", "bias", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "modules_to_save", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
})  # fmt: skip
_OFF = (None, False, "none", [], {}, "")
#: What ``init_lora_weights`` says where PEFT leaves the base as it is; pissa, olora, corda, loftq
#: and lora_ga change it when they start, and again when the adapter is loaded.
_STARTS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
_TABLES = (
    "arrow_config", "auto_mapping", "alpha_pattern", "corda_config", "eva_config", "kasa_config",
    "loftq_config", "lora_ga_config", "megatron_config", "monteclora_config", "rank_pattern",
    "runtime_config", "use_bdlora", "velora_config",
)  # fmt: skip
_LISTS = ("alora_invocation_tokens", "layer_replication", "modules_to_save", "target_parameters")
#: The types of LoraConfig's fields, in JSON; null and false are "not set".
_PEFT_TYPES = (
    dict.fromkeys(_TABLES, (dict,))
    | dict.fromkeys(_LISTS, (list,))
    | dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (list, str))
    | {"layers_to_transform": (list, int), "trainable_token_indices": (list, dict), "bias": (str,)}
    | {"lora_dropout": (int, float)}
)


def peft_only(config: Mapping[str, Any]) -> list[str]:
    """The fields in ``adapter_config.json`` that only PEFT itself takes into account, and after
    them those that no PEFT up to 0.21 has."""
    fields = [name for name in sorted(PEFT_ONLY) if config.get(name) not in _OFF]
    start = config.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        fields.append("init_lora_weights")
    return fields + unknown_to_peft(config)


def unknown_to_peft(config: Mapping[str, Any]) -> list[str]:
    """The fields that are set in ``adapter_config.json`` and that no PEFT up to 0.21 has."""
    unknown = config.keys() - PEFT_ONLY - PEFT_UNDERSTOOD
    return sorted(str(name) for name in unknown if config[name] not in _OFF)


_PATIENCE = 2.0
"""Seconds for a stranger's regular expressions, which may run for ever."""
_REPEATED = re.compile(r"\{[^{}]*\}")
_PLAIN = re.compile(r"\w+(?:\.\w+)*")


def _matches(pattern: str, name: str, until: float | None = None) -> bool:
    import regex

    # It writes a repetition out, and one in another.
    counts = [int(count[:9]) for count in re.findall(r"\d+", "".join(_REPEATED.findall(pattern)))]
    if len(pattern) > 2000 or math.prod(filter(None, counts)) > 10_000:
        raise UnsupportedAdapter(f"{PEFT_CONFIG}: the pattern {pattern[:60]!r} is too large.")
    try:
        left = until - time.monotonic() if until else _PATIENCE
        if left <= 0:
            raise TimeoutError
        return regex.fullmatch(pattern, name, timeout=left) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError, ValueError) as error:
        why = "it takes too long" if isinstance(error, TimeoutError) else str(error)
        raise UnsupportedAdapter(
            f"{PEFT_CONFIG}: the pattern {pattern[:60]!r} cannot be matched: {why}."
        ) from None


def peft_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The fields of ``adapter_config.json`` at whose type PEFT breaks, and what it has to be."""
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    for name, kinds in _PEFT_TYPES.items():
        value = config.get(name)
        if value is not None and value is not False and not isinstance(value, kinds):
            expected = " or ".join(dict.fromkeys(names[kind] for kind in kinds))
            yield f"{PEFT_CONFIG}: {name} is {repr(value)[:60]}; it has to be {expected}, or null"


def of_pattern(
    config: Mapping[str, Any], name: str, module: str, default: Any, until: float | None = None
) -> Any:
    """What the table ``name`` (``rank_pattern``, ``alpha_pattern``) gives ``module``, as the base
    calls it, else ``default``: the first key that fits the end of the name, as a regular expression
    (``get_pattern_key`` in ``peft/utils/other.py``). Raises :class:`UnsupportedAdapter` for one
    that cannot be matched ``until`` then."""
    pattern = config.get(name)
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if _PLAIN.fullmatch(key):
            if f".{module}".endswith(f".{key}"):
                return value
        elif _matches(rf"(.*\.)?({key})", module, until):
            return value
    return default


def named_by(names: Any, module: str, until: float | None = None) -> set[str]:
    """What in ``target_modules`` or ``exclude_modules`` names ``module``, as the base calls it
    (``check_target_module_exists`` in ``peft/tuners/tuners_utils.py``); raises as
    :func:`of_pattern`."""
    if isinstance(names, str):
        return {names} if names == "all-linear" or _matches(names, module, until) else set()
    words = module.split(".")
    ends = {".".join(words[at:]) for at in range(len(words))}
    if not isinstance(names, Set):
        names = set(map(str, names)) if isinstance(names, list) else set()
    return ends & names


def peft_scale(config: Mapping[str, Any], module: str, rank: int) -> float | None:
    """What PEFT multiplies ``B A`` of ``module`` with: ``lora_alpha / r``, with ``use_rslora``
    ``lora_alpha / sqrt(r)``. None where alpha is no positive number."""
    alpha = of_pattern(config, "alpha_pattern", module, number(config, "lora_alpha"))
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        return None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft_faults(
    config: Mapping[str, Any], tensors: Iterable[Any]
) -> Iterator[tuple[Code, str, str]]:
    """What is wrong with a PEFT adapter by its names and shapes, and the tensor each time: see
    :func:`faults`; besides, ``target_modules`` and ``layers_to_transform`` name just what is there.
    ``Code.UNEVEN`` is none: nothing in the adapter tells whether that module had been trained.

    Tensors that are no LoRA matrices (``modules_to_save``) are left alone.
    """
    places: dict[Place, dict[str, Any]] = {}
    for tensor in tensors:
        key = parse(tensor.name)
        if key and key.style == "peft" and key.half != "magnitude":
            end = f"{key.layer}.{key.module}"
            inside = key.layer is not None
            module = f"{key.stem.removesuffix(end)}*.{key.module}" if inside else key.stem
            places.setdefault((key.layer if inside else -1, module), {})[key.half] = tensor
    if not places:
        yield Code.MISSING_TENSOR, "it holds no LoRA matrices", ""
        return

    def name(layer: int, module: str, half: str) -> str:
        tensor = places.get((layer, module), {}).get(half)
        return tensor.name if tensor else f"{module.replace('*', str(layer))}.lora_{half}.weight"

    there = {layer for layer, _ in places if layer >= 0}
    layers: Collection[int] = range(max(there, default=-1) + 1)
    if (picked := config.get("layers_to_transform")) not in (None, []):
        picks = picked if isinstance(picked, list) else [picked]
        if there != {layer for layer in picks if type(layer) is int}:
            text = (
                f"{PEFT_CONFIG} has layers_to_transform = {str(picked)[:60]}, but the tensors are "
                f"for the layers {', '.join(map(str, sorted(there)))}"
            )
            yield Code.LAYERS, text, ""
        layers = there
    for text in peft_types(config):
        yield Code.TARGETS, text, ""
    try:
        named = _Named(config, places)
    except UnsupportedAdapter as error:
        yield Code.TARGETS, str(error).removesuffix("."), ""
        return
    for layer, module in named.strangers:
        tensor = next(iter(places[layer, module].values())).name
        text = f"{tensor} is for a module that {PEFT_CONFIG} does not name in target_modules"
        yield Code.TARGETS, text, tensor
    for layer, module in named.left_out:
        tensor = next(iter(places[layer, module].values())).name
        text = f"{tensor} is for a module that {PEFT_CONFIG} leaves out (exclude_modules)"
        yield Code.TARGETS, text, tensor
    if named.unused:
        text = f"names the module {', '.join(named.unused[:3])}, which has no tensors"
        yield Code.TARGETS, f"{PEFT_CONFIG} {text}", ""

    def shapes(layer: int, module: str) -> tuple[Shape, Shape]:
        rank, halves = named.ranks[layer, module], places[layer, module].values()
        # An embedding's halves lie the other way round.
        known = type(rank) is int and not any("lora_embedding" in its.name for its in halves)
        return (rank if known else None, None), (None, rank if known else None)

    absent = [f"{PEFT_CONFIG} names the module {end}, which has no tensors" for end in named.odd]
    stated = f"{PEFT_CONFIG} (r = {config.get('r')})"
    for code, text, tensor in faults(places, layers, shapes, name, stated):
        # A module that is not there starts as zero, unless both of its halves are drawn.
        if code is not Code.MISSING_TENSOR or config.get("init_lora_weights") is False:
            yield code, text, tensor
        elif named.includes(tensor):
            absent.append(text)
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        yield Code.UNEVEN, f"{absent[0]}{more}: whether it was trained so cannot be told", ""


class _Named:
    """What the names and patterns of ``config`` say of the modules at ``places``: the ``ranks``,
    the ``strangers`` that are not named, those that are ``left_out`` on purpose, the names that are
    ``unused``, and the ``odd`` ones, of which nobody knows whether the base has such a module.
    Raises as :func:`of_pattern`."""

    def __init__(self, config: Mapping[str, Any], places: Iterable[Place]) -> None:
        self.until = time.monotonic() + _PATIENCE
        names = config.get("target_modules")
        self.names = {str(each) for each in names} if isinstance(names, list) else names
        parameters = config.get("target_parameters")
        parameters = parameters if isinstance(parameters, list) else []
        owners = {str(each).rpartition(".")[0] for each in parameters}
        self.ranks: dict[Place, Any] = {}
        self.strangers, self.left_out, used = [], [], set()
        without = config.get("exclude_modules")
        for place in places:
            module = self.inner(place[1].replace(".*.", f".{place[0]}."))
            of_parameter = named_by(owners, module.replace(".base_layer", ""))
            # The experts of one parameter lie one after the other.
            self.ranks[place] = (
                None
                if of_parameter
                else of_pattern(config, "rank_pattern", module, size(config, "r"), self.until)
            )
            if named_by(without, module, self.until):
                self.left_out.append(place)
            if isinstance(self.names, (set, str)):
                used |= (by := named_by(self.names, module, self.until))
                if not by and not of_parameter:
                    self.strangers.append(place)
        left = sorted(self.names - used) if isinstance(self.names, set) else []
        left = [each for each in left if not named_by(without, each, self.until)]
        known = {module.rpartition(".")[2] for module in MODULES}
        self.unused = [each for each in left if each.rpartition(".")[2] in known]
        self.odd = [each for each in left if each not in self.unused]

    @staticmethod
    def inner(stem: str) -> str:
        return stem.removeprefix(PEFT_PREFIX)

    def includes(self, tensor: str) -> bool:
        """Whether the module of the ``tensor`` that is missing is named."""
        try:
            return bool(named_by(self.names, self.inner(parse(tensor).stem), self.until))
        except UnsupportedAdapter:
            return True
