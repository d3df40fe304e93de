"""Architecture and LoRA settings in a NeMo 1 ``model_config.yaml``, of a ``.nemo`` archive or of a directory.

The keys are those that ``nemo/collections/nlp/models/language_modeling/megatron_gpt_model.py`` (NeMo 2.4.1) reads.
"""

import os
from collections.abc import Mapping
from typing import Any

from workshop_utils.formats.architecture import Architecture, number, size
from workshop_utils.formats.llama_config import ROPE_SCALING
from workshop_utils.formats.summary import Adapter


def architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The sizes that ``config`` states, or None when one that has no default is missing or no number."""
    layers, hidden, heads = (size(config, name) for name in ("num_layers", "hidden_size", "num_attention_heads"))
    if not (layers and hidden and heads):
        return None
    scaled = config.get("scale_positional_embedding") is True
    return Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=size(config, "num_query_groups", heads),
        head_dim=size(config, "kv_channels", hidden // heads),
        ffn=size(config, "ffn_hidden_size", 4 * hidden),
        vocabulary=size(config, "override_vocab_size"),
        tied=config.get("share_embeddings_and_output_weights", True) is True,
        rope_base=number(config, "rotary_base", 10000),
        rope_scaling={name: config.get(name) for name in ROPE_SCALING} if scaled else None,
    )


def adapter(config: Mapping[str, Any]) -> Adapter | None:
    """The LoRA settings in ``config``, or None when it describes a whole model."""
    peft = config.get("peft")
    lora = peft.get("lora_tuning") if isinstance(peft, Mapping) and peft.get("peft_scheme") == "lora" else None
    if not isinstance(lora, Mapping):
        return None
    base = config.get("restore_from_path")
    base = base if isinstance(base, str) else None
    targets = lora.get("target_modules")
    return Adapter(
        rank=size(lora, "adapter_dim"),
        alpha=number(lora, "alpha"),
        targets=tuple(str(target) for target in targets) if isinstance(targets, list) else (),
        base=base,
        base_is_here=os.path.exists(base) if base else None,
    )


def tokenizer(config: Mapping[str, Any]) -> str | None:
    """``library: name or file`` of the tokenizer."""
    described = config.get("tokenizer")
    if not isinstance(described, Mapping):
        return None
    return f"{described.get('library')}: {described.get('type') or described.get('model')}"
