"""Reading NeMo 2.0 directories and the pickles in them: what is there, what is missing, what is
hostile."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_samples as samples
import pytest

from workshop_utils.checkpoints.formats import nemo2, restricted_pickle
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
    WorkshopError,
)


@pytest.fixture
def checkpoint(originals, tmp_path, monkeypatch):
    """A copy of the checkpoint as a GPU writes it, to be damaged."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(originals / "gpu", tmp_path / "gpu"))


def test_tensors_and_their_places_are_those_that_torch_reads(checkpoint):
    from torch.distributed.checkpoint import FileSystemReader

    index = FileSystemReader(checkpoint / "weights").read_metadata()
    found = nemo2.read(checkpoint)
    names = {name for name, entry in index.state_dict_metadata.items() if hasattr(entry, "chunks")}
    assert set(found.tensors) == names
    assert set(found.objects) == set(index.state_dict_metadata) - names
    for tensor in found.tensors.values():
        entry = index.state_dict_metadata[tensor.name]
        assert (tensor.shape, f"torch.{tensor.dtype}") == (
            tuple(entry.size),
            str(entry.properties.dtype),
        )
        assert len(tensor.chunks) == len(entry.chunks)
        for chunk in tensor.chunks:
            place = next(
                p
                for k, p in index.storage_data.items()
                if k.fqn == tensor.name and tuple(k.offset) == chunk.offsets
            )
            assert (chunk.file, chunk.start, chunk.length) == (
                place.relative_path,
                place.offset,
                place.length,
            )


def test_a_chunk_can_be_read_from_its_bytes(checkpoint):
    import io

    import torch

    name = "mlp.linear_fc1.weight"
    chunk = nemo2.read(checkpoint).tensors[f"module.decoder.layers.{name}"].chunks[1]
    content = (checkpoint / "weights" / chunk.file).read_bytes()[
        chunk.start : chunk.start + chunk.length
    ]
    saved = torch.load(io.BytesIO(content), weights_only=True)
    assert torch.equal(saved.squeeze(0), samples.weight(name, chunk.offsets[0], "gpu"))


def test_the_summary(checkpoint):
    found = identify(checkpoint)
    assert found.format == "NeMo 2.0 directory (torch_dist)"
    sizes = found.architecture
    assert (
        sizes.layers,
        sizes.hidden,
        sizes.heads,
        sizes.groups,
        sizes.head_dim,
        sizes.ffn,
        sizes.vocabulary,
        sizes.tied,
    ) == (
        samples.LAYERS,
        samples.HIDDEN,
        samples.HEADS,
        samples.GROUPS,
        samples.HEAD_DIM,
        samples.FFN,
        samples.VOCABULARY,
        False,
    )
    assert sizes.rope_scaling == {
        "scale_factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "old_context_len": 256,
    }
    assert found.dtype == "bfloat16"
    weights = [samples.weight(name, None, "gpu").numel() for name in samples.WHOLE_SHAPES]
    weights += [
        samples.LAYERS * samples.weight(name, 0, "gpu").numel() for name in samples.LAYER_SHAPES
    ]
    assert found.parameters == sum(weights)
    assert found.notes == ("1 tensors of optimizer state beside the weights",)


def test_an_adapter(checkpoint):
    (checkpoint / "weights" / "adapter_metadata.json").write_text(
        '{"model_ckpt_path": "/gone/base"}'
    )
    found = identify(checkpoint)
    assert found.format.startswith("NeMo 2.0 adapter directory")
    assert (found.adapter.base, found.adapter.base_is_here) == ("/gone/base", False)


@pytest.mark.parametrize(
    "name",
    ["context/model.yaml", "weights/.metadata", "weights/metadata.json", "weights/__0_0.distcp"],
)
@pytest.mark.parametrize("gone", [True, False])
def test_missing_and_empty_files_are_named(checkpoint, name, gone):
    if gone:
        (checkpoint / name).unlink()
    else:
        os.truncate(checkpoint / name, 0)
    with pytest.raises(DamagedCheckpoint, match=name.rpartition("/")[2]):
        nemo2.read(checkpoint)


def test_a_cut_off_shard(checkpoint):
    shard = checkpoint / "weights" / "__0_1.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DamagedCheckpoint, match=r"__0_1\.distcp has .* cut off"):
        nemo2.read(checkpoint)


def test_an_index_cut_off_anywhere(checkpoint):
    index = checkpoint / "weights" / ".metadata"
    content = index.read_bytes()
    for length in range(0, len(content), 37):
        index.write_bytes(content[:length])
        with pytest.raises(WorkshopError, match=r"\.metadata"):
            nemo2.read(checkpoint)


def test_an_index_with_a_flipped_byte_never_escapes_as_another_error(checkpoint):
    index = checkpoint / "weights" / ".metadata"
    content = index.read_bytes()
    for position in range(0, len(content), 11):
        index.write_bytes(
            content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :]
        )
        try:
            nemo2.read(checkpoint)
        except WorkshopError as error:
            assert "weights" in str(error)


def test_an_unfinished_checkpoint(checkpoint):
    (checkpoint.parent / "gpu-unfinished").touch()
    with pytest.raises(DamagedCheckpoint, match="half-written"):
        nemo2.read(checkpoint)


def test_zarr_is_named(checkpoint):
    (checkpoint / "weights" / "metadata.json").write_text(
        '{"sharded_backend": "zarr", "sharded_backend_version": 1}'
    )
    with pytest.raises(UnsupportedCheckpoint, match="zarr is deprecated"):
        nemo2.read(checkpoint)


def test_the_right_path_is_named(checkpoint):
    for wrong in (
        "gpu/weights",
        "gpu/context",
        "gpu/context/nemo_tokenizer",
        "gpu/weights/__0_0.distcp",
    ):
        with pytest.raises(NotACheckpoint, match="top directory: gpu$"):
            nemo2.read(checkpoint.parent / wrong)
    with pytest.raises(NotACheckpoint, match="holds 1.*: gpu"):
        nemo2.read(checkpoint.parent)
    with pytest.raises(NotACheckpoint, match="does not exist"):
        nemo2.read(checkpoint / "nothing")


@pytest.mark.parametrize(
    "path", ["../outside.distcp", "/etc/passwd", "a/../../outside.distcp", "..\\outside", "a\0b"]
)
def test_a_place_outside_the_directory_is_refused(checkpoint, path):
    (checkpoint / "outside.distcp").write_bytes(bytes(100_000))
    rewrite(
        checkpoint,
        lambda index: [
            setattr(place, "relative_path", path) for place in index.storage_data.values()
        ],
    )
    with pytest.raises(UnsafeCheckpoint, match="outside the checkpoint"):
        nemo2.read(checkpoint)


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", -1), ("length", 2**70), ("offset", 2**62), ("offset", "0"), ("length", True)],
)
def test_senseless_byte_ranges_are_refused(checkpoint, field, value):
    rewrite(
        checkpoint,
        lambda index: [setattr(place, field, value) for place in index.storage_data.values()],
    )
    with pytest.raises(DamagedCheckpoint):
        nemo2.read(checkpoint)


def rewrite(checkpoint: Path, change) -> None:
    index = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


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


def test_neither_torch_nor_anything_else_heavy_is_imported(originals):
    code = (
        "import sys; from workshop_utils.checkpoints.formats.identify import identify; "
        "identify(sys.argv[1]);print(sorted({'torch', 'numpy', 'nemo', 'megatron', "
        "'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, originals / "gpu"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
