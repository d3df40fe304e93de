"""Load every weight of PATH into memory, in a process of its own, and print the seconds and the
peak of memory as JSON.

    python load_times.py PATH        a .safetensors file, weights/ of a NeMo 2.0 directory, or a
    .nemo archive

A .nemo is unpacked to a temporary directory first, as NeMo 1 does. Imports count in neither figure.
"""

import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psutil
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file


def load(path: Path) -> dict:
    """Name -> tensor."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix != ".nemo":
        return dist_checkpointing.load_plain_tensors(str(path))
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path, "r:") as archive:
        archive.extractall(folder)
        return dist_checkpointing.load_plain_tensors(f"{folder}/model_weights")


def peak() -> float:
    """Megabytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    before, began = psutil.Process().memory_info().rss / 1e6, time.perf_counter()
    tensors = {name: value for name, value in load(Path(sys.argv[1])).items() if isinstance(value, torch.Tensor)}
    # safetensors maps the file into memory: only adding up brings every value in.
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in tensors.values())
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": round(seconds, 2), "peak_mb": round(peak() - before), "tensors": len(tensors), "sum": round(total, 3)}))
    os._exit(0)
