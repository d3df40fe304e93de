"""Directories of Megatron-LM, Megatron-Bridge, zarr and NeMo 1's sharded trainings, all written by
Megatron-Core."""

import shutil
import tarfile
from pathlib import Path

import checkpoint_samples as samples
import megatron_samples
import pytest
import torch
import yaml
from reading import Evil, answers, shapes, tensor_of

from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.values import read_tensor
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)


@pytest.fixture(scope="session")
def saves(tmp_path_factory):
    directory = tmp_path_factory.mktemp("megatron")
    megatron_samples.make(directory)
    return directory


@pytest.fixture
def root(saves, root):
    return Path(shutil.copytree(saves, root / "saves"))


def check_model(checkpoint, prefix: str, scaled: bool = False) -> None:
    sizes, stated = checkpoint.architecture, samples.SIZES
    assert (sizes.layers, sizes.hidden) == (stated["num_layers"], stated["hidden_size"])
    assert (sizes.heads, sizes.groups, sizes.head_dim) == (4, 2, stated["kv_channels"])
    assert (sizes.ffn, sizes.vocabulary) == (samples.FFN, samples.VOCABULARY)
    assert (sizes.tied, sizes.rope_base, bool(sizes.rope_scaling)) == (False, 500000.0, scaled)
    assert (sizes.family, checkpoint.dtype) == ("Llama", "bfloat16")
    names = {f"decoder.layers.{name}" for name in samples.LAYER_SHAPES} | set(samples.WHOLE_SHAPES)
    assert set(shapes(checkpoint.tensors)) == {prefix + name for name in names}


def check_values(checkpoint, prefix: str, name: str, layer: int | None) -> None:
    values = read_tensor(checkpoint, tensor_of(checkpoint, prefix + name), layer=layer)
    expected = samples.weight(name, layer, "gpu").float()
    assert torch.equal(torch.from_numpy(values.astype("float32")), expected)


def test_megatron_lm(root):
    checkpoint = identify(root / "lm" / "iter_0000020")
    assert checkpoint.format == "Megatron checkpoint (iter_*) (Megatron-LM, torch_dist)"
    assert checkpoint.version == "torch_dist 1, checkpoint version 3.0"
    optimizer = "1 tensors of optimizer state beside the weights"
    assert checkpoint.notes == ("saved after iteration 20", optimizer)
    assert checkpoint.tokenizer == "HuggingFaceTokenizer: /somewhere/tokenizer"
    check_model(checkpoint, "")
    check_values(checkpoint, "decoder.layers.", "mlp.linear_fc1.weight", 1)
    convert = "workshop convert saves/lm/iter_0000020 models/nemo2/lm-iter_0000020 --to nemo2"
    assert answers(checkpoint)["NeMo 2.0 API"] == ("after", convert)


def test_megatron_bridge(root):
    path = root / "bridge" / "iter_0000005"
    checkpoint = identify(path)
    assert checkpoint.format == "Megatron checkpoint (iter_*) (Megatron-Bridge, torch_dist)"
    check_model(checkpoint, "", scaled=True)
    name = "HuggingFaceTokenizer: meta-llama/Llama-3.1-8B (a copy is in tokenizer/)"
    assert checkpoint.tokenizer == name
    assert answers(checkpoint)["Megatron-Bridge"][0] == "yes"
    assert "export_ckpt" in answers(checkpoint)["vLLM"][1]
    config = megatron_samples.run_config()
    config["model"]["init_method"] = {"_target_": "os.system", "_call_": True}
    (path / "run_config.yaml").write_text(yaml.safe_dump(config))
    assert any("model.init_method._target_: os.system" in note for note in identify(path).notes)


def test_an_adapter_of_megatron_bridge(root):
    checkpoint = identify(root / "adapter" / "iter_0000007")
    told = checkpoint.adapter
    assert (told.rank, told.alpha, told.targets) == (4, 8, ("linear_qkv",))
    assert (told.base, told.base_is_here) == ("/gone/base", False)
    assert "export_adapter_ckpt" in answers(checkpoint)["PEFT"][1]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_adapters_of_nemo2(root, kind):
    path = root / "nemo2" / kind
    checkpoint = identify(path)
    assert checkpoint.format == "NeMo 2.0 adapter directory (torch_dist)"
    told = checkpoint.adapter
    assert (told.rank, told.alpha, told.targets, told.variant) == (4, 8, ("linear_qkv",), kind)
    assert (told.base, told.base_is_here) == ("/gone/base", False)
    assert answers(checkpoint)["PEFT"][0] == "after"
    assert answers(checkpoint)["vLLM"][0] == ("after" if kind == "LoRA" else "no")
    described = path / "weights" / "adapter_metadata.json"
    described.write_text(f'{{"model_ckpt_path": "{root}"}}')
    assert answers(identify(path))["NeMo 2.0 API"][0] == "yes"


def test_zarr_is_named(root):
    with pytest.raises(UnsupportedCheckpoint, match=r"zarr is deprecated.*Megatron-Core 0\.13"):
        identify(root / "zarr")


@pytest.mark.parametrize("packed", [True, False])
def test_zarr_of_nemo1_is_named(root, packed):
    directory = root / "nemo1-zarr"
    shutil.copytree(root / "zarr" / "weights", directory / "model_weights")
    (directory / "model_config.yaml").write_text("num_layers: 2")
    if packed:
        with tarfile.open(root / "a.nemo", "w") as archive:
            archive.add(directory, "./")
    with pytest.raises(UnsupportedCheckpoint, match="model_weights.*zarr is deprecated"):
        identify(root / "a.nemo" if packed else directory)


def test_a_training_of_nemo1_with_sharded_weights(root):
    checkpoint = identify(root / "nemo1")
    assert checkpoint.format == "Lightning checkpoint (.ckpt) (sharded, torch_dist)"
    assert checkpoint.version == "Lightning 2.4.0"
    assert checkpoint.notes[0] == "saved in epoch 1, after step 30"


def test_the_old_form(root):
    path = root / "old" / "iter_0000003"
    checkpoint = identify(path)
    assert checkpoint.format == "Megatron checkpoint (iter_*) (Megatron-LM, torch)"
    assert checkpoint.parallel == (2, 1)
    files = [tensor.files[0] for tensor in checkpoint.tensors]
    assert files == [f"mp_rank_{rank:02d}/model_optim_rng.pt" for rank in range(2)]
    for rank, tensor in enumerate(checkpoint.tensors):
        assert tensor.name == "language_model.encoder.layers.0.mlp.dense_h_to_4h.weight"
        assert (read_tensor(checkpoint, tensor) == rank).all()
    assert checkpoint.architecture.layers == samples.LAYERS
    shutil.rmtree(path / "mp_rank_00")
    with pytest.raises(DamagedCheckpoint, match="some are missing"):
        identify(path)


def test_the_directory_of_the_run_names_the_save(root):
    tracker = root / "lm" / "latest_checkpointed_iteration.txt"
    for said, number in ((tracker.read_text(), 10), ("", 20), ("../../etc", 20)):
        tracker.write_text(said)
        with pytest.raises(NotACheckpoint, match=f"latest is saves/lm/iter_00000{number}"):
            identify(root / "lm")


@pytest.mark.parametrize(
    "top, part",
    [
        ("old/iter_0000003", "mp_rank_00"),
        ("old/iter_0000003", "mp_rank_00/model_optim_rng.pt"),
        ("lm/iter_0000010", "__0_0.distcp"),
        ("zarr", "weights"),
    ],
)
def test_parts_name_their_top(root, top, part):
    with pytest.raises(NotACheckpoint, match=f"Give its top directory: saves/{top}$"):
        identify(root / top / part)


def test_hostile_arguments_are_not_run(root):
    path = root / "lm" / "iter_0000010"
    torch.save({"args": Evil(), "iteration": 10}, path / "common.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"common\.pt.*exec"):
        identify(path)
    faults = []
    checkpoint = identify(path, faults.append)
    assert (len(faults), checkpoint.architecture) == (1, None)
    assert checkpoint.tensors
    # Nor does a broken one hide the weights.
    (path / "common.pt").write_bytes((path / "common.pt").read_bytes()[:-50])
    faults = []
    assert identify(path, faults.append).tensors
    assert any("common.pt" in str(fault) for fault in faults)


def test_weights_of_nemo2_without_their_context(root, originals):
    shutil.copytree(originals / "gpu" / "weights", root / "alone")
    with pytest.raises(DamagedCheckpoint, match="context/ .* missing beside it"):
        identify(root / "alone")
