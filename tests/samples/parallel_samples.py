"""Genuine checkpoints of four ranks of Megatron, two-way tensor and two-way pipeline parallel, and
of one rank with the same weights.

``make(DIRECTORY)`` starts the processes (over gloo). The four load one torch_dist checkpoint, which
Megatron-Core cuts up for them, and write
    reference/                       the checkpoint that they load: names without a prefix
    ranks/tp_rank_0T_pp_rank_00P/    the state dict of each rank as NeMo 1 names it
    lm/mp_rank_0T_00P/               the same as Megatron-LM's old form names it
    iter/                            ``reference`` with the arguments of Megatron-LM in common.pt
    experts/model_weights.ckpt       the state dict of a mixture of experts, one rank
    experts_reference/               the same as torch_dist
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, ROWS = 4, 32, 4, 2, 12, 48, 256
SIZES = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_query_groups": GROUPS,
    "kv_channels": HEAD_DIM,
    "ffn_hidden_size": FFN,
}

ARGUMENTS = argparse.Namespace(
    **SIZES,
    group_query_attention=True,
    seq_length=128,
    max_position_embeddings=512,
    position_embedding_type="rope",
    rotary_base=10000,
    rotary_percent=1.0,
    normalization="RMSNorm",
    norm_epsilon=1e-5,
    swiglu=True,
    squared_relu=False,
    add_bias_linear=False,
    add_qkv_bias=True,
    untie_embeddings_and_output_weights=False,
    num_experts=None,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.02,
    apply_layernorm_1p=False,
    use_rope_scaling=False,
    make_vocab_size_divisible_by=128,
)
"""Arguments of Megatron-LM for the model (a selection: it saves some four hundred)."""

CONFIG = SIZES | {
    "encoder_seq_length": 512,
    "max_position_embeddings": 512,
    "mcore_gpt": True,
    "name": "",
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "bias": False,
    "qkv_bias": True,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": True,
    "layernorm_epsilon": 1e-5,
    "precision": 32,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "tokenizer": {"library": "megatron", "type": "GPT2BPETokenizer", "model": None},
}
"""NeMo 1's ``model_config.yaml`` of the same model."""


def make(directory: Path) -> None:
    """Write the samples, in processes of their own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        for world in (1, 4):
            command = [sys.executable, __file__, str(directory), scratch, str(world)]
            ranks = [
                subprocess.Popen([*command, str(rank)], env=environment, **pipes)
                for rank in range(world)
            ]
            for rank in ranks:
                output = rank.communicate()[0]
                assert rank.returncode == 0, output[-4000:]


def _model(**changes):
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **SIZES,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        init_method_std=0.2,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        **({"add_qkv_bias": True} | changes),
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(changes.get("num_moe_experts"), normalization="RMSNorm"),
        vocab_size=ROWS,
        max_sequence_length=512,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _write_reference(directory: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    model = _model()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    common = {"args": ARGUMENTS, "iteration": 10, "checkpoint_version": 3.0}
    for name, more in {"reference": {}, "iter": common}.items():
        (directory / name).mkdir(parents=True)
        state = {"model": model.sharded_state_dict(), **more}
        dist_checkpointing.save(state, str(directory / name))


def _of_nemo1(state: dict) -> dict:
    return {f"model.{name}": value for name, value in state.items()}


def _write_experts(directory: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    model = _model(num_moe_experts=3, moe_router_topk=2, add_qkv_bias=False)
    for name in ("experts", "experts_reference"):
        (directory / name).mkdir()
    state = {"model": model.sharded_state_dict()}
    dist_checkpointing.save(state, str(directory / "experts_reference"))
    torch.save(_of_nemo1(model.state_dict()), directory / "experts" / "model_weights.ckpt")


def _write_rank(directory: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    model = _model()
    state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(directory / "reference"))["model"]
    tensors = {name: loaded[name] for name in loaded if not name.endswith("_extra_state")}
    model.load_state_dict(tensors, strict=False)
    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    state = model.state_dict()
    old = {"args": ARGUMENTS, "iteration": 10, "model": state}
    for name, held in {
        f"ranks/tp_rank_{tensor:02}_pp_rank_{stage:03}/model_weights.ckpt": _of_nemo1(state),
        f"lm/mp_rank_{tensor:02}_{stage:03}/model_optim_rng.pt": old,
    }.items():
        (directory / name).parent.mkdir(parents=True)
        torch.save(held, directory / name)


def _run(directory: Path, scratch: Path, world: int, rank: int) -> None:
    import torch.distributed
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = f"file://{scratch}/store{world}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    width = 1 if world == 1 else 2
    parallel_state.initialize_model_parallel(width, width)
    model_parallel_cuda_manual_seed(1)
    if world == 1:
        _write_reference(directory)
        _write_experts(directory)
    else:
        _write_rank(directory)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    _run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
