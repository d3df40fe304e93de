"""What torch.save writes, read without torch: byte ranges, Lightning checkpoints, Megatron-Core's
common.pt."""

import argparse
import collections
import gzip
import io
import pathlib

import hostile_files
import pytest
import torch

from workshop_utils.checkpoints.formats import nemo_archive, saved_tensors, torch_archive
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint


def saved(value: object) -> io.BytesIO:
    content = io.BytesIO()
    torch.save(value, content)
    return content


def elements(content: bytes, found: torch_archive.SavedTensor) -> torch.Tensor:
    """The tensor made of the bytes of the file, and of nothing else."""
    part = bytearray(content[found.start : found.start + found.length])
    return torch.frombuffer(part, dtype=getattr(torch, found.dtype)).reshape(found.shape)


def test_the_bytes_are_those_of_the_elements():
    base = torch.randn(6, 4)
    state = {
        "whole": base,
        "row": base[2],
        "rows": base[1:3],
        "scalar": torch.tensor(7),
        "half": torch.randn(5).to(torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "one wide": torch.randn(3, 1).T,
        "double": torch.randn(2, dtype=torch.float64),
        "tied": base,
    }
    file = saved(state)
    found = torch_archive.read_tensors(file, "x")
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert found[name].contiguous, name
        assert torch.equal(elements(file.getvalue(), found[name]), tensor.detach()), name
    assert found["tied"] == found["whole"]


@pytest.mark.parametrize(
    "name",
    [
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "uint16",
        "uint32",
        "complex64",
        "complex128",
    ],
)
def test_dtypes_that_are_stored_in_another_way(name):
    dtype = getattr(torch, name)
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    file = saved({"a": tensor, "row": tensor[1]})
    found = torch_archive.read_tensors(file, "x")
    assert [(part.shape, part.dtype) for part in found.values()] == [((3, 4), name), ((4,), name)]
    assert torch.equal(
        elements(file.getvalue(), found["row"]).view(torch.uint8), tensor[1].view(torch.uint8)
    )


def test_views_without_one_range_of_bytes():
    base = torch.randn(6, 4)
    state = {
        "turned": base.T,
        "columns": base[:, 1:3],
        "expanded": base[0].expand(3, 4),
        "every other": base[::2],
    }
    found = torch_archive.read_tensors(saved(state), "x")
    assert {
        name: (tensor.shape, tensor.contiguous, tensor.start) for name, tensor in found.items()
    } == {
        "turned": ((4, 6), False, None),
        "columns": ((6, 2), False, None),
        "expanded": ((3, 4), False, None),
        "every other": ((3, 4), False, None),
    }


def test_empty_tensors():
    found = torch_archive.read_tensors(
        saved({"a": torch.zeros(0, 3), "b": torch.zeros(3, 0).T}), "x"
    )
    assert [(tensor.shape, tensor.length) for tensor in found.values()] == [
        ((0, 3), 0),
        ((0, 3), 0),
    ]


def test_a_faulty_tensor_is_reported_and_the_others_are_read():
    content = saved({"good": torch.ones(4), "bad": torch.ones(8)}).getvalue()
    # The storage of the second, by another name.
    short = content.replace(b"archive/data/1", b"archive/data/9")
    faults = []
    found = torch_archive.read_tensors(io.BytesIO(short), "x", faults.append)
    assert list(found) == ["good"]
    assert [(type(fault), fault.tensor) for fault in faults] == [(DamagedCheckpoint, "bad")]
    assert "data/1, which is missing" in str(faults[0])
    with pytest.raises(DamagedCheckpoint, match="bad lies in data/1"):
        torch_archive.read_tensors(io.BytesIO(short), "x")


def test_a_faulty_tensor_that_is_the_whole_file():
    content = saved(torch.ones(4)).getvalue().replace(b"archive/data/0", b"archive/data/9")
    faults = []
    assert torch_archive.read_state(io.BytesIO(content), "x", faults.append) is None
    assert len(faults) == 1


def test_a_lightning_checkpoint():
    state = {"layer": torch.ones(2, 2), "nested": {"deeper": torch.zeros(3)}}
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "hyper_parameters": collections.OrderedDict(a=1),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups":
            [{"betas": (0.9, 0.98)}]}],
    }  # fmt: skip
    found = torch_archive.read_state(saved(checkpoint), "x")
    shapes = {
        tensor.name: tensor.shape for tensor in saved_tensors.tensors(found["state_dict"], "x")
    }
    assert shapes == {"layer": (2, 2), "nested.deeper": (3,)}
    assert (found["pytorch-lightning_version"], found["epoch"], found["hyper_parameters"]) == (
        "2.4.0",
        3,
        {"a": 1},
    )
    assert found["optimizer_states"][0]["state"][0]["exp_avg"].shape == (2,)
    assert found["optimizer_states"][0]["param_groups"] == [{"betas": (0.9, 0.98)}]


class Mine:
    def __reduce__(self):
        return print, ("executed",)


def test_a_foreign_name_is_reported_and_the_rest_is_read(capsys):
    faults = []
    found = torch_archive.read_state(
        saved({"state_dict": {"a": torch.ones(2)}, "mine": Mine()}), "x.ckpt", faults.append
    )
    assert list(found["state_dict"]) == ["a"]
    assert repr(found["mine"]) == "__builtin__.print(...)"
    assert [type(fault) for fault in faults] == [UnsafeCheckpoint]
    assert (
        "x.ckpt is a pickle that would call __builtin__.print when it is loaded "
        "(__builtin__.print('executed'))"
    ) in str(faults[0])
    assert capsys.readouterr().out == ""


def test_the_plain_values_of_a_state():
    import random

    import numpy
    from omegaconf import OmegaConf

    value = {
        "args": argparse.Namespace(layers=2, names=["a"], dtype=torch.bfloat16),
        "iteration": 10,
        "none": None,
        "bytes": b"x",
        "empty": b"",
        "set": {1},
        "size": torch.Size((1, 2)),
        "default": collections.defaultdict(list, a=[1]),
        "random": random.Random(1).getstate(),
    }
    odd = {
        "path": pathlib.PurePosixPath("/a"),
        "array": numpy.arange(3),
        "scalar": numpy.float32(1),
        "file": io.BytesIO(b"abc"),
        "config": OmegaConf.create({"a": [1]}),
        "device": torch.device("cpu"),
        "version": torch.__version__,
    }
    found = torch_archive.read_state(saved(value | odd), "x")
    assert found["args"] == {"layers": 2, "names": ["a"], "dtype": "torch.bfloat16"}
    assert {name: found[name] for name in value if name not in ("args", "set", "random")} == {
        "iteration": 10,
        "none": None,
        "bytes": b"x",
        "empty": b"",
        "size": (1, 2),
        "default": {"a": [1]},
    }
    assert found["set"] == [1]
    assert found["random"] == value["random"]
    assert all(isinstance(found[name], torch_archive.Named) for name in odd)
    assert repr(found["device"]) == "torch.device('cpu')"


def test_the_common_state_of_megatron(originals):
    """As Megatron-Core wrote it: what is not sharded."""
    with (originals / "gpu" / "weights" / "common.pt").open("rb") as file:
        assert torch_archive.read_state(file, "x")["global_step"] == 10


def test_enumerations_of_megatron():
    from megatron.core.transformer.enums import AttnBackend

    found = torch_archive.read_state(saved({"backend": AttnBackend.fused}), "x")
    by_value, by_name = (
        f"({AttnBackend.fused.value})",
        ".fused",
    )  # Python 3.11.0 to 3.11.4 write the name
    assert repr(found["backend"]).removeprefix("megatron.core.transformer.enums.AttnBackend") in (
        by_value,
        by_name,
    )


def test_weights_in_an_archive_compressed_with_gzip(tmp_path):
    plain = hostile_files.tar(
        ("./model_config.yaml", b"a: 1\n"),
        ("./model_weights.ckpt", saved({"a": torch.arange(9.0)}).getvalue()),
    )
    path = tmp_path / "a.nemo"
    path.write_bytes(gzip.compress(plain))
    with nemo_archive.open_member(path, "model_weights.ckpt") as file:
        found = torch_archive.read_tensors(file, "x")["a"]
        file.seek(found.start)
        assert torch.equal(
            torch.frombuffer(bytearray(file.read(found.length)), dtype=torch.float32),
            torch.arange(9.0),
        )


def test_zeros_may_compress_well(tmp_path):
    """A ratio that would be a bomb's, of a file that is small all the same."""
    path = tmp_path / "a.nemo"
    path.write_bytes(
        gzip.compress(
            hostile_files.tar(
                ("model_config.yaml", b"a: 1\n"), ("model_weights.ckpt", bytes(30_000_000))
            )
        )
    )
    assert nemo_archive.members(path)[1].size == 30_000_000
