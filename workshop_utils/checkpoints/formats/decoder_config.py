"""The shape of any decoder, for a description: from Megatron-Core's names of fields, or from
GGUF's.

NeMo 2.0 (``context/model.yaml``), Megatron-Bridge (``run_config.yaml``) and Megatron-LM (``args``)
all use Megatron-Core's names (``megatron/core/transformer/transformer_config.py``). Nothing is
checked here beyond what a description needs; what conversion needs is in :mod:`.gpt_config`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.architecture import Architecture, number, size
from workshop_utils.checkpoints.formats.gpt_classes import ROPE_SCALING

FAMILIES = {
    "llama": "Llama",
    "llama_nemotron": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen": "Qwen2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3",
    "qwen3moe": "Qwen3",
    "nemotron": "Nemotron",
}
"""Name in a configuration -> family: modules of NeMo and Megatron-Bridge, ``model_type`` of
transformers, GGUF's architecture.

Qwen2 stands for Qwen 2 and Qwen 2.5, which differ in nothing that a configuration says."""


def family_of_target(target: Any) -> str | None:
    """The family of a class such as ``nemo.collections.llm.gpt.model.mistral.MistralModel``, by its
    module."""
    parts = target.split(".") if isinstance(target, str) else []
    return next((FAMILIES[part] for part in reversed(parts[:-1]) if part in FAMILIES), None)


def family_of_features(config: Mapping[str, Any], architecture: Architecture) -> str | None:
    """The family whose features ``config`` has, for formats that do not name it; Llama also stands
    for Mistral, which has the same.

    ``config`` is a NeMo 1 ``model_config.yaml`` or the arguments of Megatron-LM.
    """
    # Megatron-Bridge has a mapping for the function: {"_target_": "torch.nn.functional.silu", ...}.
    activation = str(
        config.get(
            "activation", "swiglu" if config.get("swiglu") else config.get("activation_func")
        )
    )
    if architecture.qk_norm:
        return "Qwen3"
    if architecture.experts:
        return "Mixtral"
    if "squared_relu" in activation or activation == "squared-relu":
        return "Nemotron"
    if config.get("add_qkv_bias") is True or config.get("qkv_bias") is True:
        return "Qwen2"
    gated = "swiglu" in activation or (
        config.get("gated_linear_unit") is True and "silu" in activation
    )
    return "Llama" if gated and str(config.get("normalization")).lower() == "rmsnorm" else None


def megatron_core(
    config: Mapping[str, Any], names: Collection[str] = (), rows: int | None = None
) -> Architecture | None:
    """The sizes in ``config``, which has Megatron-Core's names of fields, or None when one that has
    no default is missing.

    ``names`` are those of the tensors (they tell whether the embedding is tied), ``rows`` the rows
    of the embedding.
    """
    layers, hidden, heads = (
        size(config, name) for name in ("num_layers", "hidden_size", "num_attention_heads")
    )
    if not (layers and hidden and heads):
        return None
    scaled = all(number(config, name) is not None for name in ROPE_SCALING)
    return Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=heads
        if config.get("group_query_attention") is False
        else size(config, "num_query_groups", heads),
        head_dim=size(config, "kv_channels", hidden // heads),
        ffn=size(config, "ffn_hidden_size", 4 * hidden),
        vocabulary=rows or size(config, "padded_vocab_size", size(config, "vocab_size")),
        tied=_tied(config, names),
        rope_base=number(config, "rotary_base", 10000.0),
        rope_scaling={name: config[name] for name in ROPE_SCALING} if scaled else None,
        experts=size(config, "num_moe_experts", size(config, "num_experts")),
        qk_norm=config.get("qk_layernorm") is True,
    )


def _tied(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """As the configuration says; where it does not, a model without an output layer of its own is
    tied."""
    if isinstance(shared := config.get("share_embeddings_and_output_weights"), bool):
        return shared
    if isinstance(untied := config.get("untie_embeddings_and_output_weights"), bool):
        return not untied
    return bool(names) and not any(name.endswith("output_layer.weight") for name in names)


def named(
    architecture: Architecture | None, family: str | None, config: Mapping[str, Any]
) -> Architecture | None:
    """``architecture`` with its family, experts and QK norm, as ``config`` (Megatron-Core's or NeMo
    1's names) has them."""
    if architecture is None:
        return None
    found = dataclasses.replace(
        architecture,
        experts=size(config, "num_moe_experts"),
        qk_norm=config.get("qk_layernorm") is True,
    )
    return dataclasses.replace(found, family=family or family_of_features(config, found))


def gguf(
    fields: Mapping[str, Any], names: Collection[str], tokens: int | None
) -> Architecture | None:
    """The sizes in the key/value pairs of a GGUF (``llama.block_count``...), or None when one is
    missing.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. ``tokens`` is the length of
    its vocabulary.
    """
    kind = fields.get("general.architecture")
    config = {
        key.removeprefix(f"{kind}."): value
        for key, value in fields.items()
        if key.startswith(f"{kind}.")
    }
    layers, hidden, heads, ffn = (
        size(config, name)
        for name in (
            "block_count",
            "embedding_length",
            "attention.head_count",
            "feed_forward_length",
        )
    )
    if not (layers and hidden and heads and ffn):
        return None
    factor, scaling = number(config, "rope.scaling.factor"), config.get("rope.scaling.type")
    experts = size(config, "expert_count")
    family = FAMILIES.get(str(kind), str(kind))
    return Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=size(config, "attention.head_count_kv", heads),
        head_dim=size(config, "attention.key_length", hidden // heads),
        ffn=size(config, "expert_feed_forward_length", ffn),
        vocabulary=size(config, "vocab_size", tokens),
        tied="output.weight" not in names,
        rope_base=number(config, "rope.freq_base", 10000.0),
        rope_scaling={"type": scaling, "factor": factor}
        if factor and scaling not in (None, "none")
        else None,
        # llama.cpp files Mistral and Mixtral under "llama" too.
        family="Mixtral" if family == "Llama" and experts else family,
        experts=experts,
        qk_norm=any(name.endswith("attn_q_norm.weight") for name in names),
    )
