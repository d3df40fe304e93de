"""Load each DIRECTORY that save_shards.py wrote in one process, as Megatron-Core does it, and say
what happened.

    torchrun load_shards.py SEED DIRECTORY...

Prints a line for each: the error, or whether every value is that of the model with this SEED.
"""

import re
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from save_shards import model
from torch.distributed.checkpoint.api import CheckpointException


def load(directory: str, seed: int) -> str:
    """Load ``directory`` and compare every part with the model that it was made from."""
    right, empty = (model(int(re.search(r"_(\d+)l_", directory)[1]), seed) for _ in range(2))
    for part in empty.values():
        part.data = torch.zeros_like(part.data)
    try:
        loaded = dist_checkpointing.load(empty, directory)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
    except Exception as error:  # noqa: BLE001 - whatever Megatron-Core raises is what this script is for
        cause = error
    else:
        cause = None
    if cause is not None:
        return (
            f"{type(cause).__name__}: "
            f"{' '.join(str(cause).split()).replace(f'{directory}/', '')[:90]}"
        )
    wrong = [name for name, part in right.items() if not torch.equal(part.data, loaded[name])]
    return f"loaded without an error, but {len(wrong)} of {len(right)} parts have wrong values" if wrong else "loaded, every value right"


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for name in sys.argv[2:]:
        print(f"{Path(name).parent.name}: {load(name, int(sys.argv[1]))}")
    torch.distributed.destroy_process_group()
