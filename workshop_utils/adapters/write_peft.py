"""Write a LoRA adapter in the layout of Hugging Face PEFT, which vLLM, TensorRT-LLM and NIM read
too.

Formats: ``adapter_config.json`` is PEFT's ``LoraConfig``; the tensor names are those of
``PeftModel.save_pretrained`` for a Llama. NeMo fuses projections that Hugging Face keeps apart: A
is the same for each part, B is cut into parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters.adapter import PEFT_CONFIG as CONFIG
from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.adapters.modules import hf_modules, separated
from workshop_utils.adapters.record import Record

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
RECORD = "workshop_export.json"


def key(layer: int, module: str, matrix: str) -> str:
    """PEFT's name of a tensor: ``module`` as in :data:`MODULES`, ``matrix`` is ``A`` or ``B``,
    ``layer`` counts from 0."""
    return f"base_model.model.model.layers.{layer}.{module}.lora_{matrix}.weight"


def magnitude_key(layer: int, module: str) -> str:
    """PEFT's name of the lengths that DoRA gives the rows of a module's weight."""
    return f"base_model.model.model.layers.{layer}.{module}.lora_magnitude_vector"


def config_for(adapter: LoraAdapter, record: Record) -> dict[str, Any]:
    """``adapter_config.json``: only fields that PEFT 0.17 to 0.21 and vLLM know, so that none
    warns.

    Dropout is 0: NeMo's default drops the adapter's output, which PEFT cannot express, and
    inference uses none.
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
        "target_modules": sorted(module.split(".")[1] for module in hf_modules(adapter)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": bool(adapter.magnitudes),
        "modules_to_save": None,
        "layers_to_transform": sorted({layer for layer, _ in adapter.weights})
        if adapter.some_layers
        else None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def tensors_for(adapter: LoraAdapter) -> dict[str, Tensor]:
    """Flat ``{key: tensor}`` with ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]``, each with
    storage of its own.

    A DoRA adapter has ``lora_magnitude_vector`` ``[out]`` as well. Raises
    :class:`UnsupportedAdapter`, see :func:`.modules.separated`.
    """
    state = {}
    apart = separated(adapter)
    for (layer, module), (a, b) in apart.weights.items():
        state[key(layer, module, "A")] = a.clone().contiguous()
        state[key(layer, module, "B")] = b.clone().contiguous()
        if (layer, module) in apart.magnitudes:
            state[magnitude_key(layer, module)] = (
                apart.magnitudes[layer, module].clone().contiguous()
            )
    return state


def write_hf_peft(adapter: LoraAdapter, directory: Path, record: Record) -> None:
    """Write the two files PEFT reads into the existing ``directory``.

    Raises:
        UnsupportedAdapter: see :func:`tensors_for`.
    """
    from safetensors.torch import save_file

    save_file(tensors_for(adapter), directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(
        json.dumps(config_for(adapter, record), indent=2) + "\n", encoding="utf-8"
    )
