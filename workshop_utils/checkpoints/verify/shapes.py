"""Are all tensors of the architecture there, in the shapes and dtypes that it asks for?"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.megatron_layout import (
    EMBEDDING,
    OUTPUT,
    layout,
    stacked_name,
)
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify import layers
from workshop_utils.checkpoints.verify.report import Report

_PREFIX = re.compile(r"^(?:module\.|model\.)*(?=decoder\.|embedding\.|output_layer\.)")
_FINAL = "decoder.final_layernorm."
_HALF = {"float16", "bfloat16"}
_MOST_LAYERS = 10_000
_ALL_THERE = "every tensor and every layer that {} asks for is there, in its shape"

HUGGING_FACE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose names and shapes are known here: a decoder with a gated
feed-forward network in every layer."""


def sane_layers(report: Report, config: str, count: int) -> bool:
    """Whether a model can have ``count`` layers, as the file ``config`` states."""
    if count > _MOST_LAYERS:
        report.damaged(f"{config} states {count:,} layers.", code=Code.LAYERS, file=config)
    return count <= _MOST_LAYERS


def check_megatron(
    report: Report,
    tensors: Iterable[Tensor],
    fields: Mapping[str, Any],
    config: str,
    stage: int | None = None,
    parallel: tuple[int, int] = (1, 1),
) -> None:
    """Names and shapes of a whole model against ``fields`` (of ``read_fields``), which the file
    ``config`` states; with ``stage`` of one rank's part of that pipeline stage.

    ``parallel`` are the tensor- and the pipeline-parallel size; stages number their layers from 0.
    """
    if not sane_layers(report, config, fields["num_layers"]):
        return
    named = {_PREFIX.sub("", tensor.name): tensor for tensor in tensors}
    tensor_parallel, stages = parallel
    config += "" if stage is None else f" for stage {stage}"
    tables = [named[name].shape for name in (EMBEDDING, OUTPUT) if name in named]
    rows = next((shape[0] for shape in tables if shape), 0)
    expected = layout(dict(fields), rows * tensor_parallel or fields["vocab_size"] or 0)
    seen: dict[str, set[int]] = {}
    for name, tensor in named.items():
        kind, place = stacked_name(name, expected)
        weight = expected.get(kind)
        if weight is None:
            tied = kind == OUTPUT and fields["share_embeddings_and_output_weights"]
            if stage is None and not tied and "rotary" not in kind:
                text = f"{tensor.name} is no part of the architecture in {config}."
                report.note(text, Code.FOREIGN_TENSOR, tensor=tensor.name, source=config)
            continue
        shape = list(weight.shape[len(place) :])
        if weight.split is not None:
            axis = weight.split + weight.stacked - len(place)
            slice_, rest = divmod(shape[axis], tensor_parallel)
            shape[axis] = -1 if rest else slice_
        _compare(report, tensor, tuple(shape), config)
        every = range(weight.shape[0] if weight.stacked else 1)
        seen.setdefault(kind, set()).update(place[:1] or every)
    for kind, weight in expected.items():
        if stage and kind == EMBEDDING:
            continue
        if stage is not None and stage < stages - 1 and (kind == OUTPUT or kind.startswith(_FINAL)):
            continue
        count, uneven = divmod(weight.shape[0], stages) if weight.stacked else (1, 0)
        every = seen.get(kind, set()) if uneven else set(range(count))
        _complete(report, kind, every, seen.get(kind, set()), config)
    if stage is not None:
        return
    if EMBEDDING in named and rows < (fields["vocab_size"] or 0):
        text = f"has {rows:,} rows, but {config} states a vocabulary of {fields['vocab_size']:,}."
        report.tensor(named[EMBEDDING].name, text, Code.SHAPE, source=config)
    report.checked.append(_ALL_THERE.format(config))


def _compare(report: Report, tensor: Tensor, shape: tuple[int, ...], config: str) -> None:
    if tensor.shape != shape:
        text = f"is {list(tensor.shape)}, but by {config} it has to be {list(shape)}."
        report.tensor(tensor.name, text, Code.SHAPE, source=config)


def _complete(report: Report, kind: str, every: set[int], seen: set[int], config: str) -> None:
    """``every`` layer that ``config`` asks for is ``seen``; {0} for what is in no layer."""
    if not seen:
        # A tensor that its reader reported is left out of what it returns.
        known = {_PREFIX.sub("", finding.tensor) for finding in report.refused if finding.tensor}
        if kind not in known:
            text = f"is missing; {config} asks for it."
            report.tensor(kind, text, Code.MISSING_TENSOR, source=config)
        return
    for wrong, text, code in (
        (every - seen, "is missing in", Code.MISSING_TENSOR),
        (seen - every, "is there for", Code.LAYERS),
    ):
        if wrong:
            text = f"{text} {layers.spans(wrong)}, but {config} states {len(every)} layers."
            report.tensor(kind, text, code, source=config)


def check_hugging_face(
    report: Report, tensors: Iterable[Tensor], sizes: Architecture, family: str
) -> None:
    """Names and shapes of a whole model of one of the families :data:`HUGGING_FACE` against its
    ``config.json``."""
    config = "config.json"
    if not sane_layers(report, config, sizes.layers):
        return
    queries, keys = sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, sizes.hidden),
        "self_attn.k_proj.weight": (keys, sizes.hidden),
        "self_attn.v_proj.weight": (keys, sizes.hidden),
        "self_attn.o_proj.weight": (sizes.hidden, queries),
        "mlp.gate_proj.weight": (sizes.ffn, sizes.hidden),
        "mlp.up_proj.weight": (sizes.ffn, sizes.hidden),
        "mlp.down_proj.weight": (sizes.hidden, sizes.ffn),
        "input_layernorm.weight": (sizes.hidden,),
        "post_attention_layernorm.weight": (sizes.hidden,),
    }
    if family == "qwen2":
        rows = {"q": queries, "k": keys, "v": keys}
        block |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
    if family == "qwen3":
        block |= {f"self_attn.{name}_norm.weight": (sizes.head_dim,) for name in "qk"}
    table = (sizes.vocabulary, sizes.hidden) if sizes.vocabulary else None
    outside = {"model.norm.weight": (sizes.hidden,), "model.embed_tokens.weight": table}
    if not sizes.tied:
        outside["lm_head.weight"] = table
    seen: dict[str, set[int]] = {}
    for tensor in tensors:
        layer = layers.number(tensor.name)
        kind = tensor.name if layer is None else tensor.name.partition(f".{layer}.")[2]
        if shape := (outside if layer is None else block).get(kind):
            _compare(report, tensor, shape, config)
        seen.setdefault(kind, set()).add(layer or 0)
    for kind in outside:
        _complete(report, kind, {0}, seen.get(kind, set()), config)
    every = set(range(sizes.layers))
    for kind in block:
        _complete(report, f"model.layers.*.{kind}", every, seen.get(kind, set()), config)
    report.checked.append(_ALL_THERE.format(config))


def check_uniform(report: Report, tensors: Iterable[Tensor], sizes: Architecture | None) -> None:
    """For a family that is not known here: no layer is missing altogether, by the numbers in the
    names or the stacked first axis."""
    config, numbered, count = "the configuration", set(), sizes.layers if sizes else None
    if count and not sane_layers(report, config, count):
        return
    for tensor in tensors:
        layer = layers.number(tensor.name)
        if layer is not None:
            numbered.add(layer)
        elif count and layers.is_stacked(tensor.name) and tensor.shape and tensor.shape[0] != count:
            text = f"is {list(tensor.shape)}, but {config} states {count} layers."
            report.tensor(tensor.name, text, Code.LAYERS)
    if numbered:
        every = set(range(count or max(numbered) + 1))
        _complete(report, "every tensor", every, numbered, config)
    report.checked.append("no layer is missing altogether")


def check_dtypes(report: Report, tensors: Iterable[Tensor], stated: Any = None) -> None:
    """float16 and bfloat16 are never mixed, nor dtypes among the layers of one kind; ``stated`` is
    the configuration's."""
    elements: dict[str, int] = {}
    families: dict[str, dict[str, list[str]]] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
        kinds = families.setdefault(layers.family(tensor.name), {})
        kinds.setdefault(tensor.dtype, []).append(tensor.name)
    most = max(elements, key=elements.get, default=None)
    halves = _HALF & elements.keys()
    fewer = min(halves, key=elements.get) if len(halves) == 2 else None
    for kinds in families.values():
        usual = max(kinds, key=lambda dtype: (len(kinds[dtype]), dtype == most))
        for dtype, name in ((dtype, name) for dtype, names in kinds.items() for name in names):
            if dtype != usual:
                text = f"is {dtype}; in the other layers it is {usual}."
                report.tensor(name, text, Code.DTYPE)
            elif dtype == fewer:
                text = f"is {dtype}, while most weights are {most}; no program saves both."
                report.tensor(name, text, Code.DTYPE)
    report.checked.append("dtypes are consistent")
    if isinstance(stated, str) and most and stated != most:
        text = f"most weights are {most}, but the configuration states {stated}."
        report.note(text, Code.DTYPE)
