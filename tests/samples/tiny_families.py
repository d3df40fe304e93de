"""A tiny random model of each family that NeMo can import, in Hugging Face format: 2 layers, hidden
64, float32."""

from pathlib import Path

from tiny_model import make_tiny_model

VOCABULARY = 384
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
_LLAMA = {"rms_norm_eps": 1e-5}
_LLAMA3 = _LLAMA | {"rope_theta": 500000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TIED, _NO_WINDOW = {"tie_word_embeddings": True}, {"sliding_window": None}

#: name -> (class of the configuration and of the model in transformers, fields)
FAMILIES = {
    "llama2": ("Llama", _LLAMA),
    "llama3": ("Llama", _LLAMA3 | {"head_dim": 24}),
    "llama31": ("Llama", _LLAMA3 | _TIED | {"rope_scaling": _LLAMA3_ROPE}),
    "mistral": ("Mistral", _NO_WINDOW | {"head_dim": 24}),
    "mixtral": ("Mixtral", _NO_WINDOW | _EXPERTS),
    "qwen25": ("Qwen2", _TIED),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "nemotron": ("Nemotron", {"partial_rotary_factor": 0.5, "hidden_act": "relu2"}),
}


def make_tiny_family(directory: Path, family: str, **changes) -> Path:
    """Write a random model of ``family`` to ``directory``; ``changes`` go to its configuration.
    Norms and biases are random too."""
    import torch
    import transformers

    make_tiny_model(directory, num_hidden_layers=1, vocab_size=VOCABULARY)
    kind, fields = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**_COMMON | fields | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero: a converter that drops them would
            # not be seen.
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    return Path(directory)
