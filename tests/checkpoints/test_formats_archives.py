"""``.nemo`` archives, the files of torch.save, Hugging Face directories, and ``workshop inspect``
on all of them."""

import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import export_samples
import pytest
import yaml

from workshop_utils.adapters import record as export_record
from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.checkpoints.convert.bridge import bridge
from workshop_utils.checkpoints.formats import huggingface, nemo_archive, torch_archive
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.cli import main
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
    WorkshopError,
)

CONFIG = export_samples.config_of(export_samples.GQA)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def saved(state: dict) -> bytes:
    import torch

    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def adapter_state() -> dict:
    import torch

    key = "model.decoder.layers.{}.self_attention.adapter_layer.lora_kqv_adapter.{}.weight"
    return {
        key.format(layer, half): torch.ones(4, 32)
        for layer in range(2)
        for half in ("linear_in", "linear_out")
    }


def tar(path: Path, *entries: tarfile.TarInfo | tuple[str, bytes], **options) -> Path:
    with tarfile.open(
        path, options.get("mode", "w"), format=options.get("format", tarfile.GNU_FORMAT)
    ) as archive:
        for entry in entries:
            if isinstance(entry, tuple):
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
            else:
                archive.addfile(entry)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


TEXT = yaml.safe_dump(CONFIG).encode()
GOOD = (("model_config.yaml", TEXT), ("model_weights.ckpt", b"weights"))


def test_what_is_written_is_read_back_and_always_the_same(root):
    path = nemo_archive.write(root / "a.nemo", CONFIG, b"weights")
    assert nemo_archive.read_config(path) == CONFIG
    assert nemo_archive.read_member(path, "model_weights.ckpt") == b"weights"
    assert [member.stored_name for member in nemo_archive.members(path)] == [
        "model_config.yaml",
        "model_weights.ckpt",
    ]
    again = nemo_archive.write(root / "b.nemo", CONFIG, b"weights")
    assert again.read_bytes() == path.read_bytes()
    with tarfile.open(path, "r:") as archive:
        assert {(entry.type, entry.mtime, entry.uname) for entry in archive} == {
            (tarfile.REGTYPE, 0, "")
        }


def test_nothing_is_left_when_writing_fails(root):
    with pytest.raises(yaml.YAMLError):
        nemo_archive.write(root / "a.nemo", {"a": object()}, b"")
    assert list(root.iterdir()) == []


def test_the_names_that_nemo_writes(root):
    path = tar(
        root / "a.nemo",
        special("./", tarfile.DIRTYPE),
        *((f"./{name}", content) for name, content in GOOD),
    )
    assert nemo_archive.read_config(path) == CONFIG
    assert [member.stored_name for member in nemo_archive.members(path)] == [
        "./model_config.yaml",
        "./model_weights.ckpt",
    ]
    with nemo_archive.open_member(path, "model_weights.ckpt") as file:
        assert file.read() == b"weights"


@pytest.mark.parametrize(
    "entry",
    [
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.LNKTYPE, "model_config.yaml"),
        special("device", tarfile.CHRTYPE),
        special("device", tarfile.BLKTYPE),
        special("pipe", tarfile.FIFOTYPE),
        ("../outside", b"x"),
        ("a/../../outside", b"x"),
        ("/absolute", b"x"),
        ("..\\outside", b"x"),
        ("model_config.yaml", b"other: 1"),
        ("./model_config.yaml", b"other: 1"),
        (".//model_config.yaml", b"other: 1"),
        special("model_weights.ckpt", tarfile.DIRTYPE),
    ],
)
def test_hostile_entries_are_refused(root, entry):
    path = tar(root / "a.nemo", *GOOD, entry)
    for read in (nemo_archive.members, nemo_archive.read_config, identify):
        with pytest.raises(UnsafeCheckpoint, match=r"a\.nemo"):
            read(path)


def test_gzip_and_other_files(root):
    compressed = tar(root / "a.nemo", *GOOD, mode="w:gz")
    assert nemo_archive.read_member(compressed, "model_weights.ckpt") == b"weights"
    assert nemo_archive.is_compressed(compressed)
    for content in (b"", b"not a tar", bytes(3000), b"\xff" * 5000):
        (root / "b.nemo").write_bytes(content)
        with pytest.raises(NotACheckpoint, match=r"b\.nemo"):
            nemo_archive.members(root / "b.nemo")
    with pytest.raises(NotACheckpoint, match="is a directory"):
        nemo_archive.members(root)
    with pytest.raises(DamagedCheckpoint, match=r"has no model_config\.yaml"):
        nemo_archive.read_config(tar(root / "c.nemo", GOOD[1]))


def test_an_archive_cut_off_anywhere(root):
    whole = nemo_archive.write(root / "a.nemo", CONFIG, saved(adapter_state())).read_bytes()
    end = whole.rstrip(b"\0").__len__()
    for length in range(0, end, 997):
        (root / "b.nemo").write_bytes(whole[:length])
        with pytest.raises(WorkshopError, match=r"b\.nemo"):
            identify(root / "b.nemo")


def test_an_entry_with_a_negative_size_ends(root):
    """The size field in base 256 may be negative; a loop that trusts it never ends
    (CVE-2025-8194)."""
    content = bytearray(tar(root / "a.nemo", *GOOD).read_bytes())
    header = bytearray(content[:512])
    header[124:136] = b"\xff" + (2**88 - 1024).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (root / "b.nemo").write_bytes(bytes(header) + content[512:])
    with pytest.raises(WorkshopError, match=r"b\.nemo"):
        nemo_archive.members(root / "b.nemo")


def test_members_that_are_too_large_are_not_read(root):
    path = nemo_archive.write(root / "a.nemo", CONFIG, b"x" * 1000)
    with pytest.raises(DamagedCheckpoint, match="at most 999"):
        nemo_archive.read_member(path, "model_weights.ckpt", max_bytes=999)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_tensors_of_torch_save(dtype):
    import torch

    state = {
        "a": torch.zeros(3, 2).to(getattr(torch, dtype)),
        "b": torch.nn.Parameter(torch.zeros(5)),
        "step": 3,
    }
    found = torch_archive.read_tensors(io.BytesIO(saved(state)), "x")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        "a": ((3, 2), dtype),
        "b": ((5,), "float32"),
    }


def test_a_state_dict_of_a_module():
    import torch

    found = torch_archive.read_tensors(io.BytesIO(saved(torch.nn.Linear(2, 3).state_dict())), "x")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "weight": (3, 2),
        "bias": (3,),
    }


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_code_in_the_weights_is_not_run(root):
    path = nemo_archive.write(root / "a.nemo", CONFIG, saved({"a": Evil()}))
    with pytest.raises(
        UnsafeCheckpoint, match=r"model_weights\.ckpt is a pickle that would call __builtin__\.exec"
    ):
        identify(path)


def test_the_format_before_zip_and_other_bytes():
    import torch

    old = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"before 1\.6"):
        torch_archive.read_tensors(old, "x")
    for content in (b"", b"junk" * 100, saved({"a": torch.zeros(2)})[:-30]):
        with pytest.raises(DamagedCheckpoint):
            torch_archive.read_tensors(io.BytesIO(content), "x")


def answers(found) -> dict:
    return {reader.name: (reader.answer, reader.how) for reader in loads_in(found)}


def test_an_adapter_of_the_script_path(root):
    found = identify(nemo_archive.write(root / "a.nemo", CONFIG, saved(adapter_state())))
    assert found.format == "NeMo 1 archive (.nemo), LoRA adapter"
    assert (found.adapter.rank, found.adapter.alpha, found.adapter.targets) == (
        4,
        8,
        ("attention_qkv",),
    )
    assert (found.adapter.base, found.adapter.base_is_here) == (
        "/somewhere/models/bridged/tiny-llama",
        False,
    )
    assert found.parameters == 4 * 4 * 32
    assert answers(found)["PEFT"] == ("after", "workshop export a.nemo --to hf-peft")
    assert answers(found)["TensorRT-LLM"] == ("after", "workshop export a.nemo --to nemo")


def test_an_export_names_its_reader(root):
    reader = export_record.READERS["nemo", "trtllm"]
    config = export_samples.config_of(export_samples.GQA, alpha=4)
    config["workshop"] = {"reader": reader, "qkv_order": "qkv", "alpha_baked_in": True}
    found = identify(nemo_archive.write(root / "a.nemo", config, saved(adapter_state())))
    assert found.made_for == reader
    assert {name for name, (answer, _) in answers(found).items() if answer == "yes"} == {
        "TensorRT-LLM",
        "NIM 1.x",
    }
    assert "for TensorRT-LLM" in answers(found)["script path"][1]
    assert found.notes == ("q, k, v rows: qkv; alpha baked in: True",)


def test_a_full_model_with_sharded_weights_in_the_archive(root, originals):
    config = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    shutil.copytree(originals / "plain" / "weights", root / "model_weights")
    with tarfile.open(root / "a.nemo", "w") as archive:
        archive.add(root / "model_weights", "./model_weights")
        content = yaml.safe_dump(config).encode()
        entry = tarfile.TarInfo("./model_config.yaml")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    found = identify(root / "a.nemo")
    assert (found.format, found.adapter, len(found.tensors)) == ("NeMo 1 archive (.nemo)", None, 8)


def test_a_bridged_view(root, originals):
    checkpoint = shutil.copytree(originals / "gpu", root / "models" / "nemo2" / "gpu")
    found, source = identify(bridge(checkpoint)), identify(checkpoint)
    assert found.format == "bridged view of a NeMo 2.0 directory"
    assert found.architecture == source.architecture
    assert (found.parameters, found.dtype) == (source.parameters, "bfloat16")
    assert found.notes == ("a view of the NeMo 2.0 checkpoint models/nemo2/gpu",)
    (checkpoint / "weights" / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="__0_0"):
        identify(root / "models" / "bridged" / "gpu")


@pytest.fixture
def hf_model(root):
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling=scaling,
        rope_theta=5000.0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "hf")
    return root / "hf", model


def test_a_hugging_face_model(hf_model):
    path, model = hf_model
    found = identify(path)
    assert found.format == "Hugging Face model directory (llama)"
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    }
    assert found.parameters == model.num_parameters()
    sizes = found.architecture
    assert (
        sizes.layers,
        sizes.groups,
        sizes.head_dim,
        sizes.ffn,
        sizes.vocabulary,
        sizes.tied,
    ) == (2, 2, 8, 48, 64, False)
    assert sizes.rope_scaling == {
        "scale_factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "old_context_len": 64,
    }


def test_a_sharded_hugging_face_model(hf_model):
    path, model = hf_model
    model.save_pretrained(path.parent / "parts", max_shard_size="10KB")
    found = identify(path.parent / "parts")
    assert found.parameters == model.num_parameters()
    assert len({tensor.files[0] for tensor in found.tensors}) > 1
    part = path.parent / "parts" / found.tensors[0].files[0]
    part.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{part.name} is missing"):
        identify(path.parent / "parts")
    index = path.parent / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../hf/model.safetensors"}}))
    with pytest.raises(UnsafeCheckpoint, match="no file beside it"):
        identify(path.parent / "parts")


def test_a_model_saved_with_torch(hf_model):
    path, model = hf_model
    model.save_pretrained(path.parent / "bin", safe_serialization=False)
    found = identify(path.parent / "bin")
    assert found.parameters == model.num_parameters()


def test_damaged_safetensors(hf_model):
    path, _ = hf_model
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for content in (
        b"",
        whole[:5],
        whole[:100],
        whole[:-1],
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 3) + b"[1]",
    ):
        file.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors"):
            huggingface.read_safetensors(file)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DamagedCheckpoint, match="needs 8"):
        huggingface.read_safetensors(file)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="has no weights"):
        identify(path)


def test_a_peft_adapter(hf_model):
    from peft import LoraConfig, get_peft_model

    path, model = hf_model
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(path)
    adapted.save_pretrained(path.parent / "adapter")
    found = identify(path.parent / "adapter")
    assert found.format == "Hugging Face PEFT adapter directory (LORA)"
    assert (found.adapter.rank, found.adapter.alpha, found.adapter.targets) == (
        4,
        8,
        ("q_proj", "v_proj"),
    )
    assert (found.adapter.base, found.adapter.base_is_here) == (str(path), True)
    assert found.parameters == 2 * (4 * (32 + 32) + 4 * (32 + 16))


def test_the_command(root, hf_model, capsys):
    path, model = hf_model
    assert main(["inspect", str(path), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "2 layers, hidden 32, FFN 48" in printed
    assert (
        "model.embed_tokens.weight  float32  [64, 32]  8,192 bytes\n    model.safetensors  byte "
        in printed
    )
    assert main(["inspect", str(path), "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["parameters"], found["dtype"]) == (
        "hf",
        model.num_parameters(),
        "float32",
    )
    assert found["tensors"][0].keys() == {"name", "shape", "dtype", "chunks", "packed", "bytes"}
    assert sum(sum(cells.values()) for cells in found["shards"].values()) == sum(
        tensor["bytes"] for tensor in found["tensors"]
    )
    assert main(["inspect", str(path), "--shards"]) == 0
    assert "All 2 layers are in one file." in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", ["nothing", "hf/config.json", ".", "empty", "text.txt", "cut.nemo"]
)
def test_the_command_on_what_is_no_checkpoint(root, hf_model, capsys, wrong):
    (root / "empty").mkdir()
    (root / "text.txt").write_text("hello")
    (root / "cut.nemo").write_bytes(b"x" * 600)
    assert main(["inspect", str(root / wrong)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    if wrong == "hf/config.json":
        assert "Give its top directory: hf" in captured.err
    if wrong == ".":
        assert "Give one of them: " in captured.err
