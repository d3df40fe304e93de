"""NeMo 1: archives and unpacked directories, whole models and adapters, parts that were not
merged."""

import itertools
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from export_samples import ALL, GQA, config_of, saved, tensors_of, write_adapter, write_tar
from reading import Evil, answers, check_values, shapes, tensor_of

from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.values import read_tensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint

CONFIG = config_of(GQA) | {"nemo_version": "2.4.1"}
MODEL = {name: CONFIG[name] for name in CONFIG if name != "peft"} | {"normalization": "rmsnorm"}


def model_state(rows: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    qkv = "model.decoder.layers.{}.self_attention.linear_qkv.weight"
    sizes = {qkv.format(layer): (64, 32) for layer in range(2)}
    sizes["model.embedding.word_embeddings.weight"] = (rows, 32)
    return {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}


def unpacked(archive: Path) -> Path:
    with tarfile.open(archive) as opened:
        opened.extractall(archive.with_suffix(""))
    return archive.with_suffix("")


def test_a_full_model_and_its_values(root):
    checkpoint = identify(write_adapter(root / "a.nemo", MODEL, model_state()))
    assert (checkpoint.format, checkpoint.version) == ("NeMo 1 archive (.nemo)", "NeMo 2.4.1")
    assert checkpoint.adapter is None
    architecture = checkpoint.architecture
    assert (architecture.family, architecture.vocabulary) == ("Llama", 64)
    check_values(checkpoint, model_state())
    told = answers(checkpoint)
    convert = "workshop convert a.nemo models/nemo2/a --to nemo2"
    assert told["NeMo 2.0 API"] == ("after", convert)
    assert told["script path"] == ("yes", "workshop finetune model.restore_from_path=a.nemo")
    trained_with_lora = identify(write_adapter(root / "b.nemo", CONFIG, model_state()))
    assert trained_with_lora.format == "NeMo 1 archive (.nemo)"
    assert trained_with_lora.adapter is None


def test_the_unpacked_directory_and_other_packings_say_the_same(root):
    archive = write_adapter(root / "a.nemo", CONFIG, tensors_of(GQA))
    packed = identify(archive)
    assert packed.format == "NeMo 1 archive (.nemo), LoRA adapter"
    for name in ("model.tar", "checkpoint"):
        shutil.copy(archive, root / name)
    with tarfile.open(root / "gz.nemo", "w:gz") as gzip, tarfile.open(archive) as opened:
        for entry in opened:
            gzip.addfile(entry, opened.extractfile(entry) if entry.isfile() else None)
    for path in (root / "model.tar", root / "checkpoint", root / "gz.nemo", unpacked(archive)):
        other = identify(path)
        is_directory = path == root / "a"
        assert other.format == ("NeMo 1 directory" if is_directory else packed.format)
        assert (other.adapter, other.architecture) == (packed.adapter, packed.architecture)
        assert (other.version, other.folder) == (packed.version, "")
        named = ({(t.name, t.shape, t.files[0]) for t in each.tensors} for each in (other, packed))
        assert next(named) == next(named)
    export = "tar -cf a.nemo -C a . && workshop export a.nemo --to hf-peft"
    assert answers(other)["PEFT"] == ("after", export)


def test_rank_and_targets_from_the_tensors_where_the_configuration_lacks_them(root):
    config = CONFIG | {"peft": {"peft_scheme": "lora", "lora_tuning": {"variant": "nemo"}}}
    told = identify(write_adapter(root / "a.nemo", config, tensors_of(GQA, ALL, rank=8))).adapter
    assert told.rank == 8
    assert told.targets == ("attention_dense", "attention_qkv", "mlp_fc1", "mlp_fc2")
    config = CONFIG | {"peft": None}
    told = identify(write_adapter(root / "b.nemo", config, tensors_of(GQA))).adapter
    assert (told.rank, told.alpha, told.targets) == (4, None, ("attention_qkv",))
    assert told.base_is_here is False


def parts(folders: list[str], config: dict = CONFIG) -> dict[str, bytes]:
    """Members of an archive that ranks wrote; every rank's B has half of the rows."""
    members = {"model_config.yaml": yaml.safe_dump(config).encode()}
    for number, folder in enumerate(folders):
        state = tensors_of(GQA)
        for name in state:
            if "linear_out" in name:
                state[name] = state[name].chunk(2)[number % 2].clone()
        members[f"{folder}/model_weights.ckpt"] = saved(state)
    return members


TENSOR = ["mp_rank_00", "mp_rank_01"]
BOTH = [f"tp_rank_{t:02}_pp_rank_{p:03}" for p, t in itertools.product(range(2), range(2))]


@pytest.mark.parametrize(("folders", "sizes"), [(TENSOR, (2, 1)), (BOTH, (2, 2))])
@pytest.mark.parametrize("packed", [True, False])
def test_parts_of_ranks(root, folders, sizes, packed):
    members = parts(folders)
    archive = write_tar(root / "a.nemo", members)
    checkpoint = identify(archive if packed else unpacked(archive))
    assert checkpoint.parallel == sizes
    assert f"{len(folders)} model-parallel ranks" in checkpoint.notes[0]
    files = {f"{folder}/model_weights.ckpt" for folder in folders}
    assert {tensor.files[0] for tensor in checkpoint.tensors} == files
    out = [tensor.shape for tensor in checkpoint.tensors if "linear_out" in tensor.name]
    assert out == [(32, 4)] * 2 * len(folders)
    assert checkpoint.nbytes == sum(len(members[name]) for name in files)
    answer, how = answers(checkpoint)["script path"]
    model_parallel = [
        f"model.{name}_model_parallel_size={size}"
        for name, size in zip(("tensor", "pipeline"), sizes, strict=True)
    ]
    assert answer == "yes" and " ".join(model_parallel) in how
    # workshop export puts the parts together.
    answer, how = answers(checkpoint)["vLLM"]
    assert answer == "after" and "--to hf-peft" in how


def test_the_vocabulary_is_split_over_the_ranks(root):
    members = {"model_config.yaml": yaml.safe_dump(MODEL).encode()}
    members |= {f"{folder}/model_weights.ckpt": saved(model_state(rows=32)) for folder in TENSOR}
    checkpoint = identify(write_tar(root / "a.nemo", members))
    assert (checkpoint.architecture.vocabulary, checkpoint.parallel) == (64, (2, 1))
    assert checkpoint.adapter is None


def test_a_missing_part_is_named(root):
    lacks = "lacks the part of tensor-parallel rank 1"
    wide = CONFIG | {"tensor_model_parallel_size": 2}
    for members, words in (
        (parts(["mp_rank_00", "mp_rank_02"]), lacks),
        (parts(["mp_rank_00", "mp_rank_99999999"]), "claims parallel sizes"),
        ({"model_config.yaml": yaml.safe_dump(CONFIG).encode()}, "has no weights"),
        (parts(["mp_rank_00"], wide), lacks),
    ):
        with pytest.raises(DamagedCheckpoint, match=words):
            identify(write_tar(root / "a.nemo", members))
    faults = []
    assert identify(root / "a.nemo", faults.append).tensors
    assert len(faults) == 1


def test_code_in_one_part_is_not_run(root):
    members = parts(TENSOR) | {"mp_rank_01/model_weights.ckpt": saved({"a": Evil()})}
    with pytest.raises(UnsafeCheckpoint, match=r"mp_rank_01/model_weights\.ckpt.*exec"):
        identify(write_tar(root / "a.nemo", members))


@pytest.mark.parametrize("packed", [True, False])
def test_sharded_weights(root, originals, packed):
    directory = root / "a"
    shutil.copytree(originals / "gpu" / "weights", directory / "model_weights")
    (directory / "model_config.yaml").write_text(yaml.safe_dump(MODEL))
    if packed:
        with tarfile.open(root / "a.nemo", "w") as archive:
            archive.add(directory, "./")
    checkpoint = identify(root / "a.nemo" if packed else directory)
    source = identify(originals / "gpu")
    assert shapes(checkpoint.tensors) == shapes(source.tensors)
    name = "module.decoder.layers.mlp.linear_fc1.weight"
    ours, theirs = (read_tensor(held, tensor_of(held, name)) for held in (checkpoint, source))
    assert (ours == theirs).all()
    assert checkpoint.architecture.vocabulary == source.architecture.vocabulary
