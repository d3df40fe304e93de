"""Checkpoints as Megatron-LM, Megatron-Bridge and NeMo 1 leave them in a directory, written by
Megatron-Core.

Run as a script, because Megatron-Core needs a process group: ``megatron_samples.py DIRECTORY``
writes ``lm/iter_0000010`` and ``lm/iter_0000020`` (Megatron-LM, with arguments and optimizer
state), ``bridge/iter_0000005`` (Megatron-Bridge), ``adapter/iter_0000007`` (only a LoRA, as
Megatron-Bridge saves it), ``nemo2/LoRA`` and ``nemo2/DoRA`` (adapters of NeMo 2.0), ``zarr`` (a
NeMo 2.0 directory in zarr), ``nemo1`` (a training of NeMo 1 with sharded weights) and
``old/iter_0000003`` (the old form of two ranks).
"""

import argparse
import sys
from pathlib import Path

import yaml
from checkpoint_samples import (
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    ROPE_SCALING,
    SIZES,
    VOCABULARY,
    _sharded,
    model_yaml,
    process_group,
    run,
)

ARGS = SIZES | {
    "group_query_attention": True,
    "padded_vocab_size": VOCABULARY,
    "rotary_base": 500000,
    "normalization": "RMSNorm",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer_model": "/somewhere/tokenizer",
    "ckpt_format": "torch_dist",
    "num_experts": None,
}
PROVIDER = "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider"
LORA = {"dim": 4, "alpha": 8, "target_modules": ["linear_qkv"]}


def make(directory: Path) -> None:
    """Write all of them in a process of its own."""
    run(__file__, directory)


def run_config(peft: dict | None = None) -> dict:
    """``run_config.yaml`` with the fields that matter; the names are Megatron-Bridge's."""
    scaling = ROPE_SCALING | {"scale_factor": 8.0, "old_context_len": 8192}
    model = {
        "_target_": PROVIDER,
        "rotary_base": 500000,
        "share_embeddings_and_output_weights": False,
        "vocab_size": VOCABULARY,
        "qk_layernorm": False,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    }
    name, base = "meta-llama/Llama-3.1-8B", "/gone/base" if peft else None
    return {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": SIZES | scaling | model,
        "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": name},
        "checkpoint": {"save": "/somewhere", "pretrained_checkpoint": base},
        "peft": peft,
    }


def _arguments() -> argparse.Namespace:
    import torch
    from megatron.core.transformer.enums import AttnBackend

    more = {"params_dtype": torch.bfloat16, "attention_backend": AttnBackend.flash}
    return argparse.Namespace(**ARGS, **more, rank=0, load=None)


def _iteration(directory: Path, state: dict) -> Path:
    from megatron.core import dist_checkpointing

    directory.mkdir(parents=True)
    dist_checkpointing.save(state, str(directory))
    return directory


def _megatron_lm(directory: Path) -> None:
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    for iteration in (10, 20):
        moment = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(HIDDEN)
        )
        state = {
            "args": _arguments(),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "num_floating_point_operations_so_far": 1e9,
            "model": _sharded("", "gpu"),
            "optimizer": {"exp_avg": moment},
            "opt_param_scheduler": {"max_lr": 1e-4},
        }
        _iteration(directory / f"iter_{iteration:07d}", state)
    (directory / "latest_checkpointed_iteration.txt").write_text("10")


def _megatron_bridge(directory: Path) -> None:
    state = {"checkpoint_version": 3.0, "iteration": 5, "model": _sharded("", "gpu")}
    path = _iteration(directory / "iter_0000005", state)
    (path / "run_config.yaml").write_text(yaml.safe_dump(run_config()))
    (path / "tokenizer").mkdir()


def _lora(prefix: str, dora: bool = False) -> dict:
    """The sharded state of a LoRA on linear_qkv, of rank 4, or of a DoRA."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    state, rows = {}, (HEADS + 2 * GROUPS) * HEAD_DIM
    shapes = {"linear_in.weight": (4, HIDDEN), "linear_out.weight": (rows, 4)}
    shapes |= {"weight_magnitude": (rows,)} if dora else {}
    for layer in range(LAYERS):
        for part, shape in shapes.items():
            name = f"{prefix}decoder.layers.self_attention.linear_qkv.adapter.{part}"
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            state[f"{layer}.{part}"] = ShardedTensor.from_rank_offsets(
                name, tensor, (0, layer, LAYERS), prepend_axis_num=1
            )
    return state


def _adapter(directory: Path) -> None:
    state = {"checkpoint_version": 3.0, "iteration": 7, "model": _lora("")}
    path = _iteration(directory / "iter_0000007", state)
    peft = {"_target_": "megatron.bridge.peft.lora.LoRA", **LORA}
    (path / "run_config.yaml").write_text(yaml.safe_dump(run_config(peft)))


def _nemo2_adapters(directory: Path) -> None:
    for kind in ("LoRA", "DoRA"):
        (directory / kind / "context").mkdir(parents=True)
        transform = {"_target_": f"nemo.collections.llm.peft.{kind.lower()}.{kind}", **LORA}
        model = model_yaml("gpu") | {"model_transform": transform}
        (directory / kind / "context" / "model.yaml").write_text(yaml.safe_dump(model))
        weights = _iteration(directory / kind / "weights", _lora("module.", kind == "DoRA"))
        (weights / "adapter_metadata.json").write_text('{"model_ckpt_path": "/gone/base"}')


def _zarr(directory: Path) -> None:
    from megatron.core import dist_checkpointing

    (directory / "context").mkdir(parents=True)
    (directory / "context" / "model.yaml").write_text(yaml.safe_dump(model_yaml("gpu")))
    (directory / "weights").mkdir()
    dist_checkpointing.save(_sharded("module.", "gpu"), str(directory / "weights"), ("zarr", 1))


def _nemo1(directory: Path) -> None:
    state = {
        "epoch": 1,
        "global_step": 30,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": _sharded("model.", "gpu"),
        "callbacks": {},
    }
    _iteration(directory, state)


def _old(directory: Path) -> None:
    import torch

    for rank in range(2):
        folder = directory / "iter_0000003" / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        tensors = {"layers.0.mlp.dense_h_to_4h.weight": torch.full((FFN, HIDDEN), float(rank))}
        state = {"args": _arguments(), "checkpoint_version": 3.0, "iteration": 3}
        state["model"] = {"language_model": {"encoder": tensors}}
        torch.save(state, folder / "model_optim_rng.pt")


if __name__ == "__main__":
    with process_group():
        root = Path(sys.argv[1])
        for name, write in {
            "lm": _megatron_lm,
            "bridge": _megatron_bridge,
            "adapter": _adapter,
            "nemo2": _nemo2_adapters,
            "zarr": _zarr,
            "nemo1": _nemo1,
            "old": _old,
        }.items():
            write(root / name)
