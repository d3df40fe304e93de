"""NeMo itself loads the view of a checkpoint as a GPU writes it, and computes what transformers
computes."""

import shutil

import checkpoint_samples as samples
import numpy as np
import pytest
import yaml

from workshop_utils.checkpoints.convert.bridge import bridge

pytestmark = pytest.mark.slow


def hugging_face_logits(tokens):
    """``[1, sequence, vocabulary]`` of the ``gpu`` sample as a Hugging Face model in float32, put
    together here without the code under test."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=samples.VOCABULARY,
        hidden_size=samples.HIDDEN,
        intermediate_size=samples.FFN,
        num_hidden_layers=samples.LAYERS,
        num_attention_heads=samples.HEADS,
        num_key_value_heads=samples.GROUPS,
        head_dim=samples.HEAD_DIM,
        rope_scaling=samples.ROPE_SCALING
        | {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 256},
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
    per_group = samples.HEADS // samples.GROUPS
    for layer in range(samples.LAYERS):
        fused = weight("self_attention.linear_qkv.weight", layer)
        fused = fused.reshape(samples.GROUPS, per_group + 2, samples.HEAD_DIM, samples.HIDDEN)
        query, key, value = fused[:, :per_group], fused[:, per_group], fused[:, per_group + 1]
        gate, up = weight("mlp.linear_fc1.weight", layer).chunk(2)
        for name, held in {
            "input_layernorm": weight("self_attention.linear_qkv.layer_norm_weight", layer),
            "post_attention_layernorm": weight("mlp.linear_fc1.layer_norm_weight", layer),
            "self_attn.q_proj": query.reshape(-1, samples.HIDDEN),
            "self_attn.k_proj": key.reshape(-1, samples.HIDDEN),
            "self_attn.v_proj": value.reshape(-1, samples.HIDDEN),
            "self_attn.o_proj": weight("self_attention.linear_proj.weight", layer),
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": weight("mlp.linear_fc2.weight", layer),
        }.items():
            state[f"model.layers.{layer}.{name}.weight"] = held
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.numpy()


LEFT_OUT = (
    "activation_func",
    "gated_linear_unit",
    "normalization",
    "layernorm_epsilon",
    "vocab_size",
    "params_dtype",
    "share_embeddings_and_output_weights",
    "low_freq_factor",
    "high_freq_factor",
)


@pytest.mark.parametrize("left_out", [(), LEFT_OUT])
def test_logits_of_a_gpu_checkpoint(originals, tiny, tmp_path, left_out):
    """Also of an older dump, which leaves fields out."""
    from workshop_utils.inference.nemo1_engine import nemo_logits

    checkpoint = tmp_path / "gpu"
    shutil.copytree(originals / "gpu", checkpoint)
    for file in tiny.glob("*token*"):
        shutil.copy(file, checkpoint / "context" / "nemo_tokenizer")
    file = checkpoint / "context" / "model.yaml"
    described = yaml.safe_load(file.read_text())
    for name in left_out:
        del described["config"][name]
    file.write_text(yaml.safe_dump(described))
    tokens = np.random.default_rng(0).integers(3, 250, size=(1, 300))
    nemo = nemo_logits(bridge(checkpoint, tmp_path / "view"), None, tokens)
    expected = hugging_face_logits(tokens)
    assert np.abs(expected).max() > 0.1
    assert np.abs(nemo - expected).max() <= 1e-4
