"""NeMo 1's ``model_config.yaml``, of a ``.nemo`` archive or of a directory: what it says, and
writing one.

The keys, and what holds where one is absent, are those that ``MegatronGPTModel`` and its base class
read in NeMo 2.4.1
(``nemo/collections/nlp/models/language_modeling/{megatron_gpt_model,megatron_base_model}.py``).
"""

from collections.abc import Mapping
from typing import Any

from workshop_utils.checkpoints.formats import decoder_config, gpt_config
from workshop_utils.checkpoints.formats.architecture import Architecture, section, text
from workshop_utils.checkpoints.formats.gpt_classes import (
    BASE,
    FAMILIES,
    MUST_BE_DEFAULT,
    ROPE_SCALING,
    Family,
)
from workshop_utils.core.errors import UnsupportedCheckpoint


def architecture(config: Mapping[str, Any], family: str | None = None) -> Architecture | None:
    """What ``config`` states, or None; without a ``family`` the features tell it."""
    scaled = config.get("scale_positional_embedding") is True
    tied = "share_embeddings_and_output_weights"
    own = {tied: config.get(tied, True) is True, "vocab_size": config.get("override_vocab_size")}
    own["padded_vocab_size"] = None
    for name, default in ROPE_SCALING.items():
        own[name] = config.get(name, default) if scaled else None
    return decoder_config.megatron_core({**config, **own}, family=family)


def tokenizer(config: Mapping[str, Any]) -> str | None:
    """``library: name or file`` of the tokenizer."""
    described = config.get("tokenizer")
    if not isinstance(described, Mapping):
        return None
    return f"{described.get('library')}: {described.get('type') or described.get('model')}"


RENAMED = {
    "encoder_seq_length": "seq_length",
    "rotary_percentage": "rotary_percent",
    "bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
}
"""Key of ``model_config.yaml`` -> field of :mod:`.gpt_classes`."""

_OTHERWISE = ("vocab_size", "normalization", "activation_func", "gated_linear_unit")
_NOT_SAME = {*RENAMED.values(), *MUST_BE_DEFAULT, *_OTHERWISE}
SAME_NAME = tuple(name for name in BASE if name not in _NOT_SAME)
"""Fields that both have."""

_ABSENT = {
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
    "bias": True,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "encoder_seq_length": 512,
    "persist_layer_norm": False,
}
"""What NeMo 1 takes for a key that is not there, where that is not the field's usual value."""

ACTIVATIONS = {
    "fast-swiglu": ("silu", True),
    "swiglu": ("silu", True),
    "fast-geglu": ("gelu", True),
    "geglu": ("gelu", True),
    "gelu": ("gelu", False),
    "squared-relu": ("squared_relu", False),
    "fast-reglu": ("relu", True),
    "reglu": ("relu", True),
}
"""``activation`` -> (function, gated)."""

_NORMS = {
    "rmsnorm": ("RMSNorm", False),
    "layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
}
"""``normalization`` -> (class, the weight is stored minus one)."""

_MUST_BE_OFF = (
    "apply_embedding_scaling",
    "openai_gelu",
    "mcore_customization_config",
    "drop_layers",
    "hyena",
    "multi_latent_attention",
)
_SPECS = ("", "te_gpt", "decoder_block_gpt")
"""Values of ``name``, which chooses the layers, that are a plain GPT. Only the last builds the
norms of q and k."""


def read_fields(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Family]:
    """The fields of :mod:`.gpt_classes` that ``config`` states, complete, and the family they
    belong to; ``where`` names it in errors.

    NeMo 1 has no families: the field ``workshop.family``, which :func:`from_fields` writes,
    decides, and the features otherwise. Raises :class:`UnsupportedCheckpoint` and
    :class:`DamagedCheckpoint`, each naming the key.
    """
    _check_kind(config, where)
    gpt_config.check_foreign(config, f"{where}: ")
    scaling = {}
    if config.get("scale_positional_embedding"):
        # The four keys have these very defaults in NeMo 1, too.
        scaling = {name: config.get(name, default) for name, default in ROPE_SCALING.items()}
    activation = config.get("activation", "gelu")
    norm = str(config.get("normalization", "layernorm")).lower()
    for name, value, known in (
        ("activation", activation, ACTIVATIONS),
        ("normalization", norm, _NORMS),
    ):
        if not isinstance(value, str) or value not in known:
            raise UnsupportedCheckpoint(
                f"{where}: {name} is {value!r}; known are {', '.join(known)}."
            )
    stated = {name: config.get(name) for name in SAME_NAME}
    stated = {name: _ABSENT.get(name) if held is None else held for name, held in stated.items()}
    stated = {name: held for name, held in stated.items() if held is not None} | scaling
    for name, field in RENAMED.items():
        stated[field] = config.get(name, _ABSENT.get(name, BASE[field]))
    stated["activation_func"], stated["gated_linear_unit"] = ACTIVATIONS[activation]
    stated["normalization"], one_less = _NORMS[norm]
    zero_centered = one_less or config.get("layernorm_zero_centered_gamma", False)
    stated["layernorm_zero_centered_gamma"] = zero_centered
    has_norms = config.get("name") == "decoder_block_gpt"
    stated["qk_layernorm"] = config.get("qk_layernorm", False) and has_norms
    fields = gpt_config.typed(stated, BASE | scaling, f"{where}: ")
    named = text(section(config, "workshop"), "family")
    family = FAMILIES[named] if named in FAMILIES else family_of_features(fields)
    gpt_config.check(fields, family, f"{where}: ", "model_config.yaml")
    return fields, family


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    target = str(config.get("target", ""))
    gpt = "nemo.collections.nlp.models.language_modeling.megatron_gpt_"
    position = config.get("position_embedding_type")
    why = None
    if target and not target.startswith(gpt):
        known = "GPT models (MegatronGPTModel and its kin)"
        why = f"target is {target!r}; only {known} can be converted."
    elif not config.get("mcore_gpt", False):
        why = (
            f"mcore_gpt is {config.get('mcore_gpt')!r}: a model of the transformer that NeMo had "
            "before Megatron-Core. Convert it first with NeMo's "
            "scripts/nlp_language_modeling/convert_nemo_gpt_to_mcore.py."
        )
    elif config.get("name", "") not in _SPECS:
        plain = ", ".join(_SPECS[1:])
        why = f"name is {config.get('name')!r}, which are no layers of a plain GPT ({plain})."
    elif on := [name for name in _MUST_BE_OFF if config.get(name)]:
        why = f"{on[0]} is {config[on[0]]!r}; no family that is supported here has that."
    elif position != "rope":
        why = f"position_embedding_type is {position!r}; only rope is supported."
    if why:
        raise UnsupportedCheckpoint(f"{where}: {why}")


def family_of_features(fields: Mapping[str, Any]) -> Family:
    """A Llama, unless ``fields`` has what only another family has."""
    signs = {
        "mixtral": fields["num_moe_experts"],
        "qwen3": fields["qk_layernorm"],
        "qwen2": fields["add_qkv_bias"],
        "mistral": fields["window_size"],
        "nemotron": fields["activation_func"] == "squared_relu",
    }
    return FAMILIES[next((name for name, seen in signs.items() if seen), "llama")]


_PRECISION = {"float32": 32, "bfloat16": "bf16-mixed", "float16": "16-mixed"}
_CONSTANT = {
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "nemo_version": "2.4.1",
    # Megatron-Core's model, whose tensor names are those of the NeMo 2.0 checkpoint. `name` chooses
    # its layers: "" is plain GPT.
    "mcore_gpt": True,
    "name": "",
    "transformer_engine": True,
    # A checkpoint written without Transformer Engine has no _extra_state entries; that is logged
    # and no error. Whoever writes this file makes sure that every weight is there.
    "dist_ckpt_load_strictness": "log_all",
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "sequence_parallel": False,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "seed": 1234,
    "pre_process": True,
    "post_process": True,
    "ffn_dropout": 0.0,
    "use_scaled_init_method": True,
    "apply_query_key_layer_scaling": False,
    "normalize_attention_scores": True,
    "do_layer_norm_weight_decay": False,
    "use_cpu_initialization": False,
    "megatron_amp_O2": False,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "native_amp_init_scale": 2**32,
    "native_amp_growth_interval": 1000,
    "hysteresis": 2,
    # Fused kernels exist only for GPUs, and give the same numbers to rounding.
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": True,
    "get_attention_mask_from_fusion": True,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "gradient_as_bucket_view": True,
    "sync_batch_comm": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "nsys_profile": {"enabled": False},
    "apex_transformer_log_level": 30,
}


def from_fields(
    fields: Mapping[str, Any],
    family: Family,
    rows: int,
    dtype: str,
    tokenizer: dict[str, Any],
    where: str,
) -> dict[str, Any]:
    """The ``model_config.yaml`` of a model with ``fields``, ``rows`` of the embedding and weights
    of ``dtype``; the way back of :func:`read_fields`. ``where`` names the source in errors.

    Raises :class:`UnsupportedCheckpoint` for a field that NeMo 1 cannot have.
    """
    if dtype not in _PRECISION:
        raise UnsupportedCheckpoint(
            f"{where}: the weights are {dtype}; the script path takes {', '.join(_PRECISION)}."
        )
    names = {}
    one_less = fields["normalization"] == "LayerNorm" and fields["layernorm_zero_centered_gamma"]
    for field, table, second in (
        ("activation_func", ACTIVATIONS, fields["gated_linear_unit"]),
        ("normalization", _NORMS, one_less),
    ):
        pair = fields[field], second
        names[field] = next(
            (name for name, stands_for in table.items() if stands_for == pair), None
        )
        if names[field] is None:
            raise UnsupportedCheckpoint(
                f"{where}: config.{field} is {fields[field]!r}, unknown to the script path."
            )
    scaling = {name: fields[name] for name in ROPE_SCALING if name in fields}
    return {
        **_CONSTANT,
        # Of the layers that NeMo 1 can build, only these have norms of q and k.
        "name": "decoder_block_gpt" if fields["qk_layernorm"] else "",
        **{name: fields[name] for name in SAME_NAME},
        **{new: fields[old] for new, old in RENAMED.items()},
        "max_position_embeddings": fields["seq_length"],
        "activation": names["activation_func"],
        "normalization": names["normalization"],
        "precision": _PRECISION[dtype],
        "override_vocab_size": rows,
        "scale_positional_embedding": bool(scaling),
        **scaling,
        "tokenizer": tokenizer,
        # Not NeMo's: for the way back to NeMo 2.0, which has a class for each family.
        "workshop": {"family": family.name},
    }
