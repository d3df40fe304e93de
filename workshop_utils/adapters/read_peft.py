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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters import read_nemo2
from workshop_utils.adapters.adapter import LoraAdapter, as_tensor, fingerprint
from workshop_utils.adapters.modules import of_one_rank, synthetic_config
from workshop_utils.checkpoints.formats import gpt_config, huggingface, huggingface_config, values
from workshop_utils.checkpoints.formats.architecture import Architecture, size
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.lora_layout import (
    MODULES,
    PEFT_CONFIG,
    PEFT_PREFIX,
    Halves,
    Place,
    faults,
    features,
    of_pattern,
    ordered,
    parse,
    peft_faults,
    peft_key,
    peft_only,
    peft_scale,
    peft_types,
    unknown_to_peft,
)
from workshop_utils.checkpoints.formats.safe_text import read_json, read_yaml
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor


def read(source: Path, base: Path | None = None) -> LoraAdapter:
    """The adapter in the directory ``source``; errors as
    :func:`workshop_utils.adapters.read.read_adapter`.

    ``base`` is the directory of its base model; without it the one that ``base_model_name_or_path``
    names, if it is here.
    """
    config, where = read_json(source / PEFT_CONFIG), shown(source)
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(
            f"{where}: peft_type is {config.get('peft_type')!r}; only LORA can be exported."
        )
    for name in peft_only(config):
        why = "no other form can hold"
        if name in unknown_to_peft(config):
            why = "no PEFT up to 0.21 has: what it changes is not known"
        raise UnsupportedAdapter(
            f"{where}: {PEFT_CONFIG} has {name} = {repr(config[name])[:80]}, which {why}. Merge it "
            "into its base with the PEFT that wrote it (merge_and_unload)."
        )
    for fault in peft_types(config):
        raise DamagedCheckpoint(f"{where}: {fault}.")
    checkpoint = huggingface.describe_peft(source)
    places: dict[Place, dict[str, Tensor]] = {}
    for tensor in checkpoint.tensors:
        key = parse(tensor.name)
        inner = key.stem.removeprefix(PEFT_PREFIX) if key else ""
        if not (
            key and key.module in MODULES and inner == f"model.layers.{key.layer}.{key.module}"
        ):
            raise UnsupportedAdapter(
                f"{where}: {tensor.name} is none of the modules that can be exported: "
                f"{', '.join(sorted(MODULES))}."
            )
        halves = places.setdefault((key.layer, key.module), {})
        if key.half in halves:
            raise DamagedCheckpoint(f"{where}: {tensor.name} is there twice.", tensor.name)
        halves[key.half] = as_tensor(values.read_tensor(checkpoint, tensor))
    if not places:
        raise DamagedCheckpoint(f"{where} holds no LoRA matrices.")
    recorded = config.get("base_model_name_or_path")
    recorded = recorded if isinstance(recorded, str) else ""
    architecture = base_architecture(base or Path(recorded))
    dora = bool(config.get("use_dora"))
    _check(where, config, places, architecture, dora)
    files = huggingface.weight_files(source, "adapter_model", "adapter_model")
    adapter = LoraAdapter(
        source=source,
        sha256=fingerprint(source / PEFT_CONFIG, *files),
        config={},
        architecture=architecture,
        rank=1,
        alpha=1.0,
        targets=ordered(module for _, module in places),
        qkv_order="interleaved",
        base=recorded,
        weights={place: Halves(its["A"], its["B"]) for place, its in sorted(places.items())},
        magnitudes={place: its["magnitude"] for place, its in places.items() if dora},
        notes=tuple(
            text for code, text, _ in peft_faults(config, checkpoint.tensors) if code is Code.UNEVEN
        ),
        some_layers=_on_some_layers(config, places),
    )
    scaled = _of_one_scale(adapter, config)
    described = (scaled.rank, scaled.alpha, scaled.targets, scaled.base, architecture)
    return dataclasses.replace(scaled, config=synthetic_config(*described))


def _on_some_layers(config: Mapping[str, Any], places: Mapping[Place, Any]) -> bool:
    """Whether the base may have more layers, or layers more of these modules."""
    names, layers = config.get("target_modules"), {layer for layer, _ in places}
    short = isinstance(names, list) and not any("." in str(name) for name in names)
    even = len(places) == len(layers) * len({module for _, module in places})
    return config.get("layers_to_transform") is not None or not (short and even)


def base_architecture(base: Path) -> Architecture | None:
    """The sizes in the configuration of the model directory ``base`` (Hugging Face or NeMo 2.0), or
    None where there is none."""
    if (file := base / "context" / "model.yaml").is_file():
        return read_nemo2.base_architecture(gpt_config.read_fields(read_yaml(file), shown(file)))
    if not (file := base / "config.json").is_file():
        return None
    sizes = huggingface.architecture(huggingface_config.spelled(read_json(file), shown(file)))
    if sizes is None:
        return None
    activation = "squared-relu" if sizes.family == "Nemotron" else "fast-swiglu"
    return dataclasses.replace(sizes, activation=activation)


def _check(
    where: str,
    config: Mapping[str, Any],
    places: Mapping[Place, Mapping[str, Tensor]],
    sizes: Architecture | None,
    dora: bool,
) -> None:
    """The halves that PEFT needs, in the rank that ``config`` states and the shapes of the base.

    A layer without an adapter is none of its faults: PEFT leaves it as it is.
    """

    def shapes(layer: int, module: str):
        if module == "mlp.gate_proj" and sizes and not sizes.gated:
            raise DamagedCheckpoint(f"{where}: {module}: the MLP of its base has no gate.")
        rank = of_pattern(
            config, "rank_pattern", f"model.layers.{layer}.{module}", size(config, "r")
        )
        if type(rank) is not int:
            raise DamagedCheckpoint(f"{where}: {PEFT_CONFIG} has r = {rank!r} for {module}.")
        inputs, outputs = features(sizes, module) if sizes else (None, None)
        return (rank, inputs), (outputs, rank)

    stated = f"{PEFT_CONFIG} (r = {config.get('r')})" + " with its base" * bool(sizes)
    for module in {module for _, module in places}:
        mine = {place: halves for place, halves in places.items() if place[1] == module}
        layers = {layer for layer, _ in mine}
        for _, fault, name in faults(mine, layers, shapes, peft_key, stated):
            raise DamagedCheckpoint(f"{where}: {fault}.", name)
    for (layer, module), halves in places.items():
        lengths = halves.get("magnitude")
        if (lengths is not None) is not dora:
            raise DamagedCheckpoint(
                f"{where}: layer {layer}, {module}: lora magnitude is missing, or is too many."
            )
        if dora and lengths.shape != halves["B"].shape[:1]:
            raise DamagedCheckpoint(
                f"{where}: layer {layer}, {module}: the magnitudes are {list(lengths.shape)}, not "
                f"{list(halves['B'].shape[:1])}."
            )
    last = max(layer for layer, _ in places)
    if sizes and last >= sizes.layers:
        raise DamagedCheckpoint(
            f"{where}: it has tensors for layer {last}, which its base, of {sizes.layers}, lacks."
        )


def _of_one_scale(adapter: LoraAdapter, config: Mapping[str, Any]) -> LoraAdapter:
    """``adapter`` at one rank and scale, from what ``config`` says of each module."""
    scales = {}
    for (layer, module), (a, _) in adapter.weights.items():
        scale = peft_scale(config, f"model.layers.{layer}.{module}", a.shape[0])
        if scale is None:
            raise DamagedCheckpoint(
                f"{shown(adapter.source)}: lora_alpha of {module} in {PEFT_CONFIG} is no positive "
                "number."
            )
        scales[layer, module] = scale
    of_each = list(scales.values())
    scale = max(set(of_each), key=of_each.count)
    weights = {
        place: Halves(a, b)
        if scales[place] == scale
        else Halves(a, (b.float() * (scales[place] / scale)).to(b.dtype))
        for place, (a, b) in adapter.weights.items()
    }
    ranks = sorted({a.shape[0] for a, _ in weights.values()})
    # alpha exactly as it is written, where it can be: 16 and not 15.999.
    alpha = scale * ranks[-1]
    alpha = float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    notes = adapter.notes
    if len(ranks) > 1:
        notes += (
            f"its modules had the ranks {', '.join(map(str, ranks))}: all filled up with zeros to "
            f"{ranks[-1]}",
        )
    if len(set(of_each)) > 1:
        notes += ("its modules had different scales: multiplied into B",)
    even = of_one_rank(dataclasses.replace(adapter, weights=weights, rank=ranks[-1], alpha=alpha))
    return dataclasses.replace(even, alpha=alpha, notes=notes)
