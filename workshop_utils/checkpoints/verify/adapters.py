"""Rules for LoRA adapters: both halves, one rank, every layer, shapes that fit the base. Names and
shapes only, no values."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.architecture import section, size
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.lora_layout import (
    PEFT_PREFIX,
    Place,
    Shape,
    faults,
    parse,
    peft_faults,
    read_layout,
)
from workshop_utils.checkpoints.formats.megatron_layout import layout, stacked_name
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify import layers as names
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.checkpoints.verify.shapes import sane_layers
from workshop_utils.core.errors import CheckpointError, UnsupportedAdapter
from workshop_utils.core.paths import shown

OTHER_SCHEMES = ("adapter", "ia3", "ptuning")
"""What else than LoRA NeMo 1 trains beside a frozen base."""


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
        key = parse(tensor.name)
        if key and key.style == "nemo2" and key.half != "magnitude":
            base, place = stacked_name(f"{key.stem.partition('.')[2]}.weight")
            module = ".".join(filter(None, (base.removesuffix(".weight"), key.part)))
            # A part of a fused layer: what it adapts is not in the layout.
            bases[module] = "" if key.part else base
            places.setdefault((place[0] if place else -1, module), {})[key.half] = tensor
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
    kind = config.get("peft_type")
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
    for tensor in (tensors := list(tensors)):
        if not tensor.name.startswith(PEFT_PREFIX):
            text = "does not begin with base_model.model. PEFT would leave this part out."
            source = "peft/utils/save_and_load.py"
            report.tensor(tensor.name, text, Code.PREFIX, source=source)
    for code, text, name in peft_faults(config, tensors):
        if code is Code.UNEVEN:
            report.unknown(text, code)
        else:
            report.damaged(f"{where}: {text}.", name or None, code)
    report.checked.append(
        f"every module has both halves, of the rank of {stated}, and target_modules names them"
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
