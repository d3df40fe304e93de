"""Rules for an adapter in a ``.nemo``.

``trtllm``: ``tensorrt_llm/lora_manager.py`` (``load_from_nemo``, ``unpack_nemo_weights``,
``get_all_nemo_lora_weights``), which reads no value of the YAML, reorders nothing and never applies
alpha. ``nemo``: ``nemo/export/utils/lora_converter.py`` and ``MegatronGPTSFTModel.load_adapters``.
NIM 1.x names the format in its pages, but its own loader is closed.
"""

import re
from pathlib import Path
from typing import Any

from workshop_utils.adapters.rules.rules import (
    TRAINED,
    Judgement,
    check_rank,
    check_storage,
    check_values,
    first,
)
from workshop_utils.checkpoints.formats import nemo1, nemo_archive
from workshop_utils.checkpoints.formats.lora_layout import read_layout, stated_lora
from workshop_utils.checkpoints.formats.rank_files import rank_files
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.verify import companions
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core.errors import CheckpointError, UnsupportedAdapter
from workshop_utils.core.paths import shown

_ADAPTER = "self_attention.adapter_layer.lora_kqv_adapter"
_LAYER = re.compile(r".*\.layers\.(\d+)\..*")
#: What NeMo's converter reads of the YAML, beside ``peft.lora_tuning``.
_CONVERTER = (
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_layers",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)


def check(found: Judgement, path: Path, max_rank: int | None) -> None:
    """Judge the archive ``path``; ``found.reader`` is ``trtllm``, ``nim1`` or ``nemo``."""
    for_trtllm = found.reader != "nemo"
    again = found.again("nemo", "--reader", "trtllm" if for_trtllm else "nemo")
    report = Report(path)
    try:
        members = nemo_archive.members(path)
        config = nemo_archive.read_config(path)
        companions.check_targets(report, f"{shown(path)}:{nemo_archive.CONFIG}", config)
        checkpoint = nemo1.describe(path, report.add)
    except CheckpointError as error:
        found.check(
            "it can be read, and nothing in it runs code",
            str(error),
            "fetch it again from where it was made; do not load it",
        )
        return
    fault = first([str(finding) for finding in report.refused])
    if not found.check(
        "it can be read, and nothing in it runs code",
        fault,
        "fetch it again from where it was made; do not load it",
    ):
        return
    if for_trtllm and any(_ADAPTER not in tensor.name for tensor in checkpoint.tensors):
        again = found.again("hf-peft")
    compressed = "it is compressed with gzip" if nemo_archive.is_compressed(path) else None
    found.check("a plain, uncompressed tar", compressed, f"gunzip it, or: {again}")
    if not _check_members(found, [member.stored_name for member in members], again):
        return
    fault = _no_lora(path, config)
    if not found.check(
        "a LoRA adapter: peft.peft_scheme lora, variant nemo",
        fault,
        "no server reads another kind: train with these two; a whole model is served as a model",
    ):
        return
    _check_keys(found, checkpoint, for_trtllm)
    rank = _check_layout(found, path, config, checkpoint)
    check_rank(
        found,
        rank,
        max_rank,
        "NIM_MAX_LORA_RANK" if found.reader == "nim1" else "the largest LoRA rank",
    )
    _check_config(found, config, rank, for_trtllm, again)
    check_storage(found, checkpoint, checkpoint.nbytes, again)
    check_values(
        found,
        checkpoint,
        {tensor.name for tensor in checkpoint.tensors if ".linear_out." in tensor.name},
        again,
    )


def _check_members(found: Judgement, names: list[str], again: str) -> bool:
    plain = [name.removeprefix("./") for name in names]
    ranks = rank_files(plain)
    parts = (
        f"it holds the parts of {len(ranks)} model-parallel ranks: {first(sorted(ranks.values()))}"
        if len(ranks) > 1
        else None
    )
    found.check("the weights are in one part", parts, f"put them together: {again}")
    wanted = [nemo_archive.CONFIG, nemo_archive.WEIGHTS]
    one_prefix = sorted(names) in (wanted, [f"./{name}" for name in wanted])
    if sorted(plain) == wanted:
        fault = None if one_prefix else f"the prefixes differ: {', '.join(names)}"
    else:
        fault = f"it holds {', '.join(names[:5])}" + (" ..." if len(names) > 5 else "")
    held = found.check(
        f"exactly {' and '.join(wanted)}, both at the top or both under ./", fault, again
    )
    return not parts and (held or nemo_archive.WEIGHTS in plain)


def _no_lora(path: Path, config: dict[str, Any]) -> str | None:
    try:
        stated_lora(path, config)
    except (CheckpointError, UnsupportedAdapter) as error:
        return str(error)
    return None


def _check_keys(found: Judgement, checkpoint: Checkpoint, for_trtllm: bool) -> None:
    names = [tensor.name for tensor in checkpoint.tensors]
    flat = [
        f"{tensor.name} is {list(tensor.shape)}"
        for tensor in checkpoint.tensors
        if len(tensor.shape) != 2
    ]
    found.check("a flat dictionary of two-dimensional tensors", first(flat), TRAINED)
    if for_trtllm:
        others = [f"the key {name!r}" for name in names if _ADAPTER not in name]
        fix = "export it for PEFT, which takes every module: " + found.again("hf-peft")
        found.check("attention_qkv only", first(others), fix)
    odd = [f"the key {name!r}" for name in names if not _LAYER.match(name)]
    found.check("the layer's number is in every key", first(odd), TRAINED)
    ends = [
        f"the key {name!r}"
        for name in names
        if not name.endswith(("linear_in.weight", "linear_out.weight"))
    ]
    found.check("keys end in linear_in.weight or linear_out.weight", first(ends), TRAINED)


def _check_layout(
    found: Judgement, path: Path, config: dict[str, Any], checkpoint: Checkpoint
) -> int | None:
    """Layers, halves, ranks and shapes, as the exporters read them; the rank."""
    faults: list[str] = []
    rank = None
    try:
        rank = read_layout(
            path,
            config,
            {tensor.name: tensor for tensor in checkpoint.tensors},
            lambda fault: faults.append(str(fault)),
        ).rank
    except (CheckpointError, UnsupportedAdapter) as error:
        faults.append(str(error))
    found.check(
        "every layer has both halves, of one rank, in the shapes that the YAML asks for",
        first(faults),
        TRAINED,
    )
    return rank


def _check_config(
    found: Judgement, config: dict[str, Any], rank: int | None, for_trtllm: bool, again: str
) -> None:
    absent = [f"{field} is missing" for field in _CONVERTER if config.get(field) is None]
    found.check("the YAML has every field that NeMo's converter reads", first(absent), again)
    sizes = [config.get(name) for name in _CONVERTER[-2:]]
    fault = None if all(size in (1, None) for size in sizes) else f"sizes {sizes}"
    whole = (
        "write 1 for both into model_config.yaml if the weights are those of the whole model; else "
    )
    found.check("one tensor-parallel and one pipeline-parallel rank", fault, whole + TRAINED)
    ours = config.get("workshop")
    ours = ours if isinstance(ours, dict) else {}
    order, lora = ours.get("qkv_order"), config["peft"]["lora_tuning"]
    if for_trtllm:
        baked = (
            None
            if lora.get("alpha") == (rank or lora.get("adapter_dim"))
            else f"alpha is {lora.get('alpha')!r} and adapter_dim {lora.get('adapter_dim')!r}"
        )
        found.check(
            "alpha / rank is multiplied into the weights: alpha equals adapter_dim",
            baked,
            f"this reader applies no scale: {again}",
        )
        fault = (
            None
            if order == "qkv"
            else f"they are {order or 'not stated, and NeMo writes them interleaved by group'}"
        )
        found.check(
            "rows of q, k and v are stated, and one after the other (workshop.qkv_order: qkv)",
            fault,
            again,
        )
    else:
        alpha = lora.get("alpha")
        scale = None if type(alpha) in (int, float) and alpha > 0 else f"alpha is {alpha!r}"
        found.check(
            "the scale is recorded: peft.lora_tuning.alpha",
            scale,
            "write the alpha of the training into model_config.yaml",
        )
        fault = "they are one after the other, for TensorRT-LLM" if order == "qkv" else None
        found.check("rows of q, k and v are interleaved by group", fault, again)
        _note_head_size(found, config)
    fault = None if for_trtllm is False or ours.get("reader") else "workshop.reader is missing"
    found.check("the intended reader is stated", fault, again)


def _note_head_size(found: Judgement, config: dict[str, Any]) -> None:
    hidden, heads, channels = (
        config.get(name) for name in ("hidden_size", "num_attention_heads", "kv_channels")
    )
    if (
        all(type(size) is int and size > 0 for size in (hidden, heads, channels))
        and hidden != heads * channels
    ):
        found.note(
            "NeMo's converter takes hidden_size / heads for the head size, and this model's is "
            f"{channels}: use `workshop export --to hf-peft`"
        )
