"""Directories of Megatron-LM, Megatron-Bridge, zarr and NeMo 1's sharded trainings, all written by
Megatron-Core."""

import shutil
import tarfile
from pathlib import Path

import checkpoint_samples
import megatron_samples
import pytest
import torch
import yaml

from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.values import read_tensor
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint


@pytest.fixture(scope="session")
def saves(tmp_path_factory):
    directory = tmp_path_factory.mktemp("megatron")
    megatron_samples.make(directory)
    return directory


@pytest.fixture
def root(saves, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(saves, tmp_path / "saves"))


def answers(found) -> dict:
    return {reader.name: (reader.answer, reader.how) for reader in loads_in(found)}


def check_model(found, prefix: str, scaled: bool = False) -> None:
    sizes = found.architecture
    assert (
        sizes.family,
        sizes.layers,
        sizes.hidden,
        sizes.heads,
        sizes.groups,
        sizes.head_dim,
        sizes.ffn,
        sizes.vocabulary,
    ) == (
        "Llama",
        checkpoint_samples.LAYERS,
        checkpoint_samples.HIDDEN,
        checkpoint_samples.HEADS,
        checkpoint_samples.GROUPS,
        checkpoint_samples.HEAD_DIM,
        checkpoint_samples.FFN,
        checkpoint_samples.VOCABULARY,
    )
    assert (sizes.tied, sizes.rope_base, bool(sizes.rope_scaling)) == (False, 500000.0, scaled)
    names = {f"{prefix}decoder.layers.{name}" for name in checkpoint_samples.LAYER_SHAPES}
    assert {tensor.name for tensor in found.tensors} == names | {
        f"{prefix}{name}" for name in checkpoint_samples.WHOLE_SHAPES
    }
    assert found.dtype == "bfloat16"


def test_megatron_lm(root):
    found = identify(root / "lm" / "iter_0000020")
    assert found.format == "Megatron checkpoint (iter_*) (Megatron-LM, torch_dist)"
    assert found.version == "torch_dist 1, checkpoint version 3.0"
    assert found.notes == (
        "saved after iteration 20",
        "1 tensors of optimizer state beside the weights",
    )
    assert found.tokenizer == "HuggingFaceTokenizer: /somewhere/tokenizer"
    check_model(found, "")
    name = "decoder.layers.mlp.linear_fc1.weight"
    values = read_tensor(
        found, next(tensor for tensor in found.tensors if tensor.name == name), layer=1
    )
    wanted = checkpoint_samples.weight("mlp.linear_fc1.weight", 1, "gpu")
    assert torch.equal(torch.from_numpy(values.astype("float32")), wanted.float())
    convert = "workshop convert saves/lm/iter_0000020 models/nemo2/lm-iter_0000020 --to nemo2"
    assert answers(found)["NeMo 2.0 API"] == ("after", convert)


def test_megatron_bridge(root):
    found = identify(root / "bridge" / "iter_0000005")
    assert found.format == "Megatron checkpoint (iter_*) (Megatron-Bridge, torch_dist)"
    check_model(found, "", scaled=True)
    assert (
        found.tokenizer == "HuggingFaceTokenizer: meta-llama/Llama-3.1-8B (a copy is in tokenizer/)"
    )
    assert answers(found)["Megatron-Bridge"][0] == "yes"
    assert "export_ckpt" in answers(found)["vLLM"][1]


def test_an_adapter_of_megatron_bridge(root):
    found = identify(root / "adapter" / "iter_0000007")
    adapter = found.adapter
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.base, adapter.base_is_here) == (
        4,
        8,
        ("linear_qkv",),
        "/gone/base",
        False,
    )
    assert "export_adapter_ckpt" in answers(found)["PEFT"][1]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_adapters_of_nemo2(root, kind):
    found = identify(root / "nemo2" / kind)
    assert found.format == "NeMo 2.0 adapter directory (torch_dist)"
    adapter = found.adapter
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.variant) == (
        4,
        8,
        ("linear_qkv",),
        kind,
    )
    assert (adapter.base, adapter.base_is_here) == ("/gone/base", False)
    assert answers(found)["PEFT"][0] == ("after" if kind == "LoRA" else "no")
    base = root / "base"
    base.mkdir()
    (root / "nemo2" / kind / "weights" / "adapter_metadata.json").write_text(
        f'{{"model_ckpt_path": "{base}"}}'
    )
    assert answers(identify(root / "nemo2" / kind))["NeMo 2.0 API"][0] == "yes"


def test_names_that_a_configuration_would_import_are_noted(root):
    path = root / "bridge" / "iter_0000005"
    config = megatron_samples.run_config()
    config["model"]["init_method"] = {"_target_": "os.system", "_call_": True}
    (path / "run_config.yaml").write_text(yaml.safe_dump(config))
    assert any("model.init_method._target_: os.system" in note for note in identify(path).notes)


def test_zarr(root):
    found = identify(root / "zarr")
    assert found.format == "NeMo 2.0 directory (zarr)"
    assert any("zarr is deprecated" in note for note in found.notes)
    check_model(found, "module.", scaled=True)
    name = "output_layer.weight"
    values = read_tensor(
        found, next(tensor for tensor in found.tensors if tensor.name == f"module.{name}")
    )
    assert torch.equal(
        torch.from_numpy(values.astype("float32")),
        checkpoint_samples.weight(name, None, "gpu").float(),
    )
    assert [name for name, (answer, _) in answers(found).items() if answer == "yes"] == [
        "NeMo 2.0 API"
    ]
    (root / "zarr" / "weights" / "module.decoder.layers.mlp.linear_fc1.weight" / "1.0.0").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"mlp\.linear_fc1\.weight has 1 chunks of 2"):
        identify(root / "zarr")


@pytest.mark.parametrize("packed", [True, False])
def test_zarr_of_nemo1(root, packed):
    directory = root / "nemo1-zarr"
    shutil.copytree(root / "zarr" / "weights", directory / "model_weights")
    (directory / "model_config.yaml").write_text(
        yaml.safe_dump({"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4})
    )
    if packed:
        with tarfile.open(root / "a.nemo", "w") as archive:
            archive.add(directory, "./")
    found = identify(root / "a.nemo" if packed else directory)
    assert any("zarr is deprecated" in note for note in found.notes)
    name = "mlp.linear_fc1.weight"
    tensor = next(
        tensor for tensor in found.tensors if tensor.name == f"module.decoder.layers.{name}"
    )
    values = read_tensor(found, tensor, layer=1)
    assert torch.equal(
        torch.from_numpy(values.astype("float32")),
        checkpoint_samples.weight(name, 1, "gpu").float(),
    )


def test_a_training_of_nemo1_with_sharded_weights(root):
    found = identify(root / "nemo1")
    assert (found.format, found.version) == (
        "Lightning checkpoint (.ckpt) (sharded, torch_dist)",
        "Lightning 2.4.0",
    )
    assert found.notes[0] == "saved in epoch 1, after step 30"


def test_the_old_form(root):
    found = identify(root / "old" / "iter_0000003")
    assert (found.format, found.parallel) == (
        "Megatron checkpoint (iter_*) (Megatron-LM, torch)",
        (2, 1),
    )
    assert {tensor.files[0] for tensor in found.tensors} == {
        f"mp_rank_{rank:02d}/model_optim_rng.pt" for rank in range(2)
    }
    for tensor in found.tensors:
        rank = int(tensor.files[0][8:10])
        assert tensor.name == "language_model.encoder.layers.0.mlp.dense_h_to_4h.weight"
        assert (read_tensor(found, tensor) == rank).all()
    assert found.architecture.layers == checkpoint_samples.LAYERS
    shutil.rmtree(root / "old" / "iter_0000003" / "mp_rank_00")
    with pytest.raises(DamagedCheckpoint, match="some are missing"):
        identify(root / "old" / "iter_0000003")


def test_the_directory_of_the_run_names_the_save(root):
    with pytest.raises(NotACheckpoint, match="latest is saves/lm/iter_0000010"):
        identify(root / "lm")
    (root / "lm" / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(NotACheckpoint, match="latest is saves/lm/iter_0000020"):
        identify(root / "lm")
    (root / "lm" / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(NotACheckpoint, match="latest is saves/lm/iter_0000020"):
        identify(root / "lm")


def test_parts_name_their_top(root):
    for part in (
        "old/iter_0000003/mp_rank_00",
        "old/iter_0000003/mp_rank_00/model_optim_rng.pt",
        "lm/iter_0000010/__0_0.distcp",
        "zarr/weights",
    ):
        with pytest.raises(
            NotACheckpoint,
            match="Give its top directory: saves/(old/iter_0000003|lm/iter_0000010|zarr)$",
        ):
            identify(root / part)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_hostile_arguments_are_not_run(root):
    path = root / "lm" / "iter_0000010"
    torch.save({"args": Evil(), "iteration": 10}, path / "common.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"common\.pt.*exec"):
        identify(path)
    faults = []
    found = identify(path, faults.append)
    assert (len(faults), found.architecture) == (1, None)
    assert found.tensors


def test_broken_common_state_does_not_hide_the_weights(root):
    path = root / "lm" / "iter_0000010"
    (path / "common.pt").write_bytes((path / "common.pt").read_bytes()[:-50])
    faults = []
    assert identify(path, faults.append).tensors
    assert any("common.pt" in str(fault) for fault in faults)


def test_weights_of_nemo2_without_their_context(root, originals):
    shutil.copytree(originals / "gpu" / "weights", root / "alone")
    with pytest.raises(DamagedCheckpoint, match="context/ .* missing beside it"):
        identify(root / "alone")
