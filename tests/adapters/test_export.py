"""Exports, read by their readers: PEFT and transformers themselves, NeMo's own converter,
TensorRT-LLM's rules."""

import importlib.util
import json
import re
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from export_samples import (
    ALL,
    GQA,
    GQA_HEAD_DIM,
    SHAPES,
    Shape,
    add_like_nemo,
    config_of,
    logits,
    tensors_of,
    tiny_llama,
    write_adapter,
)
from safetensors.torch import load_file

from workshop_utils import cli
from workshop_utils.adapters.export import export, export_adapter
from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.rules import check

RANK, ALPHA = 4, 8
QKV = ("attention_qkv",)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def make(root: Path, shape: Shape = GQA, targets=QKV, **options) -> Path:
    path = root / "runs" / "one" / "checkpoints" / "tickets.nemo"
    state = tensors_of(shape, targets, RANK, **options)
    return write_adapter(path, config_of(shape, targets, RANK, ALPHA), state)


def trained_logits(shape: Shape, targets=QKV) -> torch.Tensor:
    state = tensors_of(shape, targets, RANK)
    return logits(add_like_nemo(tiny_llama(shape), shape, state, ALPHA / RANK))


def read_nemo(path: Path) -> tuple[dict, dict]:
    with tarfile.open(path, "r:") as archive:
        files = {Path(name).name: archive.extractfile(name) for name in archive.getnames()}
        state = torch.load(files["model_weights.ckpt"], weights_only=True)
        return yaml.safe_load(files["model_config.yaml"]), state


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def config_in(directory: Path) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


def tensorrt_llm_reads(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """TensorRT-LLM's ``unpack_nemo_weights`` and ``get_all_nemo_lora_weights``, written from the
    contract."""
    with tarfile.open(path) as archive:
        try:
            weights = archive.extractfile("model_weights.ckpt")
            config = archive.extractfile("model_config.yaml")
        except KeyError:
            weights = archive.extractfile("./model_weights.ckpt")
            config = archive.extractfile("./model_config.yaml")
        assert isinstance(yaml.safe_load(config.read()), dict)
        state = torch.load(weights, weights_only=True)
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        if "self_attention.adapter_layer.lora_kqv_adapter" not in key:
            raise KeyError(key)
        ends = {"linear_in.weight": "in", "linear_out.weight": "out"}
        half = ends[key.split("lora_kqv_adapter.")[1]]
        layer = int(re.match(r".*\.layers\.(\d+)\..*", key)[1])
        assert tensor.ndim == 2
        layers.setdefault(layer, {})[half] = tensor
    assert all(set(halves) == {"in", "out"} for halves in layers.values())
    return layers


def merged_from_trtllm(path: Path, shape: Shape):
    """A Llama with the update of TensorRT-LLM's reading added by hand: B A without any scale, rows
    Q|K|V."""
    model = tiny_llama(shape)
    query, group = shape.heads * shape.channels, shape.groups * shape.channels
    for layer, halves in tensorrt_llm_reads(path).items():
        update = halves["out"] @ halves["in"]
        attention = model.model.layers[layer].self_attn
        with torch.no_grad():
            attention.q_proj.weight += update[:query]
            attention.k_proj.weight += update[query : query + group]
            attention.v_proj.weight += update[query + group :]
    return model


def with_peft(directory: Path, shape: Shape):
    """The exported adapter on a fresh base, loaded by PEFT; any warning is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(tiny_llama(shape), str(directory)).eval()


@pytest.mark.parametrize(
    "targets", [QKV, ("attention_qkv", "attention_dense"), ("mlp_fc1", "mlp_fc2"), ALL]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peft_computes_what_nemo_computes(root, shape, targets):
    directory = export(make(root, shape, targets), "hf-peft")
    reference = trained_logits(shape, targets)
    assert (reference - logits(tiny_llama(shape))).abs().max() > 0.1
    torch.testing.assert_close(logits(with_peft(directory, shape)), reference, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tensorrt_llm_computes_what_nemo_computes(root, shape):
    found = logits(merged_from_trtllm(export(make(root, shape), "nemo", reader="trtllm"), shape))
    torch.testing.assert_close(found, trained_logits(shape), atol=2e-4, rtol=1e-4)


def test_the_row_order_matters(root):
    """What the file for NeMo would do in TensorRT-LLM: this is why there are two."""
    path = export(make(root), "nemo", reader="nemo")
    assert (logits(merged_from_trtllm(path, GQA)) - trained_logits(GQA)).abs().max() > 0.1


def test_nemo_gets_the_tensors_as_it_wrote_them(root):
    config, state = read_nemo(export(make(root, GQA, ALL), "nemo", reader="nemo"))
    trained = tensors_of(GQA, ALL, RANK)
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[key], trained[key]) for key in trained)
    assert config["peft"]["lora_tuning"]["alpha"] == ALPHA
    assert config["workshop"]["qkv_order"] == "interleaved"


def nemo_converter(monkeypatch):
    """NeMo's own ``lora_converter.py``, without the rest of ``nemo.export``, which takes long to
    import."""
    nemo = Path(importlib.util.find_spec("nemo").submodule_search_locations[0])

    def load(name: str, path: Path):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    load("nemo.export.tarutils", nemo / "export" / "tarutils.py")
    return load("workshop_test_lora_converter", nemo / "export" / "utils" / "lora_converter.py")


@pytest.mark.parametrize("shape", [GQA, SHAPES["mha"]], ids=["gqa", "mha"])
def test_nemo_s_own_converter_agrees(root, shape, monkeypatch):
    source, converted = make(root, shape, ALL), root / "converted"
    path = export(source, "nemo", reader="nemo")
    converter = nemo_converter(monkeypatch)
    converter.convert_lora_nemo_to_canonical(str(path), str(converted), hf_format=True)
    theirs = torch.load(converted / "adapter_model.bin", weights_only=True)
    ours = weights_of(export(source, "hf-peft"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert (config_in(converted)["r"], config_in(converted)["lora_alpha"]) == (RANK, ALPHA)


def test_the_trtllm_file_says_what_it_is(root):
    path = export(make(root), "nemo", reader="trtllm")
    config, state = read_nemo(path)
    assert path == root / "runs" / "exports" / "tickets" / "trtllm" / "tickets.nemo"
    assert [file.name for file in path.parent.glob("*.nemo")] == ["tickets.nemo"]
    lora, ours = config["peft"]["lora_tuning"], config["workshop"]
    assert lora["alpha"] == lora["adapter_dim"] == RANK
    assert "TensorRT-LLM" in ours["reader"]
    expected = {"qkv_order": "qkv", "alpha_baked_in": True, "trained_alpha": ALPHA}
    assert (expected | {"base": "tiny-llama"}).items() <= ours.items()
    with tarfile.open(path, "r:") as archive:
        assert len(archive.getmembers()) == 2
        assert all(member.isreg() for member in archive.getmembers())
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(storages) == len(state)


def test_the_trained_adapter_comes_back_from_the_trtllm_file(root):
    first = export(make(root), "nemo", reader="trtllm")
    direct = weights_of(export(root / "runs" / "one", "hf-peft", name="direct"))
    again = export(first, "hf-peft", name="again")
    assert config_in(again)["lora_alpha"] == RANK
    for key, tensor in weights_of(again).items():
        torch.testing.assert_close(tensor, direct[key] * (ALPHA / RANK if ".lora_B." in key else 1))
    back = read_nemo(export(first, "nemo", reader="nemo", name="back"))[1]
    for key, tensor in tensors_of(GQA, rank=RANK).items():
        scale = ALPHA / RANK if "linear_out" in key else 1
        torch.testing.assert_close(back[key], tensor * scale)


def test_the_peft_directory_is_complete(root):
    directory = export(make(root, GQA, ALL), "hf-peft", base_model="org/base")
    assert directory == root / "runs" / "exports" / "tickets" / "hf-peft"
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "workshop_export.json",
    ]
    config = config_in(directory)
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": RANK}
    expected |= {"base_model_name_or_path": "org/base", "lora_alpha": ALPHA}
    assert expected.items() <= config.items()
    modules = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert set(config["target_modules"]) == set(modules.split())
    record = json.loads((directory / "workshop_export.json").read_text())
    assert record["base"] == "org/base" and len(record["source_sha256"]) == 64


@pytest.mark.parametrize(
    "prefix", ["model.decoder.", "model.module.decoder.", "decoder.", "module.decoder."]
)
def test_prefixes_of_other_versions_are_read(root, prefix):
    keys = read_nemo(export(make(root, prefix=prefix), "nemo"))[1].keys()
    assert all(key.startswith("model.decoder.layers.") for key in keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(root, dtype):
    source = make(root, dtype=dtype)
    for state in (read_nemo(export(source, "nemo"))[1], weights_of(export(source, "hf-peft"))):
        assert {tensor.dtype for tensor in state.values()} == {dtype}


@pytest.mark.parametrize(
    "to, readers",
    [("hf-peft", ("peft", "vllm", "trtllm", "nim1", "nim2")), ("nemo", ("nemo", "nim1"))],
)
def test_an_export_keeps_the_rules_of_every_reader_that_it_names(root, to, readers):
    done = export_adapter(make(root), to)
    assert done.record.for_servers
    for reader in readers:
        assert not check(done.path, reader, RANK).faults


@pytest.mark.parametrize("to, only", [("nemo", "NeMo"), ("hf-peft", "Hugging Face PEFT")])
def test_double_precision_is_for_readers_that_take_it(root, to, only):
    reader = export_adapter(make(root, dtype=torch.float64), to).record.reader
    assert reader.startswith(f"{only} (") and "--dtype bfloat16" in reader
    half = export_adapter(root / "runs" / "one", to, root / "b", dtype="bfloat16")
    assert half.record.for_servers


@pytest.mark.parametrize(
    "rank, words",
    [
        (16, []),
        (17, ["--max-lora-rank 32"]),
        (33, ["--max-lora-rank 64", "NIM_MAX_LORA_RANK=33"]),
    ],
)
def test_a_rank_above_a_server_s_default_is_noted(root, rank, words):
    source = write_adapter(root / "a.nemo", config_of(GQA, rank=rank), tensors_of(GQA, rank=rank))
    notes = export_adapter(source, "hf-peft").notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
    # vLLM reads no .nemo.
    assert not any("vLLM" in note for note in export_adapter(source, "nemo").notes)


def test_baking_a_scale_that_is_no_power_of_two_in_bfloat16(root):
    state = tensors_of(GQA, rank=RANK, dtype=torch.bfloat16)
    source = write_adapter(root / "a.nemo", config_of(GQA, rank=RANK, alpha=7.3), state)
    assert export(source, "nemo", reader="trtllm").exists()
    assert config_in(export(source, "hf-peft"))["lora_alpha"] == 7.3


def test_defaults_of_nemo_for_missing_heads(root):
    config = config_of(SHAPES["mha"]) | {"num_query_groups": None}
    del config["kv_channels"]
    source = write_adapter(root / "a.nemo", config, tensors_of(SHAPES["mha"]))
    assert read_adapter(source).architecture.qkv == (4, 4, 8)
    assert read_nemo(export(source, "nemo"))[0]["num_query_groups"] == 4


def test_the_same_adapter_gives_the_same_bytes(root):
    source = make(root)
    one, two = (export(source, "nemo", root / name).read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "to, reader", [("nemo", "trtllm"), ("nemo", "nemo"), ("hf-peft", "trtllm")]
)
def test_an_export_is_reused_and_said_so(root, to, reader):
    options = {"to": to, "reader": reader}

    def stamps(done):
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in done.files}

    source = make(root)
    first = export_adapter(source, **options)
    before = stamps(first)
    second = export_adapter(source, **options)
    assert (first.reused, second.reused) == (False, True)
    assert stamps(second) == before and second.rules == first.rules
    assert export_adapter(source, **options, overwrite=True).reused
    copy = source.rename(source.with_name("copy.nemo"))
    assert export_adapter(copy, **options, name="tickets").reused


def test_the_card_is_honest(root):
    source = make(root, GQA_HEAD_DIM)
    path = export(source, "nemo", reader="trtllm")
    card = path.with_suffix(".md").read_text()
    for words in (
        "tiny-llama",
        "Q|K|V",
        "not loaded by a NIM",
        "documents the latter only",
        "None were given",
        "Learning rate: 0.0005",
        "8 / 4 = 2",
    ):
        assert words in card
    export(source, "nemo", reader="trtllm", results={"Exact match (test)": "88 %"})
    assert "- Exact match (test): 88 %" in path.with_suffix(".md").read_text()
    card = (export(source, "hf-peft", base_model="org/base") / "README.md").read_text()
    assert 'base_model: "org/base"' in card


def test_the_command_prints_what_it_made(root, capsys):
    make(root)
    run = ["export", str(root / "runs" / "one"), "--to"]
    assert cli.main([*run, "nemo", "--reader", "trtllm"]) == 0
    printed = capsys.readouterr().out
    place = "runs/exports/tickets/trtllm/tickets.nemo"
    for words in (place, "bytes", "TensorRT-LLM", "row order   qkv", "rules kept"):
        assert words in printed
    assert cli.main([*run, "nemo", "--reader", "trtllm"]) == 0
    assert "reused" in capsys.readouterr().out
    peft = [*run, "hf-peft", "--out", str(root / "out"), "--base"]
    assert cli.main([*peft, "org/base"]) == 0
    assert "org/base" in capsys.readouterr().out
    assert cli.main([*peft, "org/other"]) == 1
    assert "overwrite" in capsys.readouterr().err
