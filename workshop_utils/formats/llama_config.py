"""The architecture fields of a Llama-family ``context/model.yaml``, complete.

NeMo writes the configuration object of the model as ``_target_`` (its class) and arguments. Current versions write every field;
older ones only those that differ from the class, so the rest has to come from the class. The defaults below are those of
NeMo 2.4.1 (``nemo/collections/llm/gpt/model/{base,llama,llama_nemotron}.py``); a test compares them with the installed classes.
"""

from collections.abc import Mapping
from typing import Any

from workshop_utils.errors import DamagedCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.formats.architecture import Architecture

_LLAMA: dict[str, Any] = {
    "num_layers": 0,
    "hidden_size": 0,
    "num_attention_heads": 0,
    "ffn_hidden_size": None,  # 4 x hidden_size
    "num_query_groups": None,  # num_attention_heads
    "kv_channels": None,  # hidden_size / num_attention_heads
    "seq_length": 4096,
    "vocab_size": None,  # the tokenizer's, padded
    "make_vocab_size_divisible_by": 128,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "persist_layer_norm": True,
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "init_method_std": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # The script path has no counterpart of these for a Llama: another value is refused.
    "num_moe_experts": None,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "window_size": None,
    "mtp_num_layers": None,
    "apply_residual_connection_post_layernorm": False,
}
_MUST_BE_DEFAULT = tuple(_LLAMA)[-6:]

_LLAMA_2_7B = {**_LLAMA, "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 32,
               "ffn_hidden_size": 11008}  # fmt: skip
_LLAMA_2_13B = {**_LLAMA, "num_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "num_query_groups": 40,
                "ffn_hidden_size": 13824}  # fmt: skip
_LLAMA_2_70B = {**_LLAMA, "num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_query_groups": 8,
                "ffn_hidden_size": 28672}  # fmt: skip
_CODE = {"rotary_base": 1_000_000, "seq_length": 16384}
_LLAMA_3 = {**_LLAMA, "num_query_groups": 8, "init_method_std": 0.01}
_SCALING = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
_LLAMA_31 = {**_LLAMA_3, **_SCALING, "init_method_std": 0.02}
_SIZE_8B = {"rotary_base": 500_000, "seq_length": 8192, "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336,
            "num_attention_heads": 32}  # fmt: skip
_SIZE_70B = {"rotary_base": 500_000, "seq_length": 8192, "num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672,
             "num_attention_heads": 64}  # fmt: skip
_SIZE_405B = {"num_layers": 126, "hidden_size": 16384, "ffn_hidden_size": 53248, "num_attention_heads": 128}
_LONG = {"seq_length": 131072}
_LLAMA_31_8B = {**_LLAMA_31, **_SIZE_8B, **_LONG}
_LLAMA_31_70B = {**_LLAMA_31, **_SIZE_70B, **_LONG}
_LLAMA_32 = {**_LLAMA_31, **_LONG, "rotary_base": 500_000, "scale_factor": 32.0, "share_embeddings_and_output_weights": True,
             "ffn_hidden_size": 8192}  # fmt: skip

_PACKAGE = "nemo.collections.llm.gpt.model"
DEFAULTS: dict[str, dict[str, Any]] = {
    f"{_PACKAGE}.llama.LlamaConfig": _LLAMA,
    f"{_PACKAGE}.llama.Llama2Config7B": _LLAMA_2_7B,
    f"{_PACKAGE}.llama.Llama2Config13B": _LLAMA_2_13B,
    f"{_PACKAGE}.llama.Llama2Config70B": _LLAMA_2_70B,
    f"{_PACKAGE}.llama.CodeLlamaConfig7B": {**_LLAMA_2_7B, **_CODE},
    f"{_PACKAGE}.llama.CodeLlamaConfig13B": {**_LLAMA_2_13B, **_CODE},
    f"{_PACKAGE}.llama.CodeLlamaConfig34B": {**_LLAMA_2_70B, **_CODE, "num_layers": 48, "ffn_hidden_size": 22016},
    f"{_PACKAGE}.llama.CodeLlamaConfig70B": _LLAMA_2_70B,
    f"{_PACKAGE}.llama.Llama3Config": _LLAMA_3,
    f"{_PACKAGE}.llama.Llama3Config8B": {**_LLAMA_3, **_SIZE_8B},
    f"{_PACKAGE}.llama.Llama3Config70B": {**_LLAMA_3, **_SIZE_70B, "init_method_std": 0.008944},
    f"{_PACKAGE}.llama.Llama31Config": _LLAMA_31,
    f"{_PACKAGE}.llama.Llama31Config8B": _LLAMA_31_8B,
    f"{_PACKAGE}.llama.Llama31Config70B": _LLAMA_31_70B,
    f"{_PACKAGE}.llama.Llama31Config405B": {**_LLAMA_31_70B, **_SIZE_405B},
    f"{_PACKAGE}.llama.Llama32Config1B": {**_LLAMA_32, "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32},
    f"{_PACKAGE}.llama.Llama32Config3B": {**_LLAMA_32, "num_layers": 28, "hidden_size": 3072, "num_attention_heads": 24},
    f"{_PACKAGE}.llama_nemotron.Llama31NemotronNano8BConfig": {**_LLAMA_31_8B, "kv_channels": 128},
    f"{_PACKAGE}.llama_nemotron.Llama31Nemotron70BConfig": _LLAMA_31_70B,
}
"""Configuration class, as ``_target_`` names it -> every field that is read here, with the default of that class."""

MODELS = (
    f"{_PACKAGE}.llama.LlamaModel",
    f"{_PACKAGE}.llama.MLPerfLoRALlamaModel",
    f"{_PACKAGE}.llama_nemotron.LlamaNemotronModel",
)
"""Model classes that hold such a configuration."""

ROPE_SCALING = tuple(_SCALING)
"""Names of the four numbers of Llama 3.1's rope scaling."""


def read_fields(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every field of :data:`DEFAULTS` for the model described by ``model`` (a ``context/model.yaml``; ``where`` names it).

    Sizes that follow from others are filled in. The rope scaling fields are there only for Llama 3.1 and later.
    Raises :class:`UnsupportedCheckpoint` (another family, or a feature that is not Llama's), :class:`UnsafeCheckpoint` (a class
    that is not NeMo's) and :class:`DamagedCheckpoint` (a field that is missing or makes no sense); each names the field.
    """
    _check_class(model.get("_target_"), "_target_", MODELS, where)
    config = model.get("config")
    if not isinstance(config, Mapping):
        raise DamagedCheckpoint(f"{where}: the field config is missing.")
    kind = config.get("_target_")
    _check_class(kind, "config._target_", DEFAULTS, where)
    fields = {name: _value(name, config.get(name, default), default, where) for name, default in DEFAULTS[kind].items()}
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if not fields[name]:
            raise DamagedCheckpoint(f"{where}: config.{name} is missing, and {kind.rpartition('.')[2]} has no default for it.")
    for name in _MUST_BE_DEFAULT:
        if fields[name] not in (None, _LLAMA[name]):
            raise UnsupportedCheckpoint(f"{where}: config.{name} is {fields[name]!r}; only plain Llamas are supported.")
    _fill_in(fields, where)
    return fields


def architecture(fields: Mapping[str, Any], vocabulary: int | None = None) -> Architecture:
    """The sizes in ``fields`` (of :func:`read_fields`); ``vocabulary`` is the number of rows of the embedding, where known."""
    scaled = all(name in fields for name in ROPE_SCALING)
    return Architecture(
        layers=fields["num_layers"],
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        groups=fields["num_query_groups"],
        head_dim=fields["kv_channels"],
        ffn=fields["ffn_hidden_size"],
        vocabulary=vocabulary or fields["vocab_size"],
        tied=fields["share_embeddings_and_output_weights"],
        rope_base=fields["rotary_base"],
        rope_scaling={name: fields[name] for name in ROPE_SCALING} if scaled else None,
    )


def _check_class(target: Any, field: str, known: Any, where: str) -> None:
    if isinstance(target, str) and target in known:
        return
    if isinstance(target, str) and not target.startswith("nemo.collections."):
        raise UnsafeCheckpoint(
            f"{where}: {field} names {target!r}, which is not a class of NeMo's; loading it would import and call it. "
            "Nothing was executed."
        )
    raise UnsupportedCheckpoint(f"{where}: {field} is {target!r}; only Llama-family models of NeMo 2.0 are supported.")


def _fill_in(fields: dict[str, Any], where: str) -> None:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    fields["ffn_hidden_size"] = fields["ffn_hidden_size"] or 4 * hidden
    fields["num_query_groups"] = fields["num_query_groups"] or heads
    if not fields["kv_channels"]:
        if hidden % heads:
            raise DamagedCheckpoint(f"{where}: config.hidden_size {hidden} is no multiple of num_attention_heads {heads}.")
        fields["kv_channels"] = hidden // heads
    if heads % fields["num_query_groups"]:
        raise DamagedCheckpoint(
            f"{where}: config.num_attention_heads {heads} is no multiple of num_query_groups {fields['num_query_groups']}."
        )


_MAY_BE_ABSENT = {name: int for name in ("ffn_hidden_size", "num_query_groups", "kv_channels", "vocab_size")} | {
    "seq_len_interpolation_factor": float
}


def _value(name: str, value: Any, default: Any, where: str) -> Any:
    """``value`` as the type of its field; a class or function is reduced to its name (``torch.nn.functional.silu`` -> ``silu``)."""
    if name in _MUST_BE_DEFAULT:
        return value
    if value is None and name in _MAY_BE_ABSENT:
        return None
    wanted = _MAY_BE_ABSENT.get(name, type(default))
    if name == "activation_func":
        value = str(value.get("_target_") if isinstance(value, Mapping) else value).rpartition(".")[2]
    elif wanted is float and isinstance(value, str):
        # PyYAML reads 1e-05, without a point, as text.
        value = _number(value)
    if wanted is bool or wanted is str:
        sound = isinstance(value, wanted)
    else:
        sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
        if sound and wanted is int and name != "rotary_base":
            sound = value == int(value)
    if not sound:
        raise DamagedCheckpoint(f"{where}: config.{name} is {value!r}, which is no {wanted.__name__}.")
    return int(value) if wanted is int and name != "rotary_base" else value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
