"""Rules for LoRA adapters: both halves, one rank, every layer, shapes that fit the base. Names and
shapes only, no values."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats.architecture import section, size
from workshop_utils.checkpoints.formats.lora_layout import of_pattern
from workshop_utils.checkpoints.formats.megatron_layout import layout, stacked_name
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify import layers
from workshop_utils.checkpoints.verify.places import some
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.checkpoints.verify.shapes import sane_layers
from workshop_utils.core.errors import CheckpointError, UnsafeCheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

OTHER_SCHEMES = ("adapter", "ia3", "ptuning")
"""What else than LoRA NeMo 1 trains beside a frozen base."""

_NEMO2 = re.compile(
    r"(?:module|model)\.(.+)\.adapter((?:\.adapter_\w+)?)\.(linear_in|linear_out)\.weight"
)
_PEFT = re.compile(r"(.+?)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_MOST_PLACES = 1_000_000
_HALVES = {"linear_in": "linear_out", "linear_out": "linear_in", "A": "B", "B": "A"}


def check_nemo1(
    report: Report, path: Path, config: dict[str, Any], tensors: Iterable[Tensor]
) -> None:
    """A LoRA adapter in a ``.nemo``, by the rules of
    :func:`workshop_utils.checkpoints.formats.lora_layout.read_layout`."""
    from workshop_utils.checkpoints.formats.lora_layout import read_layout

    if not sane_layers(report, f"{shown(path)}: model_config.yaml", size(config, "num_layers", 0)):
        return
    if (scheme := section(config, "peft").get("peft_scheme")) in OTHER_SCHEMES:
        report.untold.append(
            f"whether the tensors fit the configuration: peft_scheme is {scheme}; the rules of "
            "lora are known here"
        )
        return
    try:
        read_layout(path, config, {tensor.name: tensor for tensor in tensors}, report.add)
    except UnsupportedAdapter as error:
        report.untold.append(f"whether halves, ranks and layers fit: {error}")
        return
    except CheckpointError as error:
        report.add(error)
    report.checked.append(
        "every layer has both halves of its adapters, of the rank and in the shapes of the "
        "configuration"
    )


def check_nemo2(
    report: Report,
    where: str,
    tensors: Iterable[Tensor],
    fields: Mapping[str, Any] | None,
    rank: Any,
) -> None:
    """An adapter of NeMo 2.0. ``fields`` describe the base (None: unknown), ``rank`` is what
    ``model.yaml`` states."""
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    for tensor in tensors:
        match = _NEMO2.fullmatch(tensor.name)
        if match:
            halves.setdefault((match[1], match[2]), {})[match[3]] = tensor
        elif ".adapter." not in tensor.name:
            report.damaged(
                f"{where}: {tensor.name} belongs to no adapter, but adapter_metadata.json says "
                "this is one.",
                tensor.name,
            )
    expected = (
        layout(dict(fields), fields["vocab_size"] or 0)
        if fields and sane_layers(report, where, fields["num_layers"])
        else {}
    )
    for (parent, part), one in halves.items():
        if _both(report, where, one):
            base, place = stacked_name(f"{parent}.weight")
            weight = expected.get(base)
            wanted = None
            if weight and not part:
                *stack, rows, columns = weight.shape[len(place) :]
                found = one["linear_in"].shape[len(stack) : len(stack) + 1]
                wanted = {
                    "linear_in": (*stack, *found, columns),
                    "linear_out": (*stack, rows, *found),
                }
            _fits(report, where, one, wanted)
    _one_rank(
        report,
        where,
        [(one["linear_in"], -2) for one in halves.values() if "linear_in" in one],
        rank,
    )
    _every_layer(
        report,
        where,
        [tensor for one in halves.values() for tensor in one.values()],
        fields["num_layers"] if fields else None,
    )
    if not halves:
        report.damaged(f"{where} holds no adapter.")
    report.checked.append(
        "every adapter has both halves, all have one rank, and every layer has them"
    )
    if not expected:
        report.untold.append(
            "whether the adapter's shapes fit its base: the architecture is not one that is "
            "known here"
        )


def check_peft(
    report: Report, where: str, tensors: Iterable[Tensor], config: Mapping[str, Any]
) -> None:
    """A PEFT adapter against its ``adapter_config.json``. Tensors that are no LoRA matrices
    (``modules_to_save``) are left alone."""
    kind, targets = config.get("peft_type"), config.get("target_modules")
    if config.get("megatron_core") not in (None, "megatron.core"):
        report.add(
            UnsafeCheckpoint(
                f"{where}: adapter_config.json names the module {config['megatron_core']!r} as "
                "megatron_core, which PEFT would import. Nothing was executed. The only genuine "
                "one is megatron.core."
            )
        )
    if kind != "LORA":
        report.untold.append(
            f"whether the tensors fit adapter_config.json: peft_type is {kind!r}; the rules of "
            "LORA are known here"
        )
        return
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        match = _PEFT.fullmatch(tensor.name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = tensor
        if not tensor.name.startswith("base_model.model."):
            report.damaged(
                f"{where}: {tensor.name} does not begin with base_model.model. PEFT would leave "
                "this part of the adapter out.",
                tensor.name,
            )
    for module, one in halves.items():
        if _both(report, where, one):
            _fits(report, where, one, None)
            rank = _peft_rank(module, config)
            for name, axis in (("A", 0), ("B", 1)):
                tensor = one[name]
                if (
                    len(tensor.shape) >= 2
                    and rank
                    and tensor.shape[axis] != rank
                    and "lora_embedding" not in tensor.name
                ):
                    report.damaged(
                        f"{where}: {tensor.name} is {list(tensor.shape)}, but "
                        f"adapter_config.json states r = {rank}.",
                        tensor.name,
                    )
    if isinstance(targets, list):
        named = {str(target) for target in targets}
        unused = sorted(
            name
            for name in named
            if not any(module == name or module.endswith(f".{name}") for module in halves)
        )
        if unused:
            report.damaged(
                f"{where}: adapter_config.json names the module {some(unused)}, which has no "
                "tensors."
            )
        for module, one in halves.items():
            if not any(module == name or module.endswith(f".{name}") for name in named):
                first = next(iter(one.values())).name
                report.damaged(
                    f"{where}: {first} is for a module that adapter_config.json does not name in "
                    "target_modules.",
                    first,
                )
    if not halves:
        report.damaged(f"{where} holds no LoRA matrices.")
    _peft_layers(
        report,
        where,
        [tensor for one in halves.values() for tensor in one.values()],
        config.get("layers_to_transform"),
    )
    report.checked.append(
        "every module has both halves, of the rank of adapter_config.json, and target_modules "
        "names just these modules"
    )


def base_note(report: Report, base: str | None) -> None:
    """A note where the base of an adapter cannot be found at the path that it records."""
    if base is not None and not os.path.exists(base):
        report.note(f"the base model is recorded as {base}, which is not here.")


def _peft_rank(module: str, config: Mapping[str, Any]) -> int | None:
    """The rank that is stated for ``module``; None where that cannot be told."""
    try:
        rank = of_pattern(config, "rank_pattern", module, size(config, "r"))
    except UnsupportedAdapter:
        return None
    return rank if type(rank) is int else None


def _peft_layers(report: Report, where: str, tensors: list[Tensor], picked: Any) -> None:
    """Every layer has every module: of those that ``layers_to_transform`` picks, where it does.
    PEFT leaves the others as they are."""
    if picked is None or picked == []:
        _every_layer(report, where, tensors, None)
        return
    wanted = {
        layer for layer in (picked if isinstance(picked, list) else [picked]) if type(layer) is int
    }
    found = {layer for tensor in tensors if (layer := layers.number(tensor.name)) is not None}
    if found != wanted:
        report.damaged(
            f"{where}: adapter_config.json has layers_to_transform = {str(picked)[:60]}, but the "
            f"tensors are for the layers {some(sorted(map(str, found)))}."
        )
    else:
        _every_layer(report, where, tensors, None, found)


def _both(report: Report, where: str, one: Mapping[str, Tensor]) -> bool:
    if len(one) == 2:
        return True
    (half, tensor), other = next(iter(one.items())), _HALVES[next(iter(one))]
    start, _, end = tensor.name.rpartition(half)
    report.damaged(
        f"{where}: {start}{other}{end} is missing; the other half of the adapter, {tensor.name}, "
        "is there.",
        start + other + end,
    )
    return False


def _fits(
    report: Report,
    where: str,
    one: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """Each half has the shape in ``wanted``; without that, both have the same rank."""
    a, b = (tensor for _, tensor in sorted(one.items()))
    if len(a.shape) < 2 or len(b.shape) != len(a.shape):
        report.damaged(
            f"{where}: {a.name} is {list(a.shape)} and {b.name} is {list(b.shape)}: no two "
            "matrices.",
            a.name,
        )
    elif wanted:
        for half, tensor in one.items():
            if tensor.shape != wanted[half]:
                report.damaged(
                    f"{where}: {tensor.name} is {list(tensor.shape)}, but its base asks for "
                    f"{list(wanted[half])}.",
                    tensor.name,
                )
    elif a.shape[-2] != b.shape[-1]:
        report.damaged(
            f"{where}: {a.name} has rank {a.shape[-2]}, but {b.name} has rank {b.shape[-1]}.",
            b.name,
        )


def _one_rank(report: Report, where: str, halves: list[tuple[Tensor, int]], stated: Any) -> None:
    """``halves`` are tensors with the axis that is the rank; ``stated`` is the rank that a
    configuration gives, if any."""
    ranks: dict[int, list[str]] = {}
    for tensor, axis in halves:
        if len(tensor.shape) >= -axis:
            ranks.setdefault(tensor.shape[axis], []).append(tensor.name)
    usual = (
        stated
        if type(stated) is int
        else max(ranks, key=lambda rank: len(ranks[rank]), default=None)
    )
    for rank, names in ranks.items():
        if rank != usual:
            for name in names:
                report.damaged(
                    f"{where}: {name} has rank {rank}, where "
                    f"{'the configuration' if stated else 'the rest'} has {usual}.",
                    name,
                )


def _every_layer(
    report: Report,
    where: str,
    tensors: list[Tensor],
    count: int | None,
    picked: set[int] | None = None,
) -> None:
    """Each kind of tensor is there for each layer (``picked``, or up to the last that any has);
    stacked ones have ``count`` layers."""
    seen: dict[str, set[int]] = {}
    for tensor in tensors:
        layer = layers.number(tensor.name)
        if layer is not None:
            seen.setdefault(layers.family(tensor.name), set()).add(layer)
        elif count and layers.is_stacked(tensor.name) and tensor.shape[:1] != (count,):
            report.damaged(
                f"{where}: {tensor.name} is {list(tensor.shape)}: not the {count} layers of its "
                "base.",
                tensor.name,
            )
    every = set().union(*seen.values()) | (set(range(count)) if count and seen else set())
    every = picked or every | set(range(max(every, default=-1) + 1))
    if len(every) * len(seen) > _MOST_PLACES:
        report.damaged(f"{where} has {len(seen):,} kinds of tensors for {len(every):,} layers.")
        return
    for kind, have in seen.items():
        if missing := every - have:
            report.damaged(
                f"{where}: {kind} is missing in "
                f"{layers.spans(range(layer, layer + 1) for layer in missing)}.",
                kind,
            )
