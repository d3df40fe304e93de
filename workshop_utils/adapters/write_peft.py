"""Write a LoRA adapter in the layout of Hugging Face PEFT, which vLLM, TensorRT-LLM and NIM read
too: ``adapter_config.json`` is PEFT's ``LoraConfig``, the tensors have the names that
``PeftModel.save_pretrained`` gives those of a Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.adapters.modules import separated
from workshop_utils.adapters.record import Record
from workshop_utils.checkpoints.formats.lora_layout import PEFT_CONFIG, modules_of, peft_key

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"


def config_for(adapter: LoraAdapter, base: str) -> dict[str, Any]:
    """``adapter_config.json``: only fields that PEFT 0.17 to 0.21 and vLLM know, so that none
    warns.

    Dropout is 0: NeMo's default drops the adapter's output, which PEFT cannot express, and
    inference uses none.
    """
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    modules = {
        module.split(".")[1]
        for target in adapter.targets
        for module in modules_of(target, adapter.architecture)
    }
    layers = sorted({layer for layer, _ in adapter.weights}) if adapter.some_layers else None
    if layers and len(adapter.weights) < len(layers) * len(adapter.targets):
        modules = {f"model.layers.{layer}.{module}" for layer, module in adapter.weights}
        layers = None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": bool(adapter.magnitudes),
        "modules_to_save": None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def tensors_for(adapter: LoraAdapter) -> dict[str, Tensor]:
    """Flat ``{key: tensor}`` with ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]`` and, of DoRA,
    ``lora_magnitude_vector`` ``[out]``, each with storage of its own.

    Raises :class:`UnsupportedAdapter`, see :func:`.modules.separated`.
    """
    state = {}
    apart = separated(adapter)
    for place, (a, b) in apart.weights.items():
        state[peft_key(*place, "A")], state[peft_key(*place, "B")] = a, b
        if place in apart.magnitudes:
            state[peft_key(*place, "magnitude")] = apart.magnitudes[place]
    return {key: tensor.clone().contiguous() for key, tensor in state.items()}


def write_hf_peft(adapter: LoraAdapter, directory: Path, record: Record) -> None:
    """Write the two files PEFT reads into the existing ``directory``; errors as
    :func:`tensors_for`."""
    from safetensors.torch import save_file

    save_file(tensors_for(adapter), directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config_for(adapter, record.base), indent=2)
    (directory / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")
