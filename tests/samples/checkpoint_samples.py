"""Genuine NeMo 2.0 checkpoints of a tiny Llama, written by Megatron-Core, and loading them the way
NeMo 1 does.

Run as a script, because Megatron-Core needs a process group: ``checkpoint_samples.py make
DIRECTORY`` writes the checkpoints ``plain`` (float32, tied) and ``gpu`` (what Transformer Engine
leaves on a GPU: bfloat16, padded vocabulary, Llama 3.1 rope, ``_extra_state`` objects, optimizer
state); ``load VIEW FLAVOUR`` loads ``VIEW/model_weights`` under the names of NeMo 1 and saves the
result to ``VIEW.loaded.pt``.
"""

import contextlib
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN = 2, 32, 4, 2, 12, 48
VOCABULARY = 384  # padded to a multiple of 128
SIZES = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_query_groups": GROUPS,
    "kv_channels": HEAD_DIM,
    "ffn_hidden_size": FFN,
}
"""The same under Megatron-Core's names."""
LLAMA = "nemo.collections.llm.gpt.model.llama"
ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

#: name after the prefix -> (shape of one layer, or of the whole tensor), in layers or not
LAYER_SHAPES = {
    "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
    "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN),
    "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
    "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
    "mlp.linear_fc2.weight": (HIDDEN, FFN),
}
WHOLE_SHAPES = {
    "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (VOCABULARY, HIDDEN),
}
EXTRA_STATE = ("self_attention.linear_qkv._extra_state", "mlp.linear_fc2._extra_state")


def model_yaml(flavour: str) -> dict:
    """``context/model.yaml`` as NeMo writes it, with the fields that matter and some that the
    script path must never see."""
    gpu = flavour == "gpu"
    config = {
        "_target_": f"{LLAMA}.{'Llama31Config' if gpu else 'LlamaConfig'}",
        "_cpu_offloading_context": None,
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "apply_rope_fusion": True,
        "bf16": gpu,
        "gated_linear_unit": True,
        "init_method": None,
        "layernorm_epsilon": 1e-05,
        "normalization": "RMSNorm",
        "params_dtype": {"_call_": False, "_target_": f"torch.{'bfloat16' if gpu else 'float32'}"},
        "rotary_base": 500000.0,
        "seq_length": 512,
        "share_embeddings_and_output_weights": not gpu,
        "vocab_size": None,
    }
    scaling = ROPE_SCALING | {"scale_factor": 32.0, "old_context_len": 256} if gpu else {}
    tokenizer = {
        "_target_": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
        "pretrained_model_name": "nemo_tokenizer",
        "trust_remote_code": False,
        "use_fast": True,
    }
    model = {"_target_": f"{LLAMA}.LlamaModel", "config": config | SIZES | scaling}
    return model | {"model_transform": None, "optim": None, "tokenizer": tokenizer}


def write_context(directory: Path, flavour: str) -> None:
    """``context/``: the configuration and a stand-in for the tokenizer."""
    (directory / "context" / "nemo_tokenizer").mkdir(parents=True)
    (directory / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")
    (directory / "context" / "model.yaml").write_text(yaml.safe_dump(model_yaml(flavour)))
    (directory / "context" / "io.json").write_text("{}")


def make(directory: Path) -> None:
    """Write both checkpoints in a process of its own."""
    run(__file__, "make", directory)


def load(view: Path, flavour: str) -> dict:
    """What NeMo 1 would get from ``view``: {name of NeMo 1: tensor, or the stored object}, through
    Megatron-Core."""
    import torch

    run(__file__, "load", view, flavour)
    return torch.load(f"{view}.loaded.pt", weights_only=False)


def weight(name: str, layer: int | None, flavour: str):
    """The tensor called ``name`` (without prefix) as it was written; random, but always the
    same."""
    import zlib

    import torch

    shape = WHOLE_SHAPES[name] if layer is None else LAYER_SHAPES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {layer}".encode()))
    # About as large as those of a trained model, so that rounding errors stay small in the logits.
    values = 0.2 * torch.randn(shape, generator=generator)
    return values.to(torch.bfloat16 if flavour == "gpu" else torch.float32)


def run(script: str, *arguments: object, **options) -> None:
    """Run ``script`` in a process of its own, which has to end well."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@contextlib.contextmanager
def process_group():
    """What Megatron-Core needs, for one process."""
    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    import torch.distributed

    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def _sharded(prefix: str, flavour: str, empty: bool = False) -> dict:
    """The sharded state dict of the model: one shard a layer, stacked on a new first axis, as
    Megatron-Core does it."""
    import io

    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {}

    def add(name: str, layer: int | None, key: str, *offsets, **options) -> None:
        tensor = weight(name, layer, flavour)
        tensor = torch.zeros_like(tensor) if empty else tensor
        part = "" if layer is None else "decoder.layers."
        state[prefix + key] = ShardedTensor.from_rank_offsets(
            prefix + part + name, tensor, *offsets, **options
        )

    for name in WHOLE_SHAPES:
        if name != "output_layer.weight" or flavour == "gpu":
            add(name, None, name)
    for layer in range(LAYERS):
        for name in LAYER_SHAPES:
            key = f"decoder.layers.{layer}.{name}"
            add(name, layer, key, (0, layer, LAYERS), prepend_axis_num=1)
        for name in EXTRA_STATE if flavour == "gpu" else ():
            content = io.BytesIO(pickle.dumps({"extra_fp8_variables": {"name": f"{name} {layer}"}}))
            place = (LAYERS,), (layer,)
            state[f"{prefix}decoder.layers.{layer}.{name}"] = ShardedObject(
                f"{prefix}decoder.layers.{name}", None if empty else content, *place
            )
    return state


def _make(directory: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    for flavour in ("plain", "gpu"):
        write_context(directory / flavour, flavour)
        weights = directory / flavour / "weights"
        weights.mkdir()
        state = _sharded("module.", flavour)
        if flavour == "gpu":
            name = "optimizer.state.exp_avg.module.decoder.final_layernorm.weight"
            moment = weight("decoder.final_layernorm.weight", None, "plain")
            state["optimizer"] = {"exp_avg": ShardedTensor.from_rank_offsets(name, moment)}
            state["global_step"] = 10
        dist_checkpointing.save(state, str(weights))


def _load(view: Path, flavour: str) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    state = {"state_dict": _sharded("model.", flavour, empty=True)}
    loaded = dist_checkpointing.load(
        state, str(view / "model_weights"), strict=StrictHandling.RAISE_ALL
    )
    torch.save(loaded["state_dict"], f"{view}.loaded.pt")


if __name__ == "__main__":
    with process_group():
        {"make": _make, "load": _load}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
