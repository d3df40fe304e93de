"""Values read without torch are those that torch reads."""

import shutil

import checkpoint_samples as samples
import numpy
import pytest
from reading import tensor_of
from safetensors.numpy import save_file

from workshop_utils.checkpoints.formats import values
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import DamagedCheckpoint


@pytest.mark.parametrize("flavour", ["plain", "gpu"])
def test_every_tensor_of_a_distributed_checkpoint(originals, flavour):
    checkpoint = identify(originals / flavour)
    for tensor in checkpoint.tensors:
        stacked = ".layers." in tensor.name
        name = tensor.name.removeprefix("module.decoder.layers." if stacked else "module.")
        whole = values.read_tensor(checkpoint, tensor)
        assert whole.shape == tensor.shape
        for layer in range(samples.LAYERS) if stacked else (None,):
            weight = samples.weight(name, layer, flavour).float().numpy()
            for held in (
                whole if layer is None else whole[layer],
                values.read_tensor(checkpoint, tensor, layer),
            ):
                numpy.testing.assert_array_equal(held.astype("float32"), weight)


def test_one_layer_reads_only_its_bytes(originals, monkeypatch):
    checkpoint = identify(originals / "plain")
    tensor = tensor_of(checkpoint, "module.decoder.layers.mlp.linear_fc1.weight")
    read, genuine = [], values.read_chunk

    def read_chunk(checkpoint, tensor, chunk):
        read.append(chunk.offsets[0])
        return genuine(checkpoint, tensor, chunk)

    monkeypatch.setattr(values, "read_chunk", read_chunk)
    values.read_tensor(checkpoint, tensor, 1)
    assert read == [1]


def test_safetensors(tmp_path):
    weights = {"a": numpy.arange(6, dtype="float32").reshape(2, 3), "b": numpy.ones(4, "int64")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = identify(tmp_path)
    for tensor in checkpoint.tensors:
        held = values.read_tensor(checkpoint, tensor)
        numpy.testing.assert_array_equal(held, weights[tensor.name])


def test_a_damaged_chunk_is_named(originals, tmp_path):
    path = shutil.copytree(originals / "plain", tmp_path / "plain")
    checkpoint = identify(path)
    tensor = tensor_of(checkpoint, "module.decoder.final_layernorm.weight")
    (chunk,) = tensor.chunks
    with (path / "weights" / chunk.file).open("r+b") as file:
        file.seek(chunk.start)
        file.write(bytes(chunk.length))
    with pytest.raises(DamagedCheckpoint, match=r"final_layernorm") as error:
        values.read_tensor(checkpoint, tensor)
    assert error.value.tensor == tensor.name
