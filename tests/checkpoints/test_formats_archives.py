"""``.nemo`` archives, the files of torch.save, and ``workshop inspect`` on several formats."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import export_samples
import pytest
import torch
import yaml
from export_samples import saved
from reading import Evil, answers, shapes

from workshop_utils.adapters import record as export_record
from workshop_utils.checkpoints.convert.bridge import bridge
from workshop_utils.checkpoints.formats import nemo_archive, torch_archive
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


def adapter_state() -> dict:
    key = "model.decoder.layers.{}.self_attention.adapter_layer.lora_kqv_adapter.{}.weight"
    places = [(layer, half) for layer in range(2) for half in ("linear_in", "linear_out")]
    return {key.format(*place): torch.ones(4, 32) for place in places}


def tar(path: Path, *entries: tarfile.TarInfo | tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as archive:
        for entry in entries:
            name, content = entry if isinstance(entry, tuple) else (None, b"")
            info = tarfile.TarInfo(name) if name else entry
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
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
    names = [member.stored_name for member in nemo_archive.members(path)]
    assert names == ["model_config.yaml", "model_weights.ckpt"]
    again = nemo_archive.write(root / "b.nemo", CONFIG, b"weights")
    assert again.read_bytes() == path.read_bytes()
    with tarfile.open(path, "r:") as archive:
        kinds = {(entry.type, entry.mtime, entry.uname) for entry in archive}
    assert kinds == {(tarfile.REGTYPE, 0, "")}
    with pytest.raises(yaml.YAMLError):
        nemo_archive.write(root / "c.nemo", {"a": object()}, b"")
    assert sorted(file.name for file in root.iterdir()) == ["a.nemo", "b.nemo"]


def test_the_names_that_nemo_writes(root):
    members = [(f"./{name}", content) for name, content in GOOD]
    path = tar(root / "a.nemo", special("./", tarfile.DIRTYPE), *members)
    assert nemo_archive.read_config(path) == CONFIG
    names = [member.stored_name for member in nemo_archive.members(path)]
    assert names == ["./model_config.yaml", "./model_weights.ckpt"]
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
    values = torch.zeros(3, 2).to(getattr(torch, dtype))
    state = {"a": values, "b": torch.nn.Parameter(torch.zeros(5)), "step": 3}
    tensors = torch_archive.read_tensors(io.BytesIO(saved(state)), "x")
    assert shapes(tensors) == {"a": (3, 2), "b": (5,)}
    assert [tensors[name].dtype for name in "ab"] == [dtype, "float32"]
    module = saved(torch.nn.Linear(2, 3).state_dict())
    tensors = torch_archive.read_tensors(io.BytesIO(module), "x")
    assert shapes(tensors) == {"weight": (3, 2), "bias": (3,)}


def test_code_in_the_weights_is_not_run(root):
    path = nemo_archive.write(root / "a.nemo", CONFIG, saved({"a": Evil()}))
    said = r"model_weights\.ckpt is a pickle that would call __builtin__\.exec"
    with pytest.raises(UnsafeCheckpoint, match=said):
        identify(path)


def test_the_format_before_zip_and_other_bytes():
    old = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"before 1\.6"):
        torch_archive.read_tensors(old, "x")
    for content in (b"", b"junk" * 100, saved({"a": torch.zeros(2)})[:-30]):
        with pytest.raises(DamagedCheckpoint):
            torch_archive.read_tensors(io.BytesIO(content), "x")


def test_an_adapter_of_the_script_path(root):
    checkpoint = identify(nemo_archive.write(root / "a.nemo", CONFIG, saved(adapter_state())))
    assert checkpoint.format == "NeMo 1 archive (.nemo), LoRA adapter"
    told, base = checkpoint.adapter, "/somewhere/models/bridged/tiny-llama"
    assert (told.rank, told.alpha, told.targets) == (4, 8, ("attention_qkv",))
    assert (told.base, told.base_is_here) == (base, False)
    assert checkpoint.parameters == 4 * 4 * 32
    assert answers(checkpoint)["PEFT"] == ("after", "workshop export a.nemo --to hf-peft")
    trtllm = "after", "workshop export a.nemo --to nemo --reader trtllm"
    assert answers(checkpoint)["TensorRT-LLM"] == trtllm


def test_an_export_names_its_reader(root):
    reader = export_record.READERS["nemo", "trtllm"]
    config = export_samples.config_of(export_samples.GQA, alpha=4)
    config["workshop"] = {"reader": reader, "qkv_order": "qkv", "alpha_baked_in": True}
    checkpoint = identify(
        nemo_archive.write(
            root / "a.nemo", config, saved(export_samples.tensors_of(export_samples.GQA))
        )
    )
    assert checkpoint.made_for == reader
    told = answers(checkpoint)
    taking = {name for name, (answer, _) in told.items() if answer == "yes"}
    assert taking == {"TensorRT-LLM"}
    assert "for TensorRT-LLM" in told["script path"][1]
    assert checkpoint.notes == ("q, k, v rows: qkv; alpha baked in: True",)


def test_a_bridged_view(root, originals):
    source = shutil.copytree(originals / "gpu", root / "models" / "nemo2" / "gpu")
    view, own = identify(bridge(source)), identify(source)
    assert view.format == "bridged view of a NeMo 2.0 directory"
    assert view.architecture == own.architecture
    assert (view.parameters, view.dtype) == (own.parameters, "bfloat16")
    assert view.notes == ("a view of the NeMo 2.0 checkpoint models/nemo2/gpu",)
    (source / "weights" / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="__0_0"):
        identify(root / "models" / "bridged" / "gpu")


@pytest.fixture
def hf(tiny, root):
    return shutil.copytree(tiny, root / "hf")


def test_the_command(hf, capsys):
    assert main(["inspect", str(hf), "--tensors"]) == 0
    printed = capsys.readouterr().out
    sizes = identify(hf).architecture
    assert f"{sizes.layers} layers, hidden {sizes.hidden}, FFN {sizes.ffn}" in printed
    assert "model.embed_tokens.weight  float32  [" in printed
    assert " bytes\n    model.safetensors  byte " in printed
    assert main(["inspect", str(hf), "--json", "--tensors"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["dtype"]) == ("hf", "float32")
    assert told["parameters"] == identify(hf).parameters
    assert told["tensors"][0].keys() == {"name", "shape", "dtype", "chunks", "packed", "bytes"}
    shards = sum(sum(cells.values()) for cells in told["shards"].values())
    assert shards == sum(tensor["bytes"] for tensor in told["tensors"])
    assert main(["inspect", str(hf), "--shards"]) == 0
    assert f"All {sizes.layers} layers are in one file." in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("nothing", ""),
        ("hf/config.json", "Give its top directory: hf"),
        (".", "Give one of them: "),
        ("empty", ""),
        ("text.txt", ""),
        ("cut.nemo", ""),
    ],
)
def test_the_command_on_what_is_no_checkpoint(root, hf, originals, capsys, wrong, said):
    shutil.copytree(originals / "plain", root / "plain")
    (root / "empty").mkdir()
    (root / "text.txt").write_text("hello")
    (root / "cut.nemo").write_bytes(b"x" * 600)
    assert main(["inspect", str(root / wrong)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and said in captured.err
