"""Write a LoRA adapter in the layout of Hugging Face PEFT, which vLLM, TensorRT-LLM and NIM read too.

Formats: ``adapter_config.json`` is PEFT's ``LoraConfig``; the tensor names are those of ``PeftModel.save_pretrained`` for a
Llama. NeMo fuses projections that Hugging Face keeps apart: A is the same for each part, B is cut into parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.errors import UnsupportedAdapter
from workshop_utils.export.adapter import LoraAdapter
from workshop_utils.export.qkv import split
from workshop_utils.export.record import Record
from workshop_utils.paths import shown

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "workshop_export.json"
#: Hugging Face's modules of a Llama layer for each target of NeMo, in the order of B's parts.
MODULES = {
    "attention_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_dense": ("self_attn.o_proj",),
    "mlp_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_fc2": ("mlp.down_proj",),
}


def key(layer: int, module: str, matrix: str) -> str:
    """PEFT's name of a tensor: ``module`` as in :data:`MODULES`, ``matrix`` is ``A`` or ``B``, ``layer`` counts from 0."""
    return f"base_model.model.model.layers.{layer}.{module}.lora_{matrix}.weight"


def config_for(adapter: LoraAdapter, record: Record) -> dict[str, Any]:
    """``adapter_config.json``: only fields that PEFT 0.17 to 0.21 and vLLM know, so that none warns.

    Dropout is 0: NeMo's default drops the adapter's output, which PEFT cannot express, and inference uses none.
    """
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.base,
        "revision": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(module.split(".")[1] for target in adapter.targets for module in MODULES[target]),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def tensors_for(adapter: LoraAdapter) -> dict[str, Tensor]:
    """Flat ``{key: tensor}`` with ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]``, each with storage of its own."""
    state = {}
    for (layer, target), (linear_in, linear_out) in adapter.weights.items():
        if target == "attention_qkv":
            parts = split(linear_out, adapter.architecture.heads, adapter.qkv_order)
        else:
            parts = linear_out.chunk(len(MODULES[target]))
        for module, part in zip(MODULES[target], parts, strict=True):
            state[key(layer, module, "A")] = linear_in.clone().contiguous()
            state[key(layer, module, "B")] = part.clone().contiguous()
    return state


def write_hf_peft(adapter: LoraAdapter, directory: Path, record: Record) -> None:
    """Write the two files PEFT reads, and the export's record, into the existing ``directory``.

    Raises:
        UnsupportedAdapter: the base has a plain MLP, which a Llama in Hugging Face's layout does not have.
    """
    from safetensors.torch import save_file

    if "mlp_fc1" in adapter.targets and not adapter.architecture.gated:
        raise UnsupportedAdapter(
            f"{shown(adapter.source)}: mlp_fc1 with activation {adapter.config.get('activation')!r} has no gate; only gated "
            "models (fast-swiglu: gate_proj and up_proj) can be exported to hf-peft."
        )
    save_file(tensors_for(adapter), directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config_for(adapter, record), indent=2) + "\n", encoding="utf-8")
    (directory / RECORD).write_text(json.dumps(record.as_dict(), indent=2) + "\n", encoding="utf-8")
