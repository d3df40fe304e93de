"""Read a Hugging Face PEFT adapter, LoRA or DoRA: ``adapter_config.json`` with
``adapter_model.safetensors`` or ``.bin``.

PEFT scales each module by ``lora_alpha / r`` (with ``use_rslora`` by ``lora_alpha / sqrt(r)``), and
``rank_pattern`` and ``alpha_pattern`` give single modules numbers of their own. Here all modules
get one rank and one scale: matrices are filled up with zeros, and what differs in the scale is
multiplied into B. Source: ``peft/tuners/lora/{config,layer}.py`` (0.17).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters import read_nemo2
from workshop_utils.adapters.adapter import PEFT_CONFIG, LoraAdapter, as_tensor, fingerprint
from workshop_utils.adapters.modules import MODULES, of_one_rank, ordered, synthetic_config
from workshop_utils.checkpoints.formats import gpt_config, huggingface, values
from workshop_utils.checkpoints.formats.architecture import number, size
from workshop_utils.checkpoints.formats.lora_layout import Architecture, Halves, of_pattern
from workshop_utils.checkpoints.formats.qkv import Heads
from workshop_utils.checkpoints.formats.safe_text import read_json, read_yaml
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor

_KNOWN = {module for modules in MODULES.values() for module in modules}
_KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d{1,4})\.((?:self_attn|mlp)\.\w+)\.(?:lora_([AB])(?:\.default)?\.weight|(lora_magnitude_vector))"
    r"(?:\.default)?(?:\.weight)?"
)
#: Fields of LoraConfig that change what is computed, and that nothing here can express.
_REFUSED = {
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
}


def read(source: Path, base: Path | None = None) -> LoraAdapter:
    """The adapter in the directory ``source``; errors as
    :func:`workshop_utils.adapters.read.read_adapter`.

    ``base`` is the directory of its base model; without it the one that ``base_model_name_or_path``
    names, if it is here.
    """
    config = read_json(source / PEFT_CONFIG)
    _refuse(source, config)
    checkpoint = huggingface.describe_peft(source)
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    for tensor in checkpoint.tensors:
        match = _KEY.fullmatch(tensor.name)
        if not match or match[2] not in _KNOWN:
            raise UnsupportedAdapter(
                f"{shown(source)}: {tensor.name} is none of the modules that can be exported: "
                f"{', '.join(sorted(_KNOWN))}."
            )
        one = halves.setdefault((int(match[1]), match[2]), {})
        if (match[3] or "magnitude") in one:
            raise DamagedCheckpoint(
                f"{shown(source)}: {tensor.name} is there under two names.", tensor.name
            )
        one[match[3] or "magnitude"] = as_tensor(values.read_tensor(checkpoint, tensor))
    dora = config.get("use_dora") is True
    for (layer, module), one in halves.items():
        lacking = sorted({"A", "B", *(["magnitude"] if dora else [])} ^ one.keys())
        if lacking:
            raise DamagedCheckpoint(
                f"{shown(source)}: layer {layer}, {module}: lora {lacking[0]} is missing, or is "
                "too many."
            )
    recorded = config.get("base_model_name_or_path")
    architecture = base_architecture(base or Path(recorded if isinstance(recorded, str) else ""))
    adapter = LoraAdapter(
        source=source,
        sha256=fingerprint(
            source / PEFT_CONFIG,
            *huggingface.weight_files(source, "adapter_model", "adapter_model"),
        ),
        config={},
        architecture=architecture,
        rank=1,
        alpha=1.0,
        targets=ordered(halves),
        qkv_order="interleaved",
        base=str(recorded) if isinstance(recorded, str) else "",
        weights={place: Halves(one["A"], one["B"]) for place, one in sorted(halves.items())},
        magnitudes={place: one["magnitude"] for place, one in halves.items() if dora},
        some_layers=config.get("layers_to_transform") is not None,
    )
    _check_shapes(adapter)
    made = _of_one_scale(adapter, config)
    return dataclasses.replace(
        made,
        config=synthetic_config(made.rank, made.alpha, made.targets, made.base, made.architecture),
    )


def _refuse(source: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(
            f"{shown(source)}: peft_type is {config.get('peft_type')!r}; only LORA can be exported."
        )
    for name, harmless in _REFUSED.items():
        if config.get(name) not in (*harmless, None):
            raise UnsupportedAdapter(
                f"{shown(source)}: {PEFT_CONFIG} has {name} = {config[name]!r}, which no other "
                "form can hold. Merge it into its base with PEFT (merge_and_unload)."
            )


def base_architecture(base: Path) -> Architecture | None:
    """The sizes in the configuration of the model directory ``base`` (Hugging Face or NeMo 2.0), or
    None where there is none."""
    if (file := base / "context" / "model.yaml").is_file():
        return read_nemo2.base_architecture(gpt_config.read_fields(read_yaml(file), shown(file)))
    sizes = (
        huggingface.architecture(read_json(base / "config.json"))
        if (base / "config.json").is_file()
        else None
    )
    if sizes is None:
        return None
    activation = "squared-relu" if sizes.family == "Nemotron" else "fast-swiglu"
    return Architecture(
        sizes.hidden,
        sizes.ffn,
        sizes.layers,
        Heads(sizes.heads, sizes.groups, sizes.head_dim),
        activation,
    )


def _check_shapes(adapter: LoraAdapter) -> None:
    for (layer, module), (a, b) in adapter.weights.items():
        place = f"{shown(adapter.source)}: layer {layer}, {module}"
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise DamagedCheckpoint(
                f"{place}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}: no [r, in] and "
                "[out, r]."
            )
        if module == "mlp.gate_proj" and adapter.architecture and not adapter.architecture.gated:
            raise DamagedCheckpoint(f"{place}: the MLP of its base has no gate.")
        found = a.shape[1], b.shape[0]
        wanted = adapter.architecture.features(module) if adapter.architecture else found
        if found != wanted:
            raise DamagedCheckpoint(
                f"{place} is for {found[0]} -> {found[1]} features, but its base has {wanted[0]} "
                f"-> {wanted[1]}."
            )
        magnitude = adapter.magnitudes.get((layer, module))
        if magnitude is not None and magnitude.shape != (found[1],):
            raise DamagedCheckpoint(
                f"{place}: the magnitudes are {list(magnitude.shape)}, not [{found[1]}]."
            )
    if adapter.architecture and adapter.layers <= max(layer for layer, _ in adapter.weights):
        raise DamagedCheckpoint(
            f"{shown(adapter.source)}: it has tensors for a layer that its base, of "
            f"{adapter.layers}, lacks."
        )


def _of_one_scale(adapter: LoraAdapter, config: Mapping[str, Any]) -> LoraAdapter:
    """``adapter`` at one rank and scale, from what ``config`` says of each module."""
    scales = {}
    for (layer, module), (a, _) in adapter.weights.items():
        rank, name = a.shape[0], f"model.layers.{layer}.{module}"
        stated = of_pattern(config, "rank_pattern", name, size(config, "r"))
        if stated != rank:
            raise DamagedCheckpoint(
                f"{shown(adapter.source)}: layer {layer}, {module} has rank {rank}, but "
                f"{PEFT_CONFIG} says {stated}."
            )
        alpha = of_pattern(config, "alpha_pattern", name, number(config, "lora_alpha"))
        if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha <= 0:
            raise DamagedCheckpoint(
                f"{shown(adapter.source)}: lora_alpha of {module} in {PEFT_CONFIG} is {alpha!r}; "
                "it must be a positive number."
            )
        scales[layer, module] = alpha / (
            math.sqrt(rank) if config.get("use_rslora") is True else rank
        )
    found = list(scales.values())
    scale = max(set(found), key=found.count)
    weights = {
        place: halves
        if scales[place] == scale
        else Halves(
            halves.linear_in,
            (halves.linear_out.float() * (scales[place] / scale)).to(halves.linear_out.dtype),
        )
        for place, halves in adapter.weights.items()
    }
    ranks = {a.shape[0] for a, _ in weights.values()}
    # alpha exactly as it is written, where it can be: 16 and not 15.999.
    alpha = scale * max(ranks)
    alpha = float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    notes = ()
    if len(ranks) > 1:
        notes += (
            (
                f"its modules had the ranks {', '.join(map(str, sorted(ranks)))}: all filled up "
                f"with zeros to {max(ranks)}"
            ),
        )
    if len(set(found)) > 1:
        notes += ("its modules had different scales: multiplied into B",)
    made = of_one_rank(dataclasses.replace(adapter, weights=weights, rank=max(ranks), alpha=alpha))
    return dataclasses.replace(made, alpha=alpha, notes=notes)
