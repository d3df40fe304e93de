"""Write a LoRA adapter as a ``.nemo``, for one of its two readers.

NeMo keeps q, k and v interleaved and applies ``alpha / adapter_dim`` itself. TensorRT-LLM's reader
reorders nothing, expects all q, then all k, then all v, reads no value of the YAML and never
applies alpha (``tensorrt_llm/lora_manager.py``: ``load_from_nemo``, ``get_all_nemo_lora_weights``).
One file cannot serve both, so each says which reader it is for.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.adapters.read_nemo1 import read_state
from workshop_utils.adapters.record import Record
from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.lora_layout import TARGETS, nemo1_key
from workshop_utils.checkpoints.formats.qkv import reorder
from workshop_utils.core.errors import UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor


def refuse_for_trtllm(adapter: LoraAdapter) -> None:
    """TensorRT-LLM's ``.nemo`` reader knows one module, ``attn_qkv``: raise
    :class:`UnsupportedAdapter` where the adapter has other targets."""
    taken = {"attention_qkv", *TARGETS["attention_qkv"].modules}
    others = [target for target in adapter.targets if target not in taken]
    if others:
        raise UnsupportedAdapter(
            f"{shown(adapter.source)} adapts {', '.join(others)}. TensorRT-LLM's .nemo reader "
            "takes attention_qkv only. Export it with --to hf-peft, which takes every target."
        )


def config_for(adapter: LoraAdapter, record: Record) -> dict[str, Any]:
    """``model_config.yaml`` of the export: the trained one, with what was changed and the
    ``workshop`` section."""
    config = copy.deepcopy(adapter.config)
    config["tensor_model_parallel_size"] = config["pipeline_model_parallel_size"] = 1
    # Written out because NeMo's converter takes another default (all heads) only when the field is
    # absent, not when it is null.
    config["num_query_groups"] = adapter.architecture.qkv.groups
    config["peft"]["lora_tuning"] |= {
        "variant": "nemo",
        "target_modules": list(adapter.targets),
        # Fusing what another program trained apart may take a larger rank.
        "adapter_dim": adapter.rank,
        "alpha": adapter.rank if record.alpha_baked_in else adapter.alpha,
    }
    config["workshop"] = record.as_dict()
    return config


def tensors_for(adapter: LoraAdapter, record: Record) -> dict[str, Tensor]:
    """Flat ``{key: tensor}`` with ``linear_in`` ``[r, in]`` and ``linear_out`` ``[out, r]``, each
    with storage of its own."""
    state = {}
    for (layer, target), (a, b) in adapter.weights.items():
        if target == "attention_qkv":
            b = reorder(b, adapter.architecture.qkv, adapter.qkv_order, record.qkv_order)
        if record.alpha_baked_in and adapter.scale != 1:
            # In single precision, so that half-precision weights are rounded once.
            b = (b.float() * adapter.scale).to(b.dtype)
        for half, tensor in (("A", a), ("B", b)):
            key = f"model.decoder.{nemo1_key(layer, target, half)}"
            state[key] = tensor.clone().contiguous()
    return state


def write_nemo(adapter: LoraAdapter, target: Path, record: Record) -> None:
    """Write ``adapter`` (of :func:`.modules.fused`) to the file ``target`` as ``record`` says. The
    same adapter gives the same bytes."""
    _write(target, config_for(adapter, record), tensors_for(adapter, record))


def merge_parts(source: Path) -> bool:
    """Replace the ``.nemo`` that several model-parallel ranks wrote by one that holds everything in
    one part, all or nothing.

    Returns whether there was anything to merge. Errors as :func:`.read.read_adapter`.
    """
    config = nemo_archive.read_config(source)
    sizes = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
    if all((config.get(size) or 1) == 1 for size in sizes):
        return False
    whole = {name: tensor.contiguous() for name, tensor in read_state(source, config).items()}
    _write(source, config | sizes | {"sequence_parallel": False}, whole)
    return True


def _write(target: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    import torch

    content = io.BytesIO()
    torch.save(state, content)
    nemo_archive.write(target, config, content.getvalue())
