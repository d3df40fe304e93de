"""The configuration classes of NeMo 2.0 that are read here, with the defaults of each, and the
families that they belong to.

NeMo writes the configuration object of a model as ``_target_`` (its class) and arguments. Current
versions write every field; older ones only those that differ from the class, so the rest has to
come from the class. The defaults below are those of NeMo 2.4.1
(``nemo/collections/llm/gpt/model/*.py``); a test compares them with the installed classes. How to
add a family: docs/adding-a-model-family.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, Any] = {
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
"""The fields of a plain Llama."""

MUST_BE_DEFAULT = tuple(BASE)[tuple(BASE).index("moe_ffn_hidden_size") :]
"""Fields that have to be as in every class here."""

FOREIGN = {
    "moe_router_topk_limited_devices": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_force_load_balancing": False,
    "moe_expert_capacity_factor": None,
    "moe_token_dropping": False,
    "moe_apply_probs_on_input": False,
    "mrope_section": None,
    "is_hybrid_model": False,
    "heterogeneous_block_specs": False,
    "quant_recipe": None,
    # Of later versions of Megatron-Core (0.14 to 0.16)
    "softmax_type": "vanilla",
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "qk_l2_norm": False,
    "window_attn_skip_freq": None,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
}
"""Fields of no family here that change what is computed, and are written nowhere: another value
than this one is refused."""

ROPE_SCALING = {
    "scale_factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}
"""The four numbers of Llama 3.1's rope scaling, as NeMo's class has them."""
FEATURES = ("add_qkv_bias", "qk_layernorm", "window_size", "num_moe_experts")
"""Fields that tell families apart: a family that does not have one leaves it off."""


_PACKAGE = "nemo.collections.llm.gpt.model"


@dataclass(frozen=True)
class Family:
    """A family of models, and the fields in which it may differ from a Llama.

    ``name`` is the ``model_type`` of Hugging Face, ``aliases`` what other configurations call it,
    ``module`` that of NeMo's classes (default: the name). ``configs`` are its configuration classes
    with their defaults; a converted checkpoint gets the first, or ``scaled`` for Llama 3.1's rope.
    ``features`` are those of :data:`FEATURES` that it may have.

    NeMo's importer from Hugging Face takes the ``activation`` and the fields ``fixed`` of
    ``config.json`` for granted, and leaves NeMo's fields ``copied`` (-> that of ``config.json``) at
    the default of the class.
    """

    name: str
    configs: dict[str, dict[str, Any]]
    features: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    copied: Mapping[str, str] = field(default_factory=dict)
    activation: str = "silu"
    scaled: str | None = None
    aliases: tuple[str, ...] = ()
    module: str | None = None
    more_models: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people, and in the names of NeMo's classes."""
        return self.name.capitalize()

    @property
    def models(self) -> tuple[str, ...]:
        """NeMo's model classes, the one that a converted checkpoint gets first."""
        own = f"{_PACKAGE}.{self.module or self.name}.{self.title}Model"
        return own, *(f"{_PACKAGE}.{name}" for name in self.more_models)

    @property
    def importer(self) -> tuple[str, str]:
        """Module and class of NeMo's importer from Hugging Face."""
        return f"{_PACKAGE}.{self.module or self.name}", f"HF{self.title}Importer"


def _classes(module: str, configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{_PACKAGE}.{module}.{name}": fields for name, fields in configs.items()}


def _sizes(layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    return dict(zip(names, (layers, hidden, ffn, heads), strict=True)) | more


_LLAMA_2_7B = BASE | _sizes(32, 4096, 11008, 32, num_query_groups=32)
_LLAMA_2_13B = BASE | _sizes(40, 5120, 13824, 40, num_query_groups=40)
_LLAMA_2_70B = BASE | _sizes(80, 8192, 28672, 64, num_query_groups=8)
_CODE = {"rotary_base": 1_000_000, "seq_length": 16384}
_CODE_34B = _LLAMA_2_70B | _CODE | {"num_layers": 48, "ffn_hidden_size": 22016}
_LLAMA_3 = BASE | {"num_query_groups": 8, "init_method_std": 0.01}
_LLAMA_31 = _LLAMA_3 | ROPE_SCALING | {"init_method_std": 0.02}
_SIZE_8B = _sizes(32, 4096, 14336, 32, rotary_base=500_000, seq_length=8192)
_SIZE_70B = _sizes(80, 8192, 28672, 64, rotary_base=500_000, seq_length=8192)
_LONG = {"seq_length": 131072}
_TIED = {"share_embeddings_and_output_weights": True}
_LLAMA_31_8B = _LLAMA_31 | _SIZE_8B | _LONG
_LLAMA_31_70B = _LLAMA_31 | _SIZE_70B | _LONG
_LLAMA_32 = _LLAMA_31 | _LONG | _TIED | {"rotary_base": 500_000, "scale_factor": 32.0}
_LLAMA = _classes(
    "llama",
    {
        "LlamaConfig": BASE,
        "Llama2Config7B": _LLAMA_2_7B,
        "Llama2Config13B": _LLAMA_2_13B,
        "Llama2Config70B": _LLAMA_2_70B,
        "CodeLlamaConfig7B": _LLAMA_2_7B | _CODE,
        "CodeLlamaConfig13B": _LLAMA_2_13B | _CODE,
        "CodeLlamaConfig34B": _CODE_34B,
        "CodeLlamaConfig70B": _LLAMA_2_70B,
        "Llama3Config": _LLAMA_3,
        "Llama3Config8B": _LLAMA_3 | _SIZE_8B,
        "Llama3Config70B": _LLAMA_3 | _SIZE_70B | {"init_method_std": 0.008944},
        "Llama31Config": _LLAMA_31,
        "Llama31Config8B": _LLAMA_31_8B,
        "Llama31Config70B": _LLAMA_31_70B,
        "Llama31Config405B": _LLAMA_31_70B | _sizes(126, 16384, 53248, 128),
        "Llama32Config1B": _LLAMA_32 | _sizes(16, 2048, 8192, 32),
        "Llama32Config3B": _LLAMA_32 | _sizes(28, 3072, 8192, 24),
    },
) | _classes(
    "llama_nemotron",
    {
        "Llama31NemotronNano8BConfig": _LLAMA_31_8B | {"kv_channels": 128},
        "Llama31Nemotron70BConfig": _LLAMA_31_70B,
    },
)

# NeMo's other families build on its GPTConfig, and only Llama and Nemotron set this one. It changes
# no result.
_OTHER = BASE | {"persist_layer_norm": False}

_SIZE_7B = _sizes(32, 4096, 14336, 32, num_query_groups=8)
_MISTRAL_7B = _OTHER | _SIZE_7B | {"seq_length": 32768, "window_size": [4096, 0]}
_MISTRAL_NEMO = _MISTRAL_7B | {
    "kv_channels": 128,
    "seq_length": 4096,
    "window_size": None,
    "rotary_base": 1_000_000.0,
}
_MISTRAL = _classes(
    "mistral",
    {
        "MistralConfig7B": _MISTRAL_7B,
        "MistralNeMoConfig12B": _MISTRAL_NEMO | _sizes(40, 5120, 14336, 32),
        "MistralNeMoConfig123B": _MISTRAL_NEMO | _sizes(88, 12288, 28672, 96),
    },
)

_EXPERTS = {"rotary_base": 1_000_000.0, "num_moe_experts": 8, "moe_aux_loss_coeff": 0.01}
_MIXTRAL_8X7B = _OTHER | _SIZE_7B | _EXPERTS
_MIXTRAL = _classes(
    "mixtral",
    {
        "MixtralConfig": _MIXTRAL_8X7B,
        "MixtralConfig8x3B": _MIXTRAL_8X7B | _sizes(32, 2560, 8960, 32),
        "MixtralConfig8x7B": _MIXTRAL_8X7B,
        "MixtralConfig8x22B": _MIXTRAL_8X7B | _sizes(56, 6144, 16384, 48),
    },
)

_QWEN_2 = _OTHER | {
    "add_qkv_bias": True,
    "vocab_size": 151936,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 1_000_000.0,
}
_LARGE = {"num_query_groups": 8, "vocab_size": 152064, "layernorm_epsilon": 1e-5}
_QWEN_2_SIZES = {
    "500M": _sizes(24, 896, 4864, 14, num_query_groups=2),
    "1P5B": _sizes(28, 1536, 8960, 12, num_query_groups=2),
    "7B": _sizes(28, 3584, 18944, 28, num_query_groups=4, vocab_size=152064),
    "72B": _sizes(80, 8192, 29568, 64) | _LARGE,
}
_QWEN_25_SIZES = _QWEN_2_SIZES | {
    "500M": _QWEN_2_SIZES["500M"] | {"seq_length": 32768},
    "14B": _sizes(48, 5120, 13824, 40) | _LARGE,
    "32B": _sizes(64, 5120, 27648, 40) | _LARGE,
}
_QWEN = _classes(
    "qwen2",
    {"Qwen2Config": _QWEN_2}
    | {f"Qwen2Config{name}": _QWEN_2 | sizes for name, sizes in _QWEN_2_SIZES.items()}
    | {f"Qwen25Config{name}": _QWEN_2 | _LONG | sizes for name, sizes in _QWEN_25_SIZES.items()},
)

_NORMED = {"add_qkv_bias": False, "qk_layernorm": True}
_QWEN_3 = _QWEN_2 | _NORMED | {"kv_channels": 128, "num_query_groups": 8}
_QWEN_3_CLASSES = _classes(
    "qwen3",
    {
        "Qwen3Config": _QWEN_3,
        "Qwen3Config600M": _QWEN_3 | _sizes(28, 1024, 3072, 16) | _TIED,
        "Qwen3Config1P7B": _QWEN_3 | _sizes(28, 2048, 6144, 16) | _TIED,
        "Qwen3Config4B": _QWEN_3 | _sizes(36, 2560, 9728, 32) | _TIED,
        "Qwen3Config8B": _QWEN_3 | _sizes(36, 4096, 12288, 32),
        "Qwen3Config14B": _QWEN_3 | _sizes(40, 5120, 17408, 40),
        "Qwen3Config32B": _QWEN_3 | _sizes(64, 5120, 25600, 64),
    },
)

_NEMOTRON_LARGE = BASE | {
    "normalization": "LayerNorm",
    "activation_func": "squared_relu",
    "gated_linear_unit": False,
    "rotary_percent": 0.5,
    "layernorm_zero_centered_gamma": True,
    "init_method_std": 0.0134,
}
_NEMOTRON_GROUPS = _NEMOTRON_LARGE | {"num_query_groups": 8}
_NEMOTRON_4B = _NEMOTRON_GROUPS | _sizes(32, 3072, 9216, 24, kv_channels=128)
_NEMOTRON = _classes(
    "nemotron",
    {
        "NemotronConfig": _NEMOTRON_4B,
        "Nemotron3Config4B": _NEMOTRON_4B,
        "Nemotron3Config8B": _NEMOTRON_LARGE | _sizes(32, 4096, 16384, 32, init_method_std=0.010),
        "Nemotron3Config22B": _NEMOTRON_LARGE | _sizes(40, 6144, 24576, 48, init_method_std=0.008),
        "Nemotron4Config15B": _NEMOTRON_GROUPS | _sizes(32, 6144, 24576, 48),
        "Nemotron4Config340B": _NEMOTRON_GROUPS
        | _sizes(96, 18432, 73728, 96, init_method_std=0.0063),
    },
)

_NO_ROPE, _NO_BIAS = {"rope_scaling": None}, {"attention_bias": False}
_NO_WINDOW, _UNTIED = {"use_sliding_window": False}, {"tie_word_embeddings": False}
_ROWS = {"vocab_size": "vocab_size"}
"""Rows of the embedding, which some importers take from the tokenizer."""
_LENGTH = {"seq_length": "max_position_embeddings"}
_ROPE = {
    # Of Llama 3.1's the importer keeps only the factor.
    "low_freq_factor": "rope_scaling.low_freq_factor",
    "high_freq_factor": "rope_scaling.high_freq_factor",
    "old_context_len": "rope_scaling.original_max_position_embeddings",
}
_NEMOTRON_FIXED = _NO_ROPE | _NO_BIAS | _UNTIED | {"mlp_bias": False}
_QWEN_3_FIXED = _NO_ROPE | _NO_BIAS | _NO_WINDOW
_MIXTRAL_FIXED = _NO_ROPE | _UNTIED | {"sliding_window": None}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            _LLAMA,
            fixed=_NO_BIAS | {"mlp_bias": False},
            copied=_ROPE,
            scaled=f"{_PACKAGE}.llama.Llama31Config",
            aliases=("llama_nemotron",),
            more_models=("llama.MLPerfLoRALlamaModel", "llama_nemotron.LlamaNemotronModel"),
        ),
        # The importer takes the window for the length, and Mistral 0.2 and later have none.
        Family("mistral", _MISTRAL, ("window_size",), _NO_ROPE | _UNTIED, _LENGTH | _ROWS),
        Family("mixtral", _MIXTRAL, ("num_moe_experts",), _MIXTRAL_FIXED, _ROWS),
        # And Qwen 2.5, which differs in nothing that a configuration says.
        Family(
            "qwen2",
            _QWEN,
            ("add_qkv_bias",),
            _NO_ROPE | _NO_WINDOW,
            {"kv_channels": "head_dim"},
            aliases=("qwen",),
        ),
        Family(
            "qwen3",
            _QWEN_3_CLASSES,
            ("qk_layernorm",),
            _QWEN_3_FIXED,
            _LENGTH | {"kv_channels": "head_dim"},
            aliases=("qwen3_moe", "qwen3moe"),
        ),
        Family("nemotron", _NEMOTRON, (), _NEMOTRON_FIXED, _ROWS, "relu2"),
    )
}
"""By name."""

TITLES = {
    alias: family.title for family in FAMILIES.values() for alias in (family.name, *family.aliases)
}
"""What a configuration calls a family (a module of NeMo or Megatron-Bridge, ``model_type`` of
transformers, GGUF's architecture) -> its title."""
