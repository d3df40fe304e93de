"""Staging: what NIM can read gets into the store whole, in place of an older one; what it cannot is
refused with the way out."""

import os
import shutil

import pytest
import torch
import yaml
from export_samples import (
    ALL,
    GQA,
    config_of,
    saved,
    tensors_of,
    tiny_llama,
    write_adapter,
    write_tar,
)

from workshop_utils.adapters.export import export
from workshop_utils.cli import main
from workshop_utils.core.errors import (
    ConformanceFailed,
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedAdapter,
    WorkshopError,
)
from workshop_utils.serving.nim import stage
from workshop_utils.serving.nim.store import names


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One adapter in each form, and another of rank 8."""
    folder = tmp_path_factory.mktemp("forms")
    source = write_adapter(folder / "tickets.nemo", config_of(GQA), tensors_of(GQA))
    other = write_adapter(
        folder / "other.nemo", config_of(GQA, ALL, rank=8), tensors_of(GQA, ALL, rank=8)
    )
    return {
        "raw": source,
        "nemo": export(source, "nemo", out=folder / "nemo"),
        "trtllm": export(source, "nemo", out=folder / "trtllm", reader="trtllm"),
        "peft": export(source, "hf-peft", out=folder / "peft"),
        "other": export(other, "hf-peft", out=folder / "other"),
    }


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_exactly_one_adapter_and_nothing_else_is_in_its_directory(forms, tmp_path):
    stage(forms["peft"], "a", tmp_path)
    stage(forms["nemo"], "b", tmp_path)
    assert sorted(contents(tmp_path)) == [
        "a/adapter_config.json",
        "a/adapter_model.safetensors",
        "b/b.nemo",
    ]
    assert contents(tmp_path)["b/b.nemo"] == forms["nemo"].read_bytes()
    assert names(tmp_path) == ["a", "b"]


def test_a_new_one_replaces_the_old_and_an_identical_one_is_left_alone(forms, tmp_path):
    assert stage(forms["peft"], "a", tmp_path).change == "added"
    before = (tmp_path / "a").stat().st_ino
    assert stage(forms["peft"], "a", tmp_path).change == "unchanged"
    assert (tmp_path / "a").stat().st_ino == before
    assert stage(forms["nemo"], "a", tmp_path).change == "replaced"
    assert list(contents(tmp_path)) == ["a/a.nemo"]
    assert stage(forms["other"], "a", tmp_path).change == "replaced"
    assert (
        contents(tmp_path)["a/adapter_model.safetensors"]
        == (forms["other"] / "adapter_model.safetensors").read_bytes()
    )


def test_one_byte_makes_another_adapter(forms, tmp_path):
    stage(forms["peft"], "a", tmp_path)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert stage(forms["peft"], "a", tmp_path).change == "replaced"


def test_an_interrupted_copy_leaves_the_old_adapter(forms, tmp_path, monkeypatch):
    stage(forms["nemo"], "a", tmp_path)
    before = contents(tmp_path)

    def stopped(source, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfile", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage(forms["peft"], "a", tmp_path)
    assert contents(tmp_path) == before


def test_what_was_not_staged_there_is_never_replaced(forms, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "b").write_text("a file")
    for name in "ab":
        with pytest.raises(WorkshopError, match="notes.txt|is a file"):
            stage(forms["peft"], name, tmp_path)
    assert contents(tmp_path) == {"a/notes.txt": b"mine", "b": b"a file"}
    with pytest.raises(WorkshopError, match="itself an adapter"):
        stage(forms["nemo"], "a", forms["peft"])


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "../up", "a/b", "a\\b", "/root", "a b", "a\n", "-rf", "ü", "x" * 129,
     "a:b", "a?"],
)  # fmt: skip
def test_a_name_is_a_directory_and_a_word_in_a_url(forms, tmp_path, name):
    with pytest.raises(WorkshopError, match="cannot be a model's id"):
        stage(forms["peft"], name, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_nim_1_is_given_what_nemo_wrote(forms, tmp_path):
    assert stage(forms["raw"], "a", tmp_path).warnings == ()
    (warning,) = stage(forms["trtllm"], "b", tmp_path).warnings
    assert warning.startswith("not known: it is in TensorRT-LLM's form")
    assert contents(tmp_path)["a/a.nemo"] == forms["raw"].read_bytes()


def test_nim_2_takes_no_nemo(forms, tmp_path):
    with pytest.raises(ConformanceFailed, match=r"this is a \.nemo\n.*--to hf-peft"):
        stage(forms["nemo"], "a", tmp_path, reader="nim2")
    assert not any(tmp_path.iterdir())


def test_a_download_of_links_is_staged_as_files(forms, tmp_path):
    """As the Hub's cache keeps them: names that are links to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in forms["peft"].iterdir():
        (snapshot / file.name).symlink_to(file)
    staged = stage(snapshot, "a", tmp_path / "store", reader="nim2")
    assert not any(file.is_symlink() for file in staged.path.iterdir())


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_a_nemo_2_adapter_is_refused_with_the_command_that_converts_it(tmp_path):
    from torch.distributed import checkpoint

    weights = tmp_path / "adapter" / "weights"
    name = "module.decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"
    checkpoint.save({name: torch.ones(2, 4, 32)}, checkpoint_id=weights, no_dist=True)
    (weights / "adapter_metadata.json").write_text("{}")
    convert = r"no server reads\n.*workshop export \S+adapter --to hf-peft"
    with pytest.raises(ConformanceFailed, match=convert):
        stage(tmp_path / "adapter", "a", tmp_path / "store")


def test_of_the_parts_of_several_ranks_nothing_is_known(tmp_path):
    """Both public readers of a .nemo break at them; NIM's pages do not speak of them."""
    config = config_of(GQA) | {"tensor_model_parallel_size": 2}
    members = {f"mp_rank_0{rank}/model_weights.ckpt": saved(tensors_of(GQA)) for rank in (0, 1)}
    source = write_tar(
        tmp_path / "two.nemo", {"model_config.yaml": yaml.safe_dump(config).encode()} | members
    )
    (warning,) = stage(source, "a", tmp_path / "store").warnings
    assert warning.startswith("not known: it holds the parts of 2 model-parallel ranks")
    with pytest.raises(ConformanceFailed, match="Hugging Face PEFT directory"):
        stage(source, "b", tmp_path / "store", reader="nim2")


def test_half_of_a_file_is_refused(forms, tmp_path):
    half = shutil.copytree(forms["peft"], tmp_path / "half")
    weights = half / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(DamagedCheckpoint):
        stage(half, "a", tmp_path / "store")
    weights.unlink()
    with pytest.raises((DamagedCheckpoint, NotACheckpoint)):
        stage(half, "a", tmp_path / "store")


def test_code_in_a_pickle_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    source = write_adapter(tmp_path / "bomb.nemo", config_of(GQA), {"a": Bomb()})
    with pytest.raises(UnsafeCheckpoint):
        stage(source, "a", tmp_path / "store")
    assert not (tmp_path / "exploded").exists()


def test_rank_and_base_are_warned_about(forms, tmp_path):
    (warning,) = stage(forms["other"], "a", tmp_path, max_rank=4).warnings
    assert "rank 8" in warning
    assert "--max-lora-rank 8" in warning
    (warning,) = stage(forms["peft"], "b", tmp_path, base="meta/llama-3.1-8b-instruct").warnings
    assert "tiny-llama" in warning
    assert "llama-3.1-8b-instruct" in warning
    assert stage(forms["peft"], "b", tmp_path, base="some/Tiny-Llama", max_rank=4).warnings == ()


def test_without_a_base_the_store_s_adapters_are_compared(forms, tmp_path):
    first = stage(forms["peft"], "a", tmp_path)
    assert (first.warnings, len(first.notes)) == ((), 1)
    assert "trained on tiny-llama" in first.notes[0] and "--base" in first.notes[0]
    assert stage(forms["peft"], "a", tmp_path).notes == first.notes  # itself is no other
    again = stage(forms["nemo"], "b", tmp_path)
    assert (again.warnings, again.notes) == ((), ())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.nemo").write_text("no archive")
    place = tmp_path.parent / "elsewhere"
    elsewhere = export(forms["raw"], "hf-peft", place, base_model="org/other-llama")
    staged = stage(elsewhere, "c", tmp_path)
    assert staged.notes == ()
    (warning,) = staged.warnings
    for words in ("other-llama", "a in this store on tiny-llama", "one base"):
        assert words in warning


@pytest.mark.parametrize("form", ["peft", "nemo"])
def test_another_dtype_than_the_base_s_is_warned_about(forms, tmp_path, form):
    model = tiny_llama(GQA)
    warnings = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tmp_path / str(dtype) / "tiny-llama"
        model.to(dtype).save_pretrained(base)
        warnings[dtype] = stage(forms[form], "a", tmp_path / "store", base=base).warnings
    assert warnings[torch.float32] == ()
    (warning,) = warnings[torch.bfloat16]
    assert "its weights are float32" in warning and "--dtype bfloat16" in warning


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 64), ("num_hidden_layers", 1)])
@pytest.mark.parametrize("form", ["peft", "nemo"])
def test_a_base_of_other_sizes_is_refused(forms, tmp_path, form, field, value):
    model, base = tiny_llama(GQA), tmp_path / "tiny-llama"
    model.save_pretrained(base)
    assert stage(forms[form], "a", tmp_path / "store", base=base).warnings == ()
    setattr(model.config, field, value)
    type(model)(model.config).save_pretrained(base)
    with pytest.raises(UnsupportedAdapter, match="Serve it on the model that it was trained on"):
        stage(forms[form], "c", tmp_path / "store", base=base)


def test_the_command_says_what_it_did(forms, tmp_path, capsys):
    words = ["nim", "stage", str(forms["other"]), "--name", "a", "--store", str(tmp_path)]
    assert main([*words, "--max-lora-rank", "4"]) == 0
    said = capsys.readouterr()
    assert "new" in said.out
    assert "rank 8" in said.err
    assert main(words) == 0
    assert "left as it is" in capsys.readouterr().out
    assert main(["nim", "stage", str(forms["peft"]), "--name", "a", "--store", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "replaces" in said.out
    assert "note: it was trained on tiny-llama; not compared" in said.err
    assert main(["nim", "stage", str(forms["raw"]), "--name", "a", "--store", str(tmp_path)]) == 0
    to_nim2 = ["nim", "stage", str(forms["raw"]), "--name", "b", "--reader", "nim2"]
    assert main([*to_nim2, "--store", str(tmp_path)]) == 1
    assert main([*words, "--max-lora-rank", "0"]) == 1
    assert "Traceback" not in capsys.readouterr().err
