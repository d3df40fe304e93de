"""Reading NeMo 2.0 directories and the pickles in them: what is there, what is missing, what is
hostile."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_samples as samples
import pytest
from places import ROOT

from workshop_utils.checkpoints.formats import nemo2, restricted_pickle, torch_dist
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
    WorkshopError,
)

SYNTHETIC = ROOT / "benchmarks" / "synthetic_index.py"


@pytest.fixture
def checkpoint(originals, root):
    """A copy of the checkpoint as a GPU writes it, to be damaged."""
    return Path(shutil.copytree(originals / "gpu", root / "gpu"))


def check_places(tensors, index) -> None:
    """Shapes, dtypes, chunks and places of ``tensors`` are those of torch's own ``index``."""
    places = {
        (key.fqn, key.offset and tuple(key.offset)): place
        for key, place in index.storage_data.items()
    }
    stated = index.state_dict_metadata
    assert set(tensors) == {name for name, entry in stated.items() if hasattr(entry, "chunks")}
    for name, tensor in tensors.items():
        entry = stated[name]
        assert tensor.shape == tuple(entry.size)
        assert f"torch.{tensor.dtype}" == str(entry.properties.dtype)
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        assert chunks == [(chunk.offsets, chunk.shape) for chunk in tensor.chunks]
        for chunk in tensor.chunks:
            place = places[name, chunk.offsets]
            own = chunk.file, chunk.start, chunk.length
            assert own == (place.relative_path, place.offset, place.length)


def test_tensors_and_their_places_are_those_that_torch_reads(checkpoint):
    from torch.distributed.checkpoint import FileSystemReader

    index = FileSystemReader(checkpoint / "weights").read_metadata()
    held = nemo2.read(checkpoint)
    check_places(held.tensors, index)
    assert set(held.objects) == set(index.state_dict_metadata) - set(held.tensors)


def test_every_place_of_a_large_index_is_the_one_that_torch_wrote(tmp_path):
    from torch.distributed.checkpoint import FileSystemReader

    samples.run(SYNTHETIC, tmp_path, 6000)
    tensors = torch_dist.read_directory(tmp_path).tensors
    assert sum(len(tensor.chunks) for tensor in tensors.values()) == 6000
    check_places(tensors, FileSystemReader(tmp_path).read_metadata())


def test_a_chunk_can_be_read_from_its_bytes(checkpoint):
    import io

    import torch

    name = "mlp.linear_fc1.weight"
    chunk = nemo2.read(checkpoint).tensors[f"module.decoder.layers.{name}"].chunks[1]
    with (checkpoint / "weights" / chunk.file).open("rb") as file:
        file.seek(chunk.start)
        saved = torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True)
    assert torch.equal(saved.squeeze(0), samples.weight(name, chunk.offsets[0], "gpu"))


def test_the_summary(checkpoint):
    told = identify(checkpoint)
    assert (told.format, told.dtype) == ("NeMo 2.0 directory (torch_dist)", "bfloat16")
    sizes = told.architecture
    assert (sizes.layers, sizes.hidden, sizes.ffn) == (samples.LAYERS, samples.HIDDEN, samples.FFN)
    assert (sizes.heads, sizes.groups) == (samples.HEADS, samples.GROUPS)
    assert (sizes.head_dim, sizes.vocabulary) == (samples.HEAD_DIM, samples.VOCABULARY)
    scaling = samples.ROPE_SCALING | {"scale_factor": 32.0, "old_context_len": 256}
    assert (sizes.tied, sizes.rope_scaling) == (False, scaling)
    weights = [samples.weight(name, None, "gpu").numel() for name in samples.WHOLE_SHAPES]
    stacked = [samples.weight(name, 0, "gpu").numel() for name in samples.LAYER_SHAPES]
    assert told.parameters == sum(weights) + samples.LAYERS * sum(stacked)
    assert told.notes == ("1 tensors of optimizer state beside the weights",)


@pytest.mark.parametrize(
    "name",
    ["context/model.yaml", "weights/.metadata", "weights/metadata.json", "weights/__0_0.distcp"],
)
@pytest.mark.parametrize("gone", [True, False])
def test_missing_and_empty_files_are_named(checkpoint, name, gone):
    os.truncate(checkpoint / name, 0)
    if gone:
        (checkpoint / name).unlink()
    with pytest.raises(DamagedCheckpoint, match=name.rpartition("/")[2]):
        nemo2.read(checkpoint)


def test_a_cut_off_shard(checkpoint):
    shard = checkpoint / "weights" / "__0_1.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DamagedCheckpoint, match=r"__0_1\.distcp has .* cut off"):
        nemo2.read(checkpoint)


def test_an_index_cut_off_anywhere_or_with_a_flipped_byte(checkpoint):
    """It never escapes as another error."""
    index = checkpoint / "weights" / ".metadata"
    content = index.read_bytes()
    for length in range(0, len(content), 37):
        index.write_bytes(content[:length])
        with pytest.raises(WorkshopError, match=r"\.metadata"):
            nemo2.read(checkpoint)
    for position in range(0, len(content), 11):
        flipped = bytes([content[position] ^ 0x41])
        index.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            nemo2.read(checkpoint)
        except WorkshopError as error:
            assert "weights" in str(error)


def test_what_is_unfinished_or_zarr_is_named(checkpoint):
    backend = checkpoint / "weights" / "metadata.json"
    backend.write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(UnsupportedCheckpoint, match="zarr is deprecated"):
        nemo2.read(checkpoint)
    (checkpoint.parent / "gpu-unfinished").touch()
    with pytest.raises(DamagedCheckpoint, match="half-written"):
        nemo2.read(checkpoint)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("gpu/weights", "top directory: gpu$"),
        ("gpu/context", "top directory: gpu$"),
        ("gpu/context/nemo_tokenizer", "top directory: gpu$"),
        ("gpu/weights/__0_0.distcp", "top directory: gpu$"),
        ("", "holds 1.*: gpu"),
        ("gpu/nothing", "does not exist"),
    ],
)
def test_the_right_path_is_named(checkpoint, wrong, words):
    with pytest.raises(NotACheckpoint, match=words):
        nemo2.read(checkpoint.parent / wrong)


def rewrite(checkpoint: Path, change) -> None:
    index = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("relative_path", "../outside.distcp", UnsafeCheckpoint),
        ("relative_path", "/etc/passwd", UnsafeCheckpoint),
        ("relative_path", "a/../../outside.distcp", UnsafeCheckpoint),
        ("relative_path", "..\\outside", UnsafeCheckpoint),
        ("relative_path", "a\0b", UnsafeCheckpoint),
        ("offset", -1, DamagedCheckpoint),
        ("length", 2**70, DamagedCheckpoint),
        ("offset", 2**62, DamagedCheckpoint),
        ("offset", "0", DamagedCheckpoint),
        ("length", True, DamagedCheckpoint),
    ],
)
def test_senseless_places_and_those_outside_are_refused(checkpoint, field, value, error):
    (checkpoint / "outside.distcp").write_bytes(bytes(100_000))

    def change(index) -> None:
        for place in index.storage_data.values():
            setattr(place, field, value)

    rewrite(checkpoint, change)
    words = "outside the checkpoint" if error is UnsafeCheckpoint else ""
    with pytest.raises(error, match=words):
        nemo2.read(checkpoint)


def test_a_chunk_without_a_place(checkpoint):
    rewrite(checkpoint, lambda index: index.storage_data.pop(next(iter(index.storage_data))))
    with pytest.raises(DamagedCheckpoint, match="no place in any file"):
        nemo2.read(checkpoint)


def short(text: str) -> bytes:
    """Opcode SHORT_BINUNICODE: a string."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


SYSTEM = b"cposix\nsystem\n"
#: way -> pickle that would run a command that way, made from the opcodes of a tuple that holds the
#: command
HOSTILE = {
    "REDUCE": lambda command: SYSTEM + command + b"R.",
    "STACK_GLOBAL": lambda command: short("posix") + short("system") + b"\x93" + command + b"R.",
    "a name with dots": lambda command: (
        short("torch") + short("serialization.os.system") + b"\x93" + command + b"R."
    ),
    "INST": lambda command: b"(" + command[:-1] + b"iposix\nsystem\n.",
    "OBJ": lambda command: b"(" + SYSTEM + command[:-1] + b"o.",
    "NEWOBJ": lambda command: b"csubprocess\nPopen\n" + command + b"\x81.",
    "NEWOBJ_EX": lambda command: b"csubprocess\nPopen\n" + command + b"}\x92.",
    "eval": lambda command: b"cbuiltins\neval\n" + command + b"R.",
    "a method of an allowed class": lambda command: (
        short("torch") + short("Size.__new__") + b"\x93" + command + b"R."
    ),
    "a loader": lambda command: b"ctorch\nload\n" + command + b"R.",
    "inside a list": lambda command: b"]" + SYSTEM + command + b"Ra.",
    "as a state": lambda command: (
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81" + SYSTEM + command + b"Rb."
    ),
}


@pytest.mark.parametrize("way", HOSTILE)
def test_hostile_pickles_are_refused_and_not_run(checkpoint, way):
    marker = checkpoint.parent / "marker"
    content = b"\x80\x04" + HOSTILE[way](short(f"touch {marker}") + b"\x85")
    (checkpoint / "weights" / ".metadata").write_bytes(content)
    for read in (nemo2.read, identify):
        with pytest.raises(
            UnsafeCheckpoint, match=r"gpu/weights/\.metadata is a pickle that would call [\w.]+ "
        ):
            read(checkpoint)
    assert not marker.exists()
    if way in ("REDUCE", "STACK_GLOBAL", "INST", "OBJ"):
        pickle.loads(content)
        assert marker.exists(), "the sample has to be one that really runs"


def test_a_pickle_cannot_change_the_stand_ins(checkpoint):
    """BUILD with a pair sets attributes of whatever is on the stack, here of a class."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    content = b"\x80\x02" + name + b"N}X\x0c\x00\x00\x00__setstate__K\x01s\x86b."
    (checkpoint / "weights" / ".metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        nemo2.read(checkpoint)
    assert callable(restricted_pickle.Metadata.__setstate__)


def test_a_pickle_that_grows_is_refused():
    """torch.Size over and over a list would copy it each time."""
    content = b"\x80\x02ctorch\nSize\n(" + b"K\x01" * 1000 + b"l\x85R."
    with pytest.raises(DamagedCheckpoint, match="short tuple"):
        restricted_pickle.load_index(content, "x")


def test_a_large_index_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MAX_BYTES", 1000)
    with pytest.raises(DamagedCheckpoint, match="at most 1,000"):
        nemo2.read(checkpoint)


def test_yaml_tags_that_name_python_objects_are_refused(checkpoint):
    marker = checkpoint.parent / "marker"
    (checkpoint / "context" / "model.yaml").write_text(
        f"config: !!python/object/apply:os.system ['touch {marker}']\n"
    )
    with pytest.raises(UnsafeCheckpoint, match="python/object/apply"):
        nemo2.read(checkpoint)
    assert not marker.exists()


def test_a_yaml_that_grows_is_refused(checkpoint):
    lines = ["a0: &a0 {x: 1}", *(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}" for i in range(40))]
    (checkpoint / "context" / "model.yaml").write_text("\n".join(lines))
    with pytest.raises(DamagedCheckpoint, match="merge key"):
        nemo2.read(checkpoint)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "a: [1", "- 1\n- 2\n", "a: " + "9" * 10_000, "a: 1" + ":59" * 100_000],
)
def test_broken_yaml(checkpoint, content):
    (checkpoint / "context" / "model.yaml").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"model\.yaml"):
        nemo2.read(checkpoint)


MEMORY = """
import json, re, sys
from pathlib import Path
from workshop_utils.checkpoints.formats import torch_dist
index = torch_dist.read_directory(Path(sys.argv[1]))
# Not ru_maxrss: a child that pytest forked begins with that of pytest.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
chunks = sum(len(tensor.chunks) for tensor in index.tensors.values())
print(json.dumps([peak, chunks, len(index.objects)]))
"""


@pytest.mark.slow
def test_memory(tmp_path):
    """The index of a large model: 80 layers, 8-way tensor and 16-way pipeline parallel, 100,000
    chunks. Times are in benchmarks/."""
    samples.run(SYNTHETIC, tmp_path)
    command = [sys.executable, "-c", MEMORY, tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, chunks, objects = json.loads(done.stdout)
    assert (chunks, objects) == (100_000, 80)
    assert peak < 300, f"{peak} MiB"
