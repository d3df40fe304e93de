"""The shape of any decoder, for a description: from Megatron-Core's names of fields, or from
GGUF's.

NeMo 2.0 (``context/model.yaml``), Megatron-Bridge (``run_config.yaml``) and Megatron-LM (``args``)
all use Megatron-Core's names (``megatron/core/transformer/transformer_config.py``). Nothing is
checked here beyond what a description needs; what conversion needs is in :mod:`.gpt_config`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from workshop_utils.checkpoints.formats.architecture import Architecture, number, read, size
from workshop_utils.checkpoints.formats.gpt_classes import ROPE_SCALING, TITLES

_MEGATRON_CORE = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
_GROUPS = ("num_query_groups", "kv_channels")


def family_of_target(target: Any) -> str | None:
    """The family of a class such as ``...gpt.model.mistral.MistralModel``, by its module."""
    parts = target.split(".") if isinstance(target, str) else []
    return next((TITLES[part] for part in reversed(parts[:-1]) if part in TITLES), None)


def _family_of_features(config: Mapping[str, Any], qk_norm: bool, experts: Any) -> str | None:
    """For formats that do not name it; Llama also stands for Mistral, which has the same."""
    # Megatron-Bridge has a mapping for the function: {"_target_": "torch.nn.functional.silu", ...}.
    function = "swiglu" if config.get("swiglu") else config.get("activation_func")
    activation = str(config.get("activation", function))
    if qk_norm:
        return "Qwen3"
    if experts:
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
    config: Mapping[str, Any],
    names: Collection[str] = (),
    rows: int | None = None,
    family: str | None = None,
) -> Architecture | None:
    """The architecture in ``config``, which has Megatron-Core's names of fields, or None when a
    size that has no default is missing.

    ``names`` are those of the tensors (they tell whether the embedding is tied where ``config``
    does not), ``rows`` the rows of the embedding; without a ``family`` the features tell it.
    """
    scaled = all(number(config, name) is not None for name in ROPE_SCALING)
    experts = size(config, "num_moe_experts", size(config, "num_experts"))
    qk_norm = config.get("qk_layernorm") is True
    tied = config.get("share_embeddings_and_output_weights")
    if not isinstance(tied, bool):
        untied = config.get("untie_embeddings_and_output_weights")
        has_output = any(name.endswith("output_layer.weight") for name in names)
        tied = not untied if isinstance(untied, bool) else bool(names) and not has_output
    if config.get("group_query_attention") is False:
        config = {**config, "num_query_groups": None}
    return read(
        config,
        (*_MEGATRON_CORE, *_GROUPS),
        ffn_factor=4,
        vocabulary=rows or size(config, "padded_vocab_size", size(config, "vocab_size")),
        tied=tied,
        rope_base=number(config, "rotary_base", 10000.0),
        rope_scaling={name: config[name] for name in ROPE_SCALING} if scaled else None,
        family=family or _family_of_features(config, qk_norm, experts),
        experts=experts,
        qk_norm=qk_norm,
    )


def gguf(
    fields: Mapping[str, Any], names: Collection[str], tokens: int | None
) -> Architecture | None:
    """The sizes in the key/value pairs of a GGUF (``llama.block_count``...), or None when one is
    missing. ``tokens`` is the length of its vocabulary.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    kind = str(fields.get("general.architecture"))
    prefix = f"{kind}."
    own = (key for key in fields if key.startswith(prefix))
    config = {key.removeprefix(prefix): fields[key] for key in own}
    factor, scaling = number(config, "rope.scaling.factor"), config.get("rope.scaling.type")
    scaled, experts = factor and scaling not in (None, "none"), size(config, "expert_count")
    family = TITLES.get(kind, kind)
    ffn = "expert_feed_forward_length"
    attention = "attention.head_count", ffn if size(config, ffn) else "feed_forward_length"
    groups = "attention.head_count_kv", "attention.key_length"
    return read(
        config,
        ("block_count", "embedding_length", *attention, *groups),
        vocabulary=size(config, "vocab_size", tokens),
        tied="output.weight" not in names,
        rope_base=number(config, "rope.freq_base", 10000.0),
        rope_scaling={"type": scaling, "factor": factor} if scaled else None,
        # llama.cpp files Mistral and Mixtral under "llama" too.
        family="Mixtral" if family == "Llama" and experts else family,
        experts=experts,
        qk_norm=any(name.endswith("attn_q_norm.weight") for name in names),
    )
