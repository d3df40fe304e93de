"""NeMo 1: archives and unpacked directories, whole models and adapters, parts that were not
merged."""

import shutil
import tarfile
from pathlib import Path

import export_samples
import pytest
import torch
import yaml
from export_samples import saved, tensors_of, write_adapter, write_tar

from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.values import read_tensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint

CONFIG = export_samples.config_of(export_samples.GQA) | {"nemo_version": "2.4.1"}
MODEL = {key: value for key, value in CONFIG.items() if key != "peft"} | {
    "normalization": "rmsnorm"
}
TEXT = yaml.safe_dump(CONFIG).encode()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def answers(found) -> dict:
    return {reader.name: (reader.answer, reader.how) for reader in loads_in(found)}


def model_state(rows: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "model.embedding.word_embeddings.weight": (rows, 32),
        "model.decoder.layers.0.self_attention.linear_qkv.weight": (64, 32),
        "model.decoder.layers.1.self_attention.linear_qkv.weight": (64, 32),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def unpacked(archive: Path) -> Path:
    with tarfile.open(archive) as opened:
        opened.extractall(archive.with_suffix(""))
    return archive.with_suffix("")


def test_a_full_model_and_its_values(root):
    state = model_state()
    members = {
        "model_config.yaml": yaml.safe_dump(MODEL).encode(),
        "model_weights.ckpt": saved(state),
    }
    found = identify(write_tar(root / "a.nemo", members))
    assert (found.format, found.version, found.adapter) == (
        "NeMo 1 archive (.nemo)",
        "NeMo 2.4.1",
        None,
    )
    assert (found.architecture.family, found.architecture.vocabulary) == ("Llama", 64)
    for tensor in found.tensors:
        assert torch.equal(torch.from_numpy(read_tensor(found, tensor).copy()), state[tensor.name])
    assert answers(found)["NeMo 2.0 API"] == (
        "after",
        "workshop convert a.nemo models/nemo2/a --to nemo2",
    )
    assert answers(found)["script path"] == (
        "yes",
        "workshop finetune model.restore_from_path=a.nemo",
    )


def test_a_model_that_was_trained_with_lora_settings_is_no_adapter(root):
    found = identify(write_adapter(root / "a.nemo", CONFIG, model_state()))
    assert (found.format, found.adapter) == ("NeMo 1 archive (.nemo)", None)


def test_the_unpacked_directory_says_the_same(root):
    archive = write_adapter(root / "a.nemo", CONFIG, tensors_of(export_samples.GQA))
    packed, directory = identify(archive), identify(unpacked(archive))
    assert directory.format == "NeMo 1 directory"
    assert (directory.adapter, directory.architecture, directory.version) == (
        packed.adapter,
        packed.architecture,
        packed.version,
    )
    assert {(t.name, t.shape, t.files[0]) for t in directory.tensors} == {
        (t.name, t.shape, t.files[0]) for t in packed.tensors
    }
    assert directory.folder == ""
    assert answers(directory)["PEFT"] == (
        "after",
        "tar -cf a.nemo -C a . && workshop export a.nemo --to hf-peft",
    )


def test_rank_and_targets_from_the_tensors_where_the_configuration_lacks_them(root):
    config = CONFIG | {"peft": {"peft_scheme": "lora", "lora_tuning": {"variant": "nemo"}}}
    adapter = identify(
        write_adapter(
            root / "a.nemo", config, tensors_of(export_samples.GQA, export_samples.ALL, rank=8)
        )
    ).adapter
    assert (adapter.rank, adapter.targets) == (
        8,
        ("attention_dense", "attention_qkv", "mlp_fc1", "mlp_fc2"),
    )
    adapter = identify(
        write_adapter(root / "b.nemo", {**CONFIG, "peft": None}, tensors_of(export_samples.GQA))
    ).adapter
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.base_is_here) == (
        4,
        None,
        ("attention_qkv",),
        False,
    )


def test_an_archive_under_another_name(root):
    archive = write_adapter(root / "a.nemo", CONFIG, tensors_of(export_samples.GQA))
    for name in ("model.tar", "checkpoint"):
        shutil.copy(archive, root / name)
        assert identify(root / name).format == "NeMo 1 archive (.nemo), LoRA adapter"


def test_gzip(root):
    archive = write_adapter(root / "plain.nemo", CONFIG, tensors_of(export_samples.GQA))
    with tarfile.open(root / "a.nemo", "w:gz") as packed, tarfile.open(archive) as opened:
        for entry in opened:
            packed.addfile(entry, opened.extractfile(entry) if entry.isfile() else None)
    found, plain = identify(root / "a.nemo"), identify(archive)
    assert (found.format, found.adapter) == (plain.format, plain.adapter)
    assert [(tensor.name, tensor.shape) for tensor in found.tensors] == [
        (tensor.name, tensor.shape) for tensor in plain.tensors
    ]


def parts(folders: list[str], config: dict = CONFIG, **changes: bytes) -> dict[str, bytes]:
    """Members of an archive that ranks wrote; every rank's B has half of the rows."""
    members = {"model_config.yaml": yaml.safe_dump(config).encode()}
    for number, folder in enumerate(folders):
        state = {
            name: tensor.chunk(2)[number % 2].clone() if "linear_out" in name else tensor
            for name, tensor in tensors_of(export_samples.GQA).items()
        }
        members[f"{folder}/model_weights.ckpt"] = saved(state)
    return members | changes


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        (["mp_rank_00", "mp_rank_01"], (2, 1)),
        (
            [
                "tp_rank_00_pp_rank_000",
                "tp_rank_01_pp_rank_000",
                "tp_rank_00_pp_rank_001",
                "tp_rank_01_pp_rank_001",
            ],
            (2, 2),
        ),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_parts_of_ranks(root, folders, sizes, packed):
    archive = write_tar(root / "a.nemo", parts(folders))
    found = identify(archive if packed else unpacked(archive))
    assert found.parallel == sizes
    assert f"{len(folders)} model-parallel ranks" in found.notes[0]
    assert {tensor.files[0] for tensor in found.tensors} == {
        f"{folder}/model_weights.ckpt" for folder in folders
    }
    out = [tensor for tensor in found.tensors if "linear_out" in tensor.name]
    assert {tensor.shape for tensor in out} == {(32, 4)}
    assert len(out) == 2 * len(folders)
    assert found.nbytes == sum(
        len(content) for name, content in parts(folders).items() if name.endswith("ckpt")
    )
    answer, how = answers(found)["script path"]
    assert answer == "yes"
    assert (
        f"model.tensor_model_parallel_size={sizes[0]} model.pipeline_model_parallel_size={sizes[1]}"
        in how
    )
    # workshop export puts the parts together.
    assert answers(found)["vLLM"][0] == "after"
    assert "--to hf-peft" in answers(found)["vLLM"][1]


def test_the_vocabulary_is_split_over_the_ranks(root):
    members = {"model_config.yaml": yaml.safe_dump(MODEL).encode()}
    members |= {
        f"mp_rank_{rank:02d}/model_weights.ckpt": saved(model_state(rows=32)) for rank in range(2)
    }
    found = identify(write_tar(root / "a.nemo", members))
    assert (found.adapter, found.architecture.vocabulary, found.parallel) == (None, 64, (2, 1))


def test_a_missing_part_is_named(root):
    with pytest.raises(DamagedCheckpoint, match="lacks the part of tensor-parallel rank 1"):
        identify(write_tar(root / "a.nemo", parts(["mp_rank_00", "mp_rank_02"])))
    with pytest.raises(DamagedCheckpoint, match="lacks the part of tensor-parallel rank 1"):
        identify(
            write_tar(
                root / "b.nemo", parts(["mp_rank_00"], CONFIG | {"tensor_model_parallel_size": 2})
            )
        )
    faults = []
    found = identify(root / "b.nemo", faults.append)
    assert len(faults) == 1
    assert found.tensors
    with pytest.raises(DamagedCheckpoint, match="claims parallel sizes"):
        identify(write_tar(root / "c.nemo", parts(["mp_rank_00", "mp_rank_99999999"])))


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_code_in_one_part_is_not_run(root):
    members = parts(["mp_rank_00", "mp_rank_01"]) | {
        "mp_rank_01/model_weights.ckpt": saved({"a": Evil()})
    }
    with pytest.raises(UnsafeCheckpoint, match=r"mp_rank_01/model_weights\.ckpt.*exec"):
        identify(write_tar(root / "a.nemo", members))


def test_no_weights(root):
    with pytest.raises(DamagedCheckpoint, match="has no weights"):
        identify(write_tar(root / "a.nemo", {"model_config.yaml": TEXT}))


@pytest.mark.parametrize("packed", [True, False])
def test_sharded_weights(root, originals, packed):
    directory = root / "a"
    shutil.copytree(originals / "gpu" / "weights", directory / "model_weights")
    (directory / "model_config.yaml").write_text(yaml.safe_dump(MODEL))
    if packed:
        with tarfile.open(root / "a.nemo", "w") as archive:
            archive.add(directory, "./")
    found, source = identify(root / "a.nemo" if packed else directory), identify(originals / "gpu")
    assert {tensor.name for tensor in found.tensors} == {tensor.name for tensor in source.tensors}
    name = "module.decoder.layers.mlp.linear_fc1.weight"
    ours, theirs = (
        next(tensor for tensor in checkpoint.tensors if tensor.name == name)
        for checkpoint in (found, source)
    )
    assert (read_tensor(found, ours) == read_tensor(source, theirs)).all()
    assert found.architecture.vocabulary == source.architecture.vocabulary
