"""Megatron-Core loads common.pt and the objects of a distributed checkpoint without restriction:
verify looks into each first."""

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from damage import Evil

from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.verify.verify import verify

NAME = "decoder.layers.self_attention.linear_qkv._extra_state"


def saved(value) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.fixture
def gpu(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(originals / "gpu", tmp_path / "gpu"))


def replace_object(weights: Path, content: bytes) -> str:
    """Put ``content`` behind the others of its file, as the object whose name ends with NAME; its
    name."""
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    index, place = next(
        (index, place) for index, place in metadata.storage_data.items() if NAME in index.fqn
    )
    with (weights / place.relative_path).open("ab") as file:
        place.offset = file.tell()
        place.length = file.write(content)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    return index.fqn


SOUND = {
    "nothing": None,
    "buffer": io.BytesIO(b""),
    "buffer with an archive": io.BytesIO(
        saved({"scale": torch.ones(2), "extra_fp8_variables": {"num_gemms": 3}})
    ),
    "bytes of a pickle": as_tensor(pickle.dumps({"recipe": None})),
}
HOSTILE = {
    "value": Evil(),
    "buffer with an archive": io.BytesIO(saved(Evil())),
    "buffer with a pickle": io.BytesIO(pickle.dumps(Evil())),
    "buffer with a pickle of protocol 0": io.BytesIO(pickle.dumps(Evil(), protocol=0)),
    "bytes of a pickle": as_tensor(pickle.dumps(Evil())),
}


@pytest.mark.parametrize("way", HOSTILE)
def test_an_object_that_would_run(gpu, way):
    name = replace_object(gpu / "weights", saved(HOSTILE[way]))
    [finding] = verify(gpu).refused
    assert finding.code is Code.UNSAFE
    assert name in finding.message
    assert "exec(" in finding.message


@pytest.mark.parametrize("way", SOUND)
def test_genuine_objects(gpu, way):
    replace_object(gpu / "weights", saved(SOUND[way]))
    assert verify(gpu).sound


@pytest.mark.parametrize("part", ["common.pt", "object", None])
def test_in_a_nemo_archive(gpu, tmp_path, part):
    shutil.move(gpu / "weights", gpu / "model_weights")
    target = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
    (gpu / "model_config.yaml").write_text(yaml.safe_dump({"target": target}))
    if part == "common.pt":
        torch.save({"a": Evil()}, gpu / "model_weights" / "common.pt")
    elif part:
        replace_object(gpu / "model_weights", saved(HOSTILE["value"]))
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        for name in ("model_config.yaml", "model_weights"):
            archive.add(gpu / name, name)
    findings = verify(tmp_path / "a.nemo").findings
    unsafe = [finding.message for finding in findings if finding.code is Code.UNSAFE]
    assert len(unsafe) == bool(part)
    for message in unsafe:
        assert ("exec(" in message and "model_weights" in message) or NAME in message
