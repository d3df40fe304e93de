"""Parts that model-parallel ranks wrote each for itself: do they fit one another, and the
architecture?"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.checkpoints.verify.shapes import check_megatron, sane_layers

_STAGE = re.compile(r"(?:pp_rank|mp_rank_\d+)_(\d+)")


def check(
    report: Report,
    tensors: Iterable[Tensor],
    parallel: tuple[int, int],
    fields: Mapping[str, Any] | None = None,
    config: str = "",
) -> None:
    """In each pipeline stage all ranks hold the same tensors, in the slices that ``fields`` (None:
    not known), which the file ``config`` states, ask for.

    ``parallel`` are the tensor- and the pipeline-parallel size. The files' names tell rank and
    stage.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        for file in tensor.files:
            parts.setdefault(file, {})[tensor.name] = tensor
    stages: dict[int, list[str]] = {}
    for file in sorted(parts):
        match = _STAGE.search(file)
        stages.setdefault(int(match[1]) if match else 0, []).append(file)
    for first, *others in stages.values():
        for other in others:
            _compare(report, first, parts[first], other, parts[other])
    report.checked.append(
        f"the parts of all {parallel[0]} x {parallel[1]} ranks hold the same tensors"
    )
    if not fields:
        report.unknown(
            "whether the shapes of the parts fit the architecture, which is not one that is "
            "known here",
            Code.ARCHITECTURE,
        )
    elif sane_layers(report, config, fields["num_layers"]):
        for stage, files in stages.items():
            check_megatron(report, parts[files[0]].values(), fields, config, stage, parallel)
        report.checked.append(
            "every rank has the slices, and every stage the layers, that the configuration asks for"
        )


def _compare(
    report: Report, first: str, one: dict[str, Tensor], other: str, two: dict[str, Tensor]
) -> None:
    """The parts of two ranks of one stage."""
    for name in sorted(one.keys() ^ two.keys()):
        lacking = other if name in one else first
        report.damaged(
            f"{report.where}: {lacking} has no {name}, which another rank of the same stage has.",
            name,
            Code.RANKS,
            file=lacking,
        )
    for name in sorted(one.keys() & two.keys()):
        a, b = one[name], two[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            text = (
                f"is {list(b.shape)} of {b.dtype} in {other}, but {list(a.shape)} of {a.dtype} "
                f"in {first}."
            )
            report.tensor(name, text, Code.RANKS, file=other)
