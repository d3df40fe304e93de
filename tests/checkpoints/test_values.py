"""Values read without torch are those that torch reads."""

import shutil

import checkpoint_samples as samples
import numpy
import pytest
from safetensors.numpy import save_file

from workshop_utils.checkpoints.formats import values
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import DamagedCheckpoint


def tensors(checkpoint):
    return {tensor.name: tensor for tensor in checkpoint.tensors}


@pytest.mark.parametrize("flavour", ["plain", "gpu"])
def test_every_tensor_of_a_distributed_checkpoint(originals, flavour):
    checkpoint = identify(originals / flavour)
    for name, tensor in tensors(checkpoint).items():
        short = name.removeprefix("module.")
        found = values.read_tensor(checkpoint, tensor)
        assert found.shape == tensor.shape
        if ".layers." in name:
            short = short.removeprefix("decoder.layers.")
            for layer in range(samples.LAYERS):
                right = samples.weight(short, layer, flavour).float().numpy()
                numpy.testing.assert_array_equal(found[layer].astype("float32"), right)
                numpy.testing.assert_array_equal(
                    values.read_tensor(checkpoint, tensor, layer).astype("float32"), right
                )
        else:
            numpy.testing.assert_array_equal(
                found.astype("float32"), samples.weight(short, None, flavour).float().numpy()
            )


def test_one_layer_reads_only_its_bytes(originals, monkeypatch):
    checkpoint = identify(originals / "plain")
    tensor = tensors(checkpoint)["module.decoder.layers.mlp.linear_fc1.weight"]
    read = []
    genuine = values.read_chunk
    monkeypatch.setattr(
        values, "read_chunk", lambda c, t, chunk: read.append(chunk) or genuine(c, t, chunk)
    )
    values.read_tensor(checkpoint, tensor, 1)
    assert [chunk.offsets[0] for chunk in read] == [1]


def test_safetensors(tmp_path):
    weights = {"a": numpy.arange(6, dtype="float32").reshape(2, 3), "b": numpy.ones(4, "int64")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = identify(tmp_path)
    for name, tensor in tensors(checkpoint).items():
        numpy.testing.assert_array_equal(values.read_tensor(checkpoint, tensor), weights[name])


def test_a_damaged_chunk_is_named(originals, tmp_path):
    path = shutil.copytree(originals / "plain", tmp_path / "plain")
    checkpoint = identify(path)
    tensor = tensors(checkpoint)["module.decoder.final_layernorm.weight"]
    file = path / "weights" / tensor.chunks[0].file
    content = bytearray(file.read_bytes())
    start = tensor.chunks[0].start
    content[start : start + tensor.chunks[0].length] = bytes(tensor.chunks[0].length)
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"final_layernorm") as error:
        values.read_tensor(checkpoint, tensor)
    assert error.value.tensor == tensor.name
