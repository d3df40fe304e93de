"""Save a small made-up model with Megatron-Core, once for every SETTING, each process with its
tensor-parallel slice.

    torchrun --nproc_per_node 2 save_shards.py DIRECTORY 4:2 16:2 4:3

A SETTING is LAYERS:WRITER_THREADS[:SEED]. The checkpoint goes to
DIRECTORY/{processes}p_{layers}l_{threads}t[_seed]/iter_0000001.
"""

import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

ROWS, HIDDEN = 256, 64


def model(layers: int, seed: int) -> dict:
    """A vocabulary-parallel embedding, one column-parallel matrix a layer and a norm that every
    process has."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    whole = {f"layer {n}": torch.randn(ROWS, HIDDEN, generator=generator) for n in range(layers)}
    whole["embedding"] = torch.randn(4 * ROWS, HIDDEN, generator=generator)
    mine = {name: tensor.chunk(world)[rank].clone() for name, tensor in whole.items()}
    name = "embedding.word_embeddings.weight"
    state = {name: ShardedTensor.from_rank_offsets(name, mine["embedding"], (0, rank, world))}
    for layer in range(layers):
        state[f"layer {layer}"] = ShardedTensor.from_rank_offsets(
            "decoder.layers.mlp.linear_fc1.weight", mine[f"layer {layer}"], (0, layer, layers), (1, rank, world), prepend_axis_num=1
        )
    name = "decoder.final_layernorm.weight"
    state[name] = ShardedTensor.from_rank_offsets(name, torch.ones(HIDDEN), replica_id=rank)
    return state


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for setting in sys.argv[2:]:
        layers, threads, *seed = map(int, setting.split(":"))
        name = "_".join([f"{torch.distributed.get_world_size()}p_{layers}l_{threads}t", *map(str, seed)])
        target = Path(sys.argv[1]) / name / "iter_0000001"
        target.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=threads)
        dist_checkpointing.save(model(layers, *seed or [0]), str(target), strategy)
    torch.distributed.destroy_process_group()
