"""Rules for LoRA adapters: both halves, one rank, every layer, shapes that fit the base. Names and
shapes only, no values."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.architecture import section, size
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.lora_layout import of_pattern, read_layout
from workshop_utils.checkpoints.formats.megatron_layout import layout, stacked_name
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify import layers as names
from workshop_utils.checkpoints.verify.places import some
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.checkpoints.verify.shapes import sane_layers
from workshop_utils.core.errors import CheckpointError, UnsupportedAdapter
from workshop_utils.core.paths import shown

OTHER_SCHEMES = ("adapter", "ia3", "ptuning")
"""What else than LoRA NeMo 1 trains beside a frozen base."""

_NEMO2 = re.compile(
    r"(?:module|model)\.(.+)\.adapter(?:\.(adapter_\w+))?\.(linear_in|linear_out)\.weight"
)
_PEFT = re.compile(r"(.+?)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
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


def check_nemo1(report: Report, config: dict[str, Any], tensors: Iterable[Tensor]) -> None:
    """A LoRA adapter in a ``.nemo``, by the rules of
    :func:`workshop_utils.checkpoints.formats.lora_layout.read_layout`."""
    where = f"{shown(report.path)}: model_config.yaml"
    if not sane_layers(report, where, size(config, "num_layers", 0)):
        return
    if (scheme := section(config, "peft").get("peft_scheme")) in OTHER_SCHEMES:
        what = f"peft_scheme is {scheme}; the rules of lora are known here"
        report.unknown(f"whether the tensors fit the configuration: {what}", Code.SCHEME)
        return
    try:
        read_layout(report.path, config, {tensor.name: tensor for tensor in tensors}, report.add)
    except UnsupportedAdapter as error:
        report.unknown(f"whether halves, ranks and layers fit: {error}", Code.SCHEME)
        return
    except CheckpointError as error:
        report.add(error)
    report.checked.append(
        "every layer has both halves of its adapters, of the rank and in the shapes of the "
        "configuration"
    )


def check_nemo2(
    report: Report, tensors: Iterable[Tensor], fields: Mapping[str, Any] | None, rank: Any
) -> None:
    """An adapter of NeMo 2.0. ``fields`` describe the base (None: unknown), ``rank`` is what
    ``model.yaml`` states."""
    places: dict[Place, dict[str, Tensor]] = {}
    bases: dict[str, str] = {}
    for tensor in tensors:
        if match := _NEMO2.fullmatch(tensor.name):
            base, place = stacked_name(f"{match[1]}.weight")
            module = ".".join(filter(None, (base.removesuffix(".weight"), match[2])))
            # A part of a fused layer: what it adapts is not in the layout.
            bases[module] = "" if match[2] else base
            half = "A" if match[3] == "linear_in" else "B"
            places.setdefault((place[0] if place else -1, module), {})[half] = tensor
        elif ".adapter." not in tensor.name:
            text = "belongs to no adapter, but adapter_metadata.json says this is one."
            report.tensor(tensor.name, text, Code.FOREIGN_TENSOR)
    count = fields["num_layers"] if fields else None
    known = fields and sane_layers(report, report.where, count)
    expected = layout(dict(fields), fields["vocab_size"] or 0) if known else {}
    if type(rank) is not int:
        first = [halves["A"].shape for halves in places.values() if "A" in halves]
        ranks = Counter(shape[-2] for shape in first if len(shape) > 1)
        rank = max(ranks, key=ranks.get, default=None)

    def shapes(layer: int, module: str) -> tuple[Shape, Shape]:
        stack = (count if known else None,) if layer < 0 and names.is_stacked(module) else ()
        rows = columns = None
        if weight := expected.get(bases[module]):
            *leading, rows, columns = weight.shape
            stack = tuple(leading[layer >= 0 :])
        return (*stack, rank, columns), (*stack, rows, rank)

    _report(report, places, range(count) if known else None, shapes, "model.yaml")
    report.checked.append(
        "every adapter has both halves, all have one rank, and every layer has them"
    )
    if not expected:
        text = "the architecture is not one that is known here"
        report.unknown(f"whether the adapter's shapes fit its base: {text}", Code.ARCHITECTURE)


def check_peft(report: Report, tensors: Iterable[Tensor], config: Mapping[str, Any]) -> None:
    """A PEFT adapter against its ``adapter_config.json``. Tensors that are no LoRA matrices
    (``modules_to_save``) are left alone."""
    where, stated = report.where, "adapter_config.json"
    kind, targets = config.get("peft_type"), config.get("target_modules")
    if config.get("megatron_core") not in (None, "megatron.core"):
        text = (
            f"{where}: {stated} names the module {config['megatron_core']!r} as megatron_core, "
            "which PEFT would import. Nothing was executed. The only genuine one is megatron.core."
        )
        report.damaged(text, code=Code.UNSAFE, file=stated)
    if kind != "LORA":
        what = f"peft_type is {kind!r}; the rules of LORA are known here"
        report.unknown(f"whether the tensors fit {stated}: {what}", Code.SCHEME)
        return
    places: dict[Place, dict[str, Tensor]] = {}
    modules: dict[str, Tensor] = {}
    for tensor in tensors:
        if match := _PEFT.fullmatch(tensor.name):
            layer = names.number(f"{match[1]}.")
            place = (-1 if layer is None else layer, names.family(f"{match[1]}.")[:-1])
            places.setdefault(place, {})[match[2]] = tensor
            modules.setdefault(match[1], tensor)
        if not tensor.name.startswith("base_model.model."):
            text = "does not begin with base_model.model. PEFT would leave this part out."
            source = "peft/utils/save_and_load.py"
            report.tensor(tensor.name, text, Code.PREFIX, source=source)
    if isinstance(targets, list):
        named = {str(target) for target in targets}

        def fits(module: str, name: str) -> bool:
            return module == name or module.endswith(f".{name}")

        unused = sorted(name for name in named if not any(fits(module, name) for module in modules))
        if unused:
            text = f"{where}: {stated} names the module {some(unused)}, which has no tensors."
            report.damaged(text, code=Code.TARGETS, source=stated)
        for module, tensor in modules.items():
            if not any(fits(module, name) for name in named):
                text = f"is for a module that {stated} does not name in target_modules."
                report.tensor(tensor.name, text, Code.TARGETS, source=stated)
    there = {layer for layer, _ in places if layer >= 0}
    every: Collection[int] | None = None
    if (picked := config.get("layers_to_transform")) not in (None, []):
        picks = picked if isinstance(picked, list) else [picked]
        every = {layer for layer in picks if type(layer) is int}
        if there != every:
            text = (
                f"{where}: {stated} has layers_to_transform = {str(picked)[:60]}, but the tensors "
                f"are for the layers {some(sorted(map(str, there)))}."
            )
            report.damaged(text, code=Code.LAYERS, source=stated)
            every = there

    def shapes(layer: int, module: str) -> tuple[Shape, Shape]:
        halves = places[layer, module]
        rank = _peft_rank(module.replace(".*.", f".{layer}."), config)
        if any("lora_embedding" in tensor.name for tensor in halves.values()):
            rank = None
        return (rank, None), (None, rank)

    _report(report, places, every, shapes, f"{stated} (r = {config.get('r')})")
    report.checked.append(
        f"every module has both halves, of the rank of {stated}, and target_modules names just "
        "these modules"
    )


def _report(
    report: Report,
    places: Mapping[Place, Mapping[str, Tensor]],
    layers: Collection[int] | None,
    shapes: Callable[[int, str], tuple[Shape, Shape]],
    stated: str,
) -> None:
    """Report :data:`faults`; without ``layers`` of all up to the last that any tensor has."""
    if not places:
        report.damaged(f"{report.where} holds no LoRA matrices.", code=Code.MISSING_TENSOR)

    def name(layer: int, module: str, half: str) -> str:
        """That of the tensor, or of one that is missing: as of its other half, or of the same
        module in another layer."""
        halves = places.get((layer, module)) or next(
            halves for (_, other), halves in places.items() if other == module
        )
        if half in halves:
            like = halves[half].name
        else:
            like = next(iter(halves.values())).name
            ends = ("linear_in", "linear_out") if ".adapter." in like else ("A", "B")
            start, _, rest = like.rpartition(ends["BA".index(half)])
            like = start + ends["AB".index(half)] + rest
        return names.family(like).replace("*", str(layer), 1) if layer >= 0 else like

    layers = layers or range(max((layer for layer, _ in places), default=-1) + 1)
    for code, text, tensor in faults(places, layers, shapes, name, stated):
        report.damaged(f"{report.where}: {text}.", tensor or None, code)


def base_note(report: Report, base: str | None) -> None:
    """A note where the base of an adapter cannot be found at the path that it records."""
    if base is not None and not os.path.exists(base):
        text = f"the base model is recorded as {base}, which is not here."
        report.note(text, Code.BASE)


def _peft_rank(module: str, config: Mapping[str, Any]) -> int | None:
    try:
        rank = of_pattern(config, "rank_pattern", module, size(config, "r"))
    except UnsupportedAdapter:
        return None
    return rank if type(rank) is int else None
