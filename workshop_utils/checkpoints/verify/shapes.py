"""Are all tensors of the architecture there, in the shapes and dtypes that it asks for?"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.architecture import Architecture
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
_HALF = {"float16", "bfloat16"}
_MOST_LAYERS = 10_000


def sane_layers(report: Report, config: str, count: int) -> bool:
    """Whether ``count``, the layers that the file ``config`` states, is a number that a model can
    have."""
    if count > _MOST_LAYERS:
        report.damaged(f"{config} states {count:,} layers.")
    return count <= _MOST_LAYERS


def without_prefix(name: str) -> str:
    """The name as :func:`~workshop_utils.checkpoints.formats.megatron_layout.layout` has it:
    without ``module.`` or ``model.``."""
    return _PREFIX.sub("", name)


def check_megatron(
    report: Report, where: str, tensors: Iterable[Tensor], fields: Mapping[str, Any], config: str
) -> None:
    """Names and shapes of a whole model against ``fields``, which the file ``config`` states (of
    ``read_fields``)."""
    if not sane_layers(report, config, fields["num_layers"]):
        return
    found = {without_prefix(tensor.name): tensor for tensor in tensors}
    rows = (
        found[EMBEDDING].shape[0]
        if EMBEDDING in found and found[EMBEDDING].shape
        else fields["vocab_size"] or 0
    )
    expected = layout(dict(fields), rows)
    seen: dict[str, set[int]] = {}
    for name, tensor in found.items():
        kind, place = stacked_name(name, expected)
        weight = expected.get(kind)
        if weight is None:
            if (
                not (kind == OUTPUT and fields["share_embeddings_and_output_weights"])
                and "rotary" not in kind
            ):
                report.note(f"{tensor.name} is no part of the architecture in {config}.")
            continue
        _compare(report, where, tensor, weight.shape[len(place) :], config)
        seen.setdefault(kind, set()).update(
            place[:1] or range(weight.shape[0] if weight.stacked else 1)
        )
    for kind, weight in expected.items():
        every = set(range(weight.shape[0] if weight.stacked else 1))
        _complete(report, where, kind, every, seen.get(kind, set()), bool(weight.stacked), config)
    if fields["vocab_size"] and EMBEDDING in found and rows < fields["vocab_size"]:
        tensor = found[EMBEDDING].name
        report.damaged(
            f"{where}: {tensor} has {rows:,} rows, but {config} states a vocabulary of "
            f"{fields['vocab_size']:,}.",
            tensor,
        )
    report.checked.append(
        f"every tensor and every layer that {config} asks for is there, in its shape"
    )


def _compare(
    report: Report, where: str, tensor: Tensor, shape: tuple[int, ...], config: str
) -> None:
    if tensor.shape != shape:
        report.damaged(
            f"{where}: {tensor.name} is {list(tensor.shape)}, but by {config} it has to be "
            f"{list(shape)}.",
            tensor.name,
        )


def _complete(
    report: Report,
    where: str,
    kind: str,
    every: set[int],
    seen: set[int],
    stacked: bool,
    config: str,
) -> None:
    if not seen:
        # A tensor that its reader reported is left out of what it returns.
        if not any(
            finding.tensor and without_prefix(finding.tensor) == kind for finding in report.findings
        ):
            report.damaged(f"{where}: {kind} is missing; {config} asks for it.", kind)
    elif stacked and seen != every:
        for wrong, text in ((every - seen, "is missing in"), (seen - every, "is there for")):
            if wrong:
                which = layers.spans(range(layer, layer + 1) for layer in wrong)
                report.damaged(
                    f"{where}: {kind} {text} {which}, but {config} states {len(every)} layers.",
                    kind,
                )


HUGGING_FACE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose names and shapes are known here: a decoder with a gated
feed-forward network in every layer."""


def check_hugging_face(
    report: Report, where: str, tensors: Iterable[Tensor], sizes: Architecture, family: str
) -> None:
    """Names and shapes of a whole Hugging Face model of one of the families above against its
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
        block |= {
            f"self_attn.{name}_proj.bias": (rows,)
            for name, rows in (("q", queries), ("k", keys), ("v", keys))
        }
    if family == "qwen3":
        block |= {f"self_attn.{name}_norm.weight": (sizes.head_dim,) for name in "qk"}
    expected: dict[str, tuple[int, ...] | None] = {"model.norm.weight": (sizes.hidden,)}
    expected["model.embed_tokens.weight"] = (
        (sizes.vocabulary, sizes.hidden) if sizes.vocabulary else None
    )
    if not sizes.tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    seen: dict[str, set[int]] = {}
    for tensor in tensors:
        layer = layers.number(tensor.name)
        kind = tensor.name if layer is None else tensor.name.partition(f".{layer}.")[2]
        shape = (expected if layer is None else block).get(kind)
        if shape:
            _compare(report, where, tensor, shape, config)
        seen.setdefault(kind, set()).add(layer or 0)
    for kind in expected:
        _complete(report, where, kind, {0}, seen.get(kind, set()), False, config)
    for kind in block:
        _complete(
            report,
            where,
            f"model.layers.*.{kind}",
            set(range(sizes.layers)),
            seen.get(kind, set()),
            True,
            config,
        )
    report.checked.append(
        f"every tensor and every layer that {config} asks for is there, in its shape"
    )


def check_uniform(
    report: Report, where: str, tensors: Iterable[Tensor], sizes: Architecture | None
) -> None:
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
            report.damaged(
                f"{where}: {tensor.name} is {list(tensor.shape)}, but {config} states {count} "
                "layers.",
                tensor.name,
            )
    if numbered:
        every = set(range(count or max(numbered) + 1))
        _complete(report, where, "every tensor", every, numbered, True, config)
    report.checked.append("no layer is missing altogether")


def check_dtypes(
    report: Report, where: str, tensors: Iterable[Tensor], stated: str | None = None
) -> None:
    """float16 and bfloat16 are never mixed, nor dtypes among the layers of one kind; ``stated`` is
    the configuration's."""
    elements: dict[str, int] = {}
    families: dict[str, dict[str, list[str]]] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
        families.setdefault(layers.family(tensor.name), {}).setdefault(tensor.dtype, []).append(
            tensor.name
        )
    most = max(elements, key=elements.get, default=None)
    halves = _HALF & elements.keys()
    for kinds in families.values():
        usual = max(kinds, key=lambda dtype: (len(kinds[dtype]), dtype == most))
        for dtype, names in kinds.items():
            for name in names:
                if dtype != usual:
                    report.damaged(
                        f"{where}: {name} is {dtype}; in the other layers it is {usual}.", name
                    )
                elif len(halves) == 2 and dtype == min(halves, key=elements.get):
                    report.damaged(
                        f"{where}: {name} is {dtype}, while most weights are {most}; no program "
                        "saves both.",
                        name,
                    )
    report.checked.append("dtypes are consistent")
    if stated and most and stated != most:
        report.note(f"most weights are {most}, but the configuration states {stated}.")
