"""The configuration classes of NeMo 2.0 that are read here, with the defaults of each, and the
families that they belong to.

NeMo writes the configuration object of a model as ``_target_`` (its class) and arguments. Current
versions write every field; older ones only those that differ from the class, so the rest has to
come from the class. The defaults below are those of NeMo 2.4.1
(``nemo/collections/llm/gpt/model/{base,llama,llama_nemotron,mistral,mixtral,nemotron,qwen2,qwen3}.py``);
a test compares them with the installed classes. How to add a family: docs/adding-a-model-family.md.
"""

from dataclasses import dataclass
from typing import Any

_BASE: dict[str, Any] = {
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
    "qk_layernorm": False,
    "window_size": None,  # tokens before and after that attention sees
    "init_method_std": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "num_moe_experts": None,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0,
    # Features of other families, and of none here: another value is refused.
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "softmax_scale": None,
    "no_rope_freq": None,
    "apply_residual_connection_post_layernorm": False,
}
MUST_BE_DEFAULT = tuple(_BASE)[tuple(_BASE).index("moe_ffn_hidden_size") :]
"""Fields that have to be as in every class here."""

ROPE_SCALING = {
    "scale_factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}
"""The four numbers of Llama 3.1's rope scaling, as NeMo's class has them."""


@dataclass(frozen=True)
class Family:
    """A family of models: the classes that NeMo 2.0 knows it by, and the fields in which it may
    differ from a Llama.

    ``models`` and ``configs`` are dotted names; the first of each is what a converted checkpoint
    gets. ``scaled`` is the class for Llama 3.1's rope. ``features`` are the fields of
    :data:`FEATURES` that may be set.
    """

    name: str
    models: tuple[str, ...]
    configs: dict[str, dict[str, Any]]
    features: frozenset[str] = frozenset()
    scaled: str | None = None


FEATURES = ("add_qkv_bias", "qk_layernorm", "window_size", "num_moe_experts")
"""Fields that tell families apart: a family that does not have one leaves it off."""

_PACKAGE = "nemo.collections.llm.gpt.model"


def _sizes(layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        **more,
    }


_LLAMA_2_7B = {**_BASE, **_sizes(32, 4096, 11008, 32, num_query_groups=32)}
_LLAMA_2_13B = {**_BASE, **_sizes(40, 5120, 13824, 40, num_query_groups=40)}
_LLAMA_2_70B = {**_BASE, **_sizes(80, 8192, 28672, 64, num_query_groups=8)}
_CODE = {"rotary_base": 1_000_000, "seq_length": 16384}
_LLAMA_3 = {**_BASE, "num_query_groups": 8, "init_method_std": 0.01}
_LLAMA_31 = {**_LLAMA_3, **ROPE_SCALING, "init_method_std": 0.02}
_SIZE_8B = _sizes(32, 4096, 14336, 32, rotary_base=500_000, seq_length=8192)
_SIZE_70B = _sizes(80, 8192, 28672, 64, rotary_base=500_000, seq_length=8192)
_LONG = {"seq_length": 131072}
_LLAMA_31_8B = {**_LLAMA_31, **_SIZE_8B, **_LONG}
_LLAMA_31_70B = {**_LLAMA_31, **_SIZE_70B, **_LONG}
_LLAMA_32 = {
    **_LLAMA_31,
    **_LONG,
    "rotary_base": 500_000,
    "scale_factor": 32.0,
    "share_embeddings_and_output_weights": True,
}

_LLAMA = {
    f"{_PACKAGE}.llama.LlamaConfig": _BASE,
    f"{_PACKAGE}.llama.Llama2Config7B": _LLAMA_2_7B,
    f"{_PACKAGE}.llama.Llama2Config13B": _LLAMA_2_13B,
    f"{_PACKAGE}.llama.Llama2Config70B": _LLAMA_2_70B,
    f"{_PACKAGE}.llama.CodeLlamaConfig7B": {**_LLAMA_2_7B, **_CODE},
    f"{_PACKAGE}.llama.CodeLlamaConfig13B": {**_LLAMA_2_13B, **_CODE},
    f"{_PACKAGE}.llama.CodeLlamaConfig34B": {
        **_LLAMA_2_70B,
        **_CODE,
        "num_layers": 48,
        "ffn_hidden_size": 22016,
    },
    f"{_PACKAGE}.llama.CodeLlamaConfig70B": _LLAMA_2_70B,
    f"{_PACKAGE}.llama.Llama3Config": _LLAMA_3,
    f"{_PACKAGE}.llama.Llama3Config8B": {**_LLAMA_3, **_SIZE_8B},
    f"{_PACKAGE}.llama.Llama3Config70B": {**_LLAMA_3, **_SIZE_70B, "init_method_std": 0.008944},
    f"{_PACKAGE}.llama.Llama31Config": _LLAMA_31,
    f"{_PACKAGE}.llama.Llama31Config8B": _LLAMA_31_8B,
    f"{_PACKAGE}.llama.Llama31Config70B": _LLAMA_31_70B,
    f"{_PACKAGE}.llama.Llama31Config405B": {**_LLAMA_31_70B, **_sizes(126, 16384, 53248, 128)},
    f"{_PACKAGE}.llama.Llama32Config1B": {**_LLAMA_32, **_sizes(16, 2048, 8192, 32)},
    f"{_PACKAGE}.llama.Llama32Config3B": {**_LLAMA_32, **_sizes(28, 3072, 8192, 24)},
    f"{_PACKAGE}.llama_nemotron.Llama31NemotronNano8BConfig": {**_LLAMA_31_8B, "kv_channels": 128},
    f"{_PACKAGE}.llama_nemotron.Llama31Nemotron70BConfig": _LLAMA_31_70B,
}

# NeMo's other families build on its GPTConfig, and only Llama and Nemotron set this one. It changes
# no result.
_OTHER = {**_BASE, "persist_layer_norm": False}

_MISTRAL_7B = {
    **_OTHER,
    **_sizes(32, 4096, 14336, 32, num_query_groups=8, seq_length=32768),
    "window_size": [4096, 0],
}
_MISTRAL_LATER = {
    "kv_channels": 128,
    "seq_length": 4096,
    "window_size": None,
    "rotary_base": 1_000_000.0,
}
_MISTRAL = {
    f"{_PACKAGE}.mistral.MistralConfig7B": _MISTRAL_7B,
    f"{_PACKAGE}.mistral.MistralNeMoConfig12B": {
        **_MISTRAL_7B,
        **_sizes(40, 5120, 14336, 32),
        **_MISTRAL_LATER,
    },
    f"{_PACKAGE}.mistral.MistralNeMoConfig123B": {
        **_MISTRAL_7B,
        **_sizes(88, 12288, 28672, 96),
        **_MISTRAL_LATER,
    },
}

_MIXTRAL_8X7B = {
    **_OTHER,
    **_sizes(32, 4096, 14336, 32, num_query_groups=8, rotary_base=1_000_000.0),
    "num_moe_experts": 8,
    "moe_aux_loss_coeff": 0.01,
}
_MIXTRAL = {
    f"{_PACKAGE}.mixtral.MixtralConfig": _MIXTRAL_8X7B,
    f"{_PACKAGE}.mixtral.MixtralConfig8x3B": {**_MIXTRAL_8X7B, **_sizes(32, 2560, 8960, 32)},
    f"{_PACKAGE}.mixtral.MixtralConfig8x7B": _MIXTRAL_8X7B,
    f"{_PACKAGE}.mixtral.MixtralConfig8x22B": {**_MIXTRAL_8X7B, **_sizes(56, 6144, 16384, 48)},
}

_QWEN_2 = {
    **_OTHER,
    "add_qkv_bias": True,
    "vocab_size": 151936,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 1_000_000.0,
}
_QWEN_2_SIZES = {
    "500M": _sizes(24, 896, 4864, 14, num_query_groups=2),
    "1P5B": _sizes(28, 1536, 8960, 12, num_query_groups=2),
    "7B": _sizes(28, 3584, 18944, 28, num_query_groups=4, vocab_size=152064),
    "72B": _sizes(
        80, 8192, 29568, 64, num_query_groups=8, vocab_size=152064, layernorm_epsilon=1e-5
    ),
}
_QWEN_25_SIZES = _QWEN_2_SIZES | {
    "14B": _sizes(
        48, 5120, 13824, 40, num_query_groups=8, vocab_size=152064, layernorm_epsilon=1e-5
    ),
    "32B": _sizes(
        64, 5120, 27648, 40, num_query_groups=8, vocab_size=152064, layernorm_epsilon=1e-5
    ),
}
_QWEN = (
    {f"{_PACKAGE}.qwen2.Qwen2Config": _QWEN_2}
    | {
        f"{_PACKAGE}.qwen2.Qwen2Config{size}": {**_QWEN_2, **sizes}
        for size, sizes in _QWEN_2_SIZES.items()
    }
    | {
        f"{_PACKAGE}.qwen2.Qwen25Config{size}": {**_QWEN_2, **sizes, **_LONG}
        for size, sizes in _QWEN_25_SIZES.items()
    }
)
_QWEN[f"{_PACKAGE}.qwen2.Qwen25Config500M"]["seq_length"] = 32768

_QWEN_3 = {
    **_QWEN_2,
    "add_qkv_bias": False,
    "qk_layernorm": True,
    "kv_channels": 128,
    "num_query_groups": 8,
}
_QWEN_3_TIED = {"share_embeddings_and_output_weights": True}
_QWEN_3_CLASSES = {
    f"{_PACKAGE}.qwen3.Qwen3Config": _QWEN_3,
    f"{_PACKAGE}.qwen3.Qwen3Config600M": {**_QWEN_3, **_sizes(28, 1024, 3072, 16), **_QWEN_3_TIED},
    f"{_PACKAGE}.qwen3.Qwen3Config1P7B": {**_QWEN_3, **_sizes(28, 2048, 6144, 16), **_QWEN_3_TIED},
    f"{_PACKAGE}.qwen3.Qwen3Config4B": {**_QWEN_3, **_sizes(36, 2560, 9728, 32), **_QWEN_3_TIED},
    f"{_PACKAGE}.qwen3.Qwen3Config8B": {**_QWEN_3, **_sizes(36, 4096, 12288, 32)},
    f"{_PACKAGE}.qwen3.Qwen3Config14B": {**_QWEN_3, **_sizes(40, 5120, 17408, 40)},
    f"{_PACKAGE}.qwen3.Qwen3Config32B": {**_QWEN_3, **_sizes(64, 5120, 25600, 64)},
}

_NEMOTRON_4B = {
    **_BASE,
    **_sizes(32, 3072, 9216, 24, num_query_groups=8, kv_channels=128),
    "normalization": "LayerNorm",
    "activation_func": "squared_relu",
    "gated_linear_unit": False,
    "rotary_percent": 0.5,
    "layernorm_zero_centered_gamma": True,
    "init_method_std": 0.0134,
}
_NEMOTRON = {
    f"{_PACKAGE}.nemotron.NemotronConfig": _NEMOTRON_4B,
    f"{_PACKAGE}.nemotron.Nemotron3Config4B": _NEMOTRON_4B,
    **{
        f"{_PACKAGE}.nemotron.Nemotron{size}": {**_NEMOTRON_4B, "kv_channels": None, **sizes}
        for size, sizes in {
            "3Config8B": _sizes(32, 4096, 16384, 32, num_query_groups=None, init_method_std=0.010),
            "3Config22B": _sizes(40, 6144, 24576, 48, num_query_groups=None, init_method_std=0.008),
            "4Config15B": _sizes(32, 6144, 24576, 48),
            "4Config340B": _sizes(96, 18432, 73728, 96, init_method_std=0.0063),
        }.items()
    },
}

_LLAMA_MODELS = (
    "llama.LlamaModel",
    "llama.MLPerfLoRALlamaModel",
    "llama_nemotron.LlamaNemotronModel",
)
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            tuple(f"{_PACKAGE}.{model}" for model in _LLAMA_MODELS),
            _LLAMA,
            scaled=f"{_PACKAGE}.llama.Llama31Config",
        ),
        Family(
            "mistral", (f"{_PACKAGE}.mistral.MistralModel",), _MISTRAL, frozenset({"window_size"})
        ),
        Family(
            "mixtral",
            (f"{_PACKAGE}.mixtral.MixtralModel",),
            _MIXTRAL,
            frozenset({"num_moe_experts"}),
        ),
        Family("qwen2", (f"{_PACKAGE}.qwen2.Qwen2Model",), _QWEN, frozenset({"add_qkv_bias"})),
        Family(
            "qwen3", (f"{_PACKAGE}.qwen3.Qwen3Model",), _QWEN_3_CLASSES, frozenset({"qk_layernorm"})
        ),
        Family("nemotron", (f"{_PACKAGE}.nemotron.NemotronModel",), _NEMOTRON),
    )
}
"""Name (the ``model_type`` of Hugging Face) -> family."""

BASE = dict(_BASE)
"""The fields of a plain Llama."""
