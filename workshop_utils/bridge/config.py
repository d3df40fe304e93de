"""``context/model.yaml`` of NeMo 2.0 -> ``model_config.yaml`` of the script path (NeMo 1).

The keys are those that ``MegatronGPTModel`` and its base class read in NeMo 2.4.1
(``nemo/collections/nlp/models/language_modeling/{megatron_gpt_model,megatron_base_model}.py``). The NeMo 2.0 fields must not be
copied to the top level beside them: NeMo 1 hands every key that Megatron-Core's ``TransformerConfig`` knows straight to it, where
a field that NeMo 2.0 wrote as a class or function would override the value derived from ``activation``, ``precision`` and so on.
"""

import os
from pathlib import Path
from typing import Any

from workshop_utils.errors import DamagedCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.formats.llama_config import ROPE_SCALING, read_fields
from workshop_utils.formats.nemo2 import Nemo2Checkpoint
from workshop_utils.paths import shown

EMBEDDING = "module.embedding.word_embeddings.weight"

_SAME_NAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "init_method_std",
    "hidden_dropout", "attention_dropout", "layernorm_epsilon", "layernorm_zero_centered_gamma", "persist_layer_norm",
    "position_embedding_type", "rotary_base", "rotary_interleaved", "seq_len_interpolation_factor",
    "share_embeddings_and_output_weights", "make_vocab_size_divisible_by",
)  # fmt: skip

_RENAMED = {
    "encoder_seq_length": "seq_length",
    "max_position_embeddings": "seq_length",
    "rotary_percentage": "rotary_percent",
    "bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
}

_PRECISION = {"float32": 32, "bfloat16": "bf16-mixed", "float16": "16-mixed"}
_ACTIVATION = {("silu", True): "fast-swiglu", ("gelu", True): "fast-geglu", ("gelu", False): "gelu", ("relu", False): "relu"}

_CONSTANT = {
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "nemo_version": "2.4.1",
    # Megatron-Core's model, whose tensor names are those of the NeMo 2.0 checkpoint. `name` chooses its layers: "" is plain GPT.
    "mcore_gpt": True,
    "name": "",
    "transformer_engine": True,
    # A checkpoint written without Transformer Engine has no _extra_state entries; that is logged and no error. The bridge itself
    # makes sure that every weight is there.
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


def translate(checkpoint: Nemo2Checkpoint) -> dict[str, Any]:
    """The ``model_config.yaml`` of ``checkpoint``, after a check that its tensors are those that this configuration needs.

    Raises :class:`UnsupportedCheckpoint`, :class:`UnsafeCheckpoint` or :class:`DamagedCheckpoint`, each naming the field or tensor.
    """
    where = shown(checkpoint.path / "context" / "model.yaml")
    fields = read_fields(checkpoint.model, where)
    rows, dtype = _embedding(checkpoint)
    _check_tensors(checkpoint, fields, rows)
    activation = _ACTIVATION.get((fields["activation_func"], fields["gated_linear_unit"]))
    normalization = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}.get(fields["normalization"])
    for name, value in (("activation_func", activation), ("normalization", normalization)):
        if value is None:
            raise UnsupportedCheckpoint(f"{where}: config.{name} is {fields[name]!r}, which the script path does not know.")
    scaling = {name: fields[name] for name in ROPE_SCALING if name in fields}
    return {
        **_CONSTANT,
        **{name: fields[name] for name in _SAME_NAME},
        **{new: fields[old] for new, old in _RENAMED.items()},
        "activation": activation,
        "normalization": "layernorm1p" if normalization == "layernorm" and fields["layernorm_zero_centered_gamma"] else normalization,
        "precision": _PRECISION[dtype],
        "override_vocab_size": rows,
        "scale_positional_embedding": bool(scaling),
        **scaling,
        "tokenizer": _tokenizer(checkpoint, where),
    }


def _embedding(checkpoint: Nemo2Checkpoint) -> tuple[int, str]:
    """Rows (the padded vocabulary) and dtype of the embedding: what the weights are, whatever the configuration says."""
    embedding = checkpoint.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise DamagedCheckpoint(f"{shown(checkpoint.path)}: the tensor {EMBEDDING} (vocabulary x hidden) is missing.")
    if embedding.dtype not in _PRECISION:
        raise UnsupportedCheckpoint(
            f"{shown(checkpoint.path)}: {EMBEDDING} is {embedding.dtype}; the script path takes {', '.join(_PRECISION)}."
        )
    return embedding.shape[0], embedding.dtype


def expected_shapes(fields: dict[str, Any], rows: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a Llama as Megatron-Core stores it, with ``rows`` rows of the embedding.

    Shapes are (layers, output, input); linear_qkv holds q, k and v of each group after one another, linear_fc1 gate and up.
    """
    layers, hidden, ffn = fields["num_layers"], fields["hidden_size"], fields["ffn_hidden_size"]
    heads, groups, head_dim = fields["num_attention_heads"], fields["num_query_groups"], fields["kv_channels"]
    qkv, fc1 = (heads + 2 * groups) * head_dim, (2 if fields["gated_linear_unit"] else 1) * ffn
    block = "module.decoder.layers"
    shapes = {
        EMBEDDING: (rows, hidden),
        f"{block}.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        f"{block}.self_attention.linear_qkv.weight": (layers, qkv, hidden),
        f"{block}.self_attention.linear_proj.weight": (layers, hidden, heads * head_dim),
        f"{block}.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        f"{block}.mlp.linear_fc1.weight": (layers, fc1, hidden),
        f"{block}.mlp.linear_fc2.weight": (layers, hidden, ffn),
        "module.decoder.final_layernorm.weight": (hidden,),
    }
    if not fields["share_embeddings_and_output_weights"]:
        shapes["module.output_layer.weight"] = (rows, hidden)
    if fields["add_bias_linear"] or fields["add_qkv_bias"]:
        shapes[f"{block}.self_attention.linear_qkv.bias"] = (layers, qkv)
    if fields["add_bias_linear"]:
        shapes[f"{block}.self_attention.linear_proj.bias"] = (layers, hidden)
        shapes[f"{block}.mlp.linear_fc1.bias"] = (layers, fc1)
        shapes[f"{block}.mlp.linear_fc2.bias"] = (layers, hidden)
    return shapes


def _check_tensors(checkpoint: Nemo2Checkpoint, fields: dict[str, Any], rows: int) -> None:
    # The loader only logs a weight that is missing and goes on with random numbers, so the check has to be here.
    expected = expected_shapes(fields, rows)
    for name, shape in expected.items():
        found = checkpoint.tensors.get(name)
        if found is None or found.shape != shape:
            stated = f"has the shape {found.shape}" if found else "is missing"
            raise DamagedCheckpoint(
                f"{shown(checkpoint.path)}: the tensor {name} {stated}; context/model.yaml asks for {shape}. The configuration "
                "and the weights are not of one model."
            )
    more = sorted(set(checkpoint.model_tensors()) - set(expected))
    if more:
        raise UnsupportedCheckpoint(f"{shown(checkpoint.path)} holds tensors that a plain Llama does not have: {', '.join(more[:5])}")


_TOKENIZERS = "nemo.collections.common.tokenizers"


def _tokenizer(checkpoint: Nemo2Checkpoint, where: str) -> dict[str, Any]:
    """The ``tokenizer`` section. NeMo 1 looks paths up in the current directory, so they are absolute here."""
    described = checkpoint.model.get("tokenizer")
    kind = described.get("_target_") if isinstance(described, dict) else None
    if kind == f"{_TOKENIZERS}.huggingface.auto_tokenizer.AutoTokenizer":
        name = _file_field(checkpoint, where, "pretrained_model_name", hub_name_allowed=True)
        # trust_remote_code is left out on purpose: a tokenizer that brings its own code is not run.
        return {"library": "huggingface", "type": name, "use_fast": described.get("use_fast", True) is not False,
                "model": None, "vocab_file": None, "merge_file": None}  # fmt: skip
    if kind == f"{_TOKENIZERS}.sentencepiece_tokenizer.SentencePieceTokenizer":
        return {"library": "sentencepiece", "type": None, "model": _file_field(checkpoint, where, "model_path"),
                "vocab_file": None, "merge_file": None, "sentencepiece_legacy": described.get("legacy", False) is True}  # fmt: skip
    if isinstance(kind, str) and not kind.startswith("nemo."):
        raise UnsafeCheckpoint(f"{where}: tokenizer._target_ names {kind!r}, which is not NeMo's. Nothing was executed.")
    raise UnsupportedCheckpoint(
        f"{where}: tokenizer._target_ is {kind!r}; NeMo's AutoTokenizer and SentencePieceTokenizer are supported."
    )


def _file_field(checkpoint: Nemo2Checkpoint, where: str, field: str, hub_name_allowed: bool = False) -> str:
    """Absolute path of the file or directory that ``tokenizer.<field>`` names, or the name of a repository on the Hub."""
    value = checkpoint.model["tokenizer"].get(field)
    if isinstance(value, dict):
        # NeMo's wrapper around a string that was no path when the checkpoint was written.
        value = value.get("attr")
    if not isinstance(value, str) or not value:
        raise DamagedCheckpoint(f"{where}: tokenizer.{field} is missing.")
    context = checkpoint.path / "context"
    if not os.path.isabs(value):
        path = Path(os.path.normpath(context / value))
        if not path.is_relative_to(context):
            raise UnsafeCheckpoint(f"{where}: tokenizer.{field} is {value!r}, outside the checkpoint.")
        if path.exists():
            return str(path)
        if hub_name_allowed and value.count("/") == 1 and not value.startswith("nemo_tokenizer"):
            return value
    elif os.path.exists(value):
        return value
    raise DamagedCheckpoint(f"{where}: tokenizer.{field} is {value!r}, and there is no such file. Copy the whole context/ directory.")
