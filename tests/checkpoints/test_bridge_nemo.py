"""NeMo itself loads the view of a checkpoint as a GPU writes it, and computes what transformers
computes."""

import shutil

import checkpoint_samples as samples
import numpy as np
import pytest
import yaml
from tiny_model import make_tiny_model

from workshop_utils.checkpoints.convert.bridge import bridge

pytestmark = pytest.mark.slow


def hugging_face_logits(tokens):
    """``[1, sequence, vocabulary]`` of the ``gpu`` sample as a Hugging Face model in float32, put
    together here without the code under test."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config = LlamaConfig(
        vocab_size=samples.VOCABULARY,
        hidden_size=samples.HIDDEN,
        intermediate_size=samples.FFN,
        num_hidden_layers=samples.LAYERS,
        num_attention_heads=samples.HEADS,
        num_key_value_heads=samples.GROUPS,
        head_dim=samples.HEAD_DIM,
        rope_scaling=scaling,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )

    def weight(name, layer=None):
        return samples.weight(name, layer, "gpu").float()

    state = {
        "model.embed_tokens.weight": weight("embedding.word_embeddings.weight"),
        "model.norm.weight": weight("decoder.final_layernorm.weight"),
        "lm_head.weight": weight("output_layer.weight"),
    }
    for layer in range(samples.LAYERS):
        start = f"model.layers.{layer}."
        per_group = samples.HEADS // samples.GROUPS
        fused = weight("self_attention.linear_qkv.weight", layer)
        fused = fused.reshape(samples.GROUPS, per_group + 2, samples.HEAD_DIM, samples.HIDDEN)
        gate, up = weight("mlp.linear_fc1.weight", layer).chunk(2)
        state |= {
            f"{start}input_layernorm.weight": weight(
                "self_attention.linear_qkv.layer_norm_weight", layer
            ),
            f"{start}post_attention_layernorm.weight": weight(
                "mlp.linear_fc1.layer_norm_weight", layer
            ),
            f"{start}self_attn.q_proj.weight": fused[:, :per_group].reshape(-1, samples.HIDDEN),
            f"{start}self_attn.k_proj.weight": fused[:, per_group].reshape(-1, samples.HIDDEN),
            f"{start}self_attn.v_proj.weight": fused[:, per_group + 1].reshape(-1, samples.HIDDEN),
            f"{start}self_attn.o_proj.weight": weight("self_attention.linear_proj.weight", layer),
            f"{start}mlp.gate_proj.weight": gate,
            f"{start}mlp.up_proj.weight": up,
            f"{start}mlp.down_proj.weight": weight("mlp.linear_fc2.weight", layer),
        }
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("older_dump", [False, True])
def test_logits_of_a_gpu_checkpoint(originals, tmp_path, older_dump):
    from workshop_utils.inference.nemo1_engine import nemo_logits

    checkpoint = tmp_path / "gpu"
    shutil.copytree(originals / "gpu", checkpoint)
    make_tiny_model(tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*token*"):
        shutil.copy(file, checkpoint / "context" / "nemo_tokenizer")
    if older_dump:
        described = yaml.safe_load((checkpoint / "context" / "model.yaml").read_text())
        for name in (
            "activation_func",
            "gated_linear_unit",
            "normalization",
            "layernorm_epsilon",
            "vocab_size",
            "params_dtype",
            "share_embeddings_and_output_weights",
            "low_freq_factor",
            "high_freq_factor",
        ):
            del described["config"][name]
        (checkpoint / "context" / "model.yaml").write_text(yaml.safe_dump(described))
    tokens = np.random.default_rng(0).integers(3, 250, size=(1, 300))
    view = bridge(checkpoint, tmp_path / "view")
    nemo = nemo_logits(view, None, tokens)
    expected = hugging_face_logits(tokens)
    assert np.abs(expected).max() > 0.1
    assert np.abs(nemo - expected).max() <= 1e-4
