"""Parts that model-parallel ranks wrote each for itself: do they fit one another, and the
architecture?"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.megatron_layout import (
    EMBEDDING,
    OUTPUT,
    layout,
    stacked_name,
)
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify import layers
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.checkpoints.verify.shapes import sane_layers, without_prefix

_STAGE = re.compile(r"(?:pp_rank|mp_rank_\d+)_(\d+)")
_FINAL = "decoder.final_layernorm."

Parts = dict[str, dict[str, Tensor]]
"""File -> name -> tensor."""


def check(
    report: Report,
    where: str,
    tensors: Iterable[Tensor],
    parallel: tuple[int, int],
    fields: Mapping[str, Any] | None = None,
) -> None:
    """In each pipeline stage all ranks hold the same tensors, in the slices that ``fields`` (None:
    not known) ask for.

    ``parallel`` are the tensor- and the pipeline-parallel size. The files' names tell rank and
    stage.
    """
    parts: Parts = {}
    for tensor in tensors:
        for file in tensor.files:
            parts.setdefault(file, {})[tensor.name] = tensor
    stages: dict[int, list[str]] = {}
    for file in sorted(parts):
        found = _STAGE.search(file)
        stages.setdefault(int(found[1]) if found else 0, []).append(file)
    for first, *others in stages.values():
        for other in others:
            _compare(report, where, parts, first, other)
    report.checked.append(
        f"the parts of all {parallel[0]} x {parallel[1]} ranks hold the same tensors"
    )
    if not fields:
        report.untold.append(
            "whether the shapes of the parts fit the architecture, which is not one that is "
            "known here"
        )
    elif sane_layers(report, where, fields["num_layers"]):
        for stage, files in stages.items():
            _check_stage(report, where, parts[files[0]], stage, parallel, fields)
        report.checked.append(
            "every rank has the slices, and every stage the layers, that the configuration asks for"
        )


def _compare(report: Report, where: str, parts: Parts, first: str, other: str) -> None:
    for name in sorted(parts[first].keys() ^ parts[other].keys()):
        lacking = other if name in parts[first] else first
        report.damaged(
            f"{where}: {lacking} has no {name}, which another rank of the same stage has.", name
        )
    for name in sorted(parts[first].keys() & parts[other].keys()):
        one, two = parts[first][name], parts[other][name]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            report.damaged(
                f"{where}: {name} is {list(two.shape)} of {two.dtype} in {other}, but "
                f"{list(one.shape)} of {one.dtype} in {first}.",
                name,
            )


def _check_stage(
    report: Report,
    where: str,
    part: dict[str, Tensor],
    stage: int,
    parallel: tuple[int, int],
    fields: Mapping[str, Any],
) -> None:
    """One rank's part of the pipeline stage ``stage``; stages number their layers from 0."""
    tensor_parallel, pipeline = parallel
    count, rest = divmod(fields["num_layers"], pipeline)
    found = {without_prefix(name): tensor for name, tensor in part.items()}
    rows = next(
        (
            found[name].shape[0]
            for name in (EMBEDDING, OUTPUT)
            if name in found and found[name].shape
        ),
        0,
    )
    expected = layout(dict(fields), rows * tensor_parallel)
    seen: dict[str, set[int]] = {}
    for name, tensor in found.items():
        kind, place = stacked_name(name, expected)
        weight = expected.get(kind)
        if weight is None:
            continue
        shape = list(weight.shape[len(place) :])
        if weight.split is not None:
            axis = weight.split + weight.stacked - len(place)
            shape[axis] = (
                shape[axis] // tensor_parallel if shape[axis] % tensor_parallel == 0 else -1
            )
        if list(tensor.shape) != shape:
            report.damaged(
                f"{where}: {tensor.name} is {list(tensor.shape)} in stage {stage}, but has to be "
                f"{shape}.",
                tensor.name,
            )
        seen.setdefault(kind, set()).update(place[:1])
    for kind, weight in expected.items():
        first_only, last_only = kind == EMBEDDING, kind == OUTPUT or kind.startswith(_FINAL)
        if (first_only and stage > 0) or (last_only and stage < pipeline - 1):
            continue
        if kind not in seen:
            report.damaged(f"{where}: {kind} is missing in stage {stage}.", kind)
        elif weight.stacked and not rest and seen[kind] != set(range(count)):
            wrong = seen[kind] ^ set(range(count))
            text = layers.spans(range(layer, layer + 1) for layer in wrong)
            report.damaged(
                f"{where}: {kind}: {text} of stage {stage} missing or too many; a stage has "
                f"{count}.",
                kind,
            )
