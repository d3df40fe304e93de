"""The index of a large model: 80 layers, 8-way tensor and 16-way pipeline parallel, 100,000 chunks.
Times are in benchmarks/."""

import json
import subprocess
import sys

import pytest
from places import ROOT

WRITER = ROOT / "benchmarks" / "synthetic_index.py"
READER = """
import json, re, sys
from pathlib import Path
from workshop_utils.checkpoints.formats import torch_dist
found = torch_dist.read_directory(Path(sys.argv[1]))
# Not ru_maxrss: a child that pytest forked begins with pytest's own.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
chunks = sum(len(tensor.chunks) for tensor in found.tensors.values())
print(json.dumps([peak, chunks, len(found.objects)]))
"""


@pytest.mark.slow
def test_memory(tmp_path):
    subprocess.run([sys.executable, WRITER, tmp_path], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", READER, tmp_path], check=True, capture_output=True, text=True
    )
    peak, chunks, objects = json.loads(done.stdout)
    assert (chunks, objects) == (100_000, 80)
    assert peak < 300, f"{peak} MiB"


def test_every_place_is_the_one_that_torch_wrote(tmp_path):
    """A smaller one, compared with the index as torch's own classes hold it."""
    from torch.distributed.checkpoint import FileSystemReader

    from workshop_utils.checkpoints.formats import torch_dist

    subprocess.run([sys.executable, WRITER, tmp_path, "6000"], check=True, capture_output=True)
    index = FileSystemReader(tmp_path).read_metadata()
    found = torch_dist.read_directory(tmp_path)
    places = {
        (key.fqn, key.offset and tuple(key.offset)): place
        for key, place in index.storage_data.items()
    }
    chunks = [(tensor.name, chunk) for tensor in found.tensors.values() for chunk in tensor.chunks]
    assert len(chunks) == 6000
    for name, chunk in chunks:
        place = places[name, chunk.offsets]
        assert (chunk.file, chunk.start, chunk.length) == (
            place.relative_path,
            place.offset,
            place.length,
        )
    for name, entry in found.tensors.items():
        stated = index.state_dict_metadata[name].chunks
        assert [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stated] == [
            (chunk.offsets, chunk.shape) for chunk in entry.chunks
        ]
