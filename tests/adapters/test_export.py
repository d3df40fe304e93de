"""Exports, read by their readers: PEFT and transformers themselves, NeMo's own converter,
TensorRT-LLM's rules."""

import argparse
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

from workshop_utils.adapters.export import export, export_adapter
from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.rules import check
from workshop_utils.cli import export as command
from workshop_utils.core.errors import WorkshopError

RANK, ALPHA = 4, 8


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def make(
    root: Path, shape: Shape = GQA, targets=("attention_qkv",), name="tickets", **options
) -> Path:
    path = root / "runs" / "one" / "checkpoints" / f"{name}.nemo"
    return write_adapter(
        path, config_of(shape, targets, RANK, ALPHA), tensors_of(shape, targets, RANK, **options)
    )


def read_nemo(path: Path) -> tuple[dict, dict]:
    with tarfile.open(path, "r:") as archive:
        members = {
            Path(member.name).name: archive.extractfile(member) for member in archive.getmembers()
        }
        return yaml.safe_load(members["model_config.yaml"]), torch.load(
            members["model_weights.ckpt"], weights_only=True
        )


def tensorrt_llm_reads(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """TensorRT-LLM's ``unpack_nemo_weights`` and ``get_all_nemo_lora_weights``, written from the
    contract."""
    with tarfile.open(path) as archive:
        try:
            weights, config = (
                archive.extractfile("model_weights.ckpt"),
                archive.extractfile("model_config.yaml"),
            )
        except KeyError:
            weights, config = (
                archive.extractfile("./model_weights.ckpt"),
                archive.extractfile("./model_config.yaml"),
            )
        assert isinstance(yaml.safe_load(config.read()), dict)
        state = torch.load(weights, weights_only=True)
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        if "self_attention.adapter_layer.lora_kqv_adapter" not in key:
            raise KeyError(key)
        half = {"linear_in.weight": "in", "linear_out.weight": "out"}[
            key.split("lora_kqv_adapter.")[1]
        ]
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
    "targets",
    [("attention_qkv",), ("attention_qkv", "attention_dense"), ("mlp_fc1", "mlp_fc2"), ALL],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peft_computes_what_nemo_computes(root, shape, targets):
    source = make(root, shape, targets)
    directory = export(source, "hf-peft")
    reference = logits(
        add_like_nemo(tiny_llama(shape), shape, tensors_of(shape, targets, RANK), ALPHA / RANK)
    )
    found = logits(with_peft(directory, shape))
    assert (reference - logits(tiny_llama(shape))).abs().max() > 0.1
    torch.testing.assert_close(found, reference, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tensorrt_llm_computes_what_nemo_computes(root, shape):
    path = export(make(root, shape), "nemo")
    reference = logits(
        add_like_nemo(tiny_llama(shape), shape, tensors_of(shape, rank=RANK), ALPHA / RANK)
    )
    torch.testing.assert_close(
        logits(merged_from_trtllm(path, shape)), reference, atol=2e-4, rtol=1e-4
    )


def test_the_row_order_matters(root):
    """What the file for NeMo would do in TensorRT-LLM: this is why there are two."""
    path = export(make(root), "nemo", reader="nemo")
    reference = logits(
        add_like_nemo(tiny_llama(GQA), GQA, tensors_of(GQA, rank=RANK), ALPHA / RANK)
    )
    assert (logits(merged_from_trtllm(path, GQA)) - reference).abs().max() > 0.1


def test_nemo_gets_the_tensors_as_it_wrote_them(root):
    path = export(make(root, GQA, ALL), "nemo", reader="nemo")
    config, state = read_nemo(path)
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
    source = make(root, shape, ALL)
    path = export(source, "nemo", reader="nemo")
    converter = nemo_converter(monkeypatch)
    converter.convert_lora_nemo_to_canonical(str(path), str(root / "converted"), hf_format=True)
    theirs = torch.load(root / "converted" / "adapter_model.bin", weights_only=True)
    ours = load_file(export(source, "hf-peft") / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    config = json.loads((root / "converted" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)


def test_the_trtllm_file_says_what_it_is(root):
    path = export(make(root), "nemo")
    config, state = read_nemo(path)
    assert path == root / "runs" / "exports" / "tickets" / "trtllm" / "tickets.nemo"
    assert [file.name for file in path.parent.glob("*.nemo")] == ["tickets.nemo"]
    assert (
        config["peft"]["lora_tuning"]["alpha"]
        == config["peft"]["lora_tuning"]["adapter_dim"]
        == RANK
    )
    assert config["workshop"]["qkv_order"] == "qkv"
    assert config["workshop"]["alpha_baked_in"] is True
    assert config["workshop"]["trained_alpha"] == ALPHA
    assert config["workshop"]["base"] == "tiny-llama"
    assert "TensorRT-LLM" in config["workshop"]["reader"]
    with tarfile.open(path, "r:") as archive:
        assert len(archive.getmembers()) == 2
        assert all(member.isreg() for member in archive.getmembers())
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(storages) == len(state)


def test_the_trained_adapter_comes_back_from_the_trtllm_file(root):
    first = export(make(root), "nemo")
    direct = load_file(
        export(root / "runs" / "one", "hf-peft", name="direct") / "adapter_model.safetensors"
    )
    again = export(first, "hf-peft", name="again")
    assert json.loads((again / "adapter_config.json").read_text())["lora_alpha"] == RANK
    for key, tensor in load_file(again / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, direct[key] * (ALPHA / RANK if ".lora_B." in key else 1))
    back = export(first, "nemo", reader="nemo", name="back")
    reference = read_nemo(back)[1]
    for key, tensor in tensors_of(GQA, rank=RANK).items():
        torch.testing.assert_close(
            reference[key], tensor * (ALPHA / RANK if "linear_out" in key else 1)
        )


def test_the_peft_directory_is_complete(root):
    directory = export(make(root, GQA, ALL), "hf-peft", base_model="org/base")
    assert directory == root / "runs" / "exports" / "tickets" / "hf-peft"
    names = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "workshop_export.json",
    }
    assert {path.name for path in directory.iterdir()} == names
    config = json.loads((directory / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "base_model_name_or_path": "org/base",
    }
    assert expected.items() <= config.items()
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    record = json.loads((directory / "workshop_export.json").read_text())
    assert record["base"] == "org/base"
    assert len(record["source_sha256"]) == 64


@pytest.mark.parametrize(
    "prefix", ["model.decoder.", "model.module.decoder.", "decoder.", "module.decoder."]
)
def test_prefixes_of_other_versions_are_read(root, prefix):
    source = make(root, prefix=prefix)
    keys = read_nemo(export(source, "nemo"))[1].keys()
    assert all(key.startswith("model.decoder.layers.") for key in keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(root, dtype):
    source = make(root, dtype=dtype)
    assert all(tensor.dtype == dtype for tensor in read_nemo(export(source, "nemo"))[1].values())
    assert all(
        tensor.dtype == dtype
        for tensor in load_file(export(source, "hf-peft") / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize(
    "to, readers",
    [("hf-peft", ("peft", "vllm", "trtllm", "nim1", "nim2")), ("nemo", ("trtllm", "nim1"))],
)
def test_an_export_is_judged_for_every_reader_that_it_names(root, to, readers):
    made = export_adapter(make(root), to)
    assert made.record.for_servers
    for reader in readers:
        found = check(made.path, reader, RANK)
        assert found.conforms
        assert {rule.rule for rule in found.rules if not rule.rule.startswith("the form")} <= set(
            made.rules
        )


@pytest.mark.parametrize(
    "to, only", [("nemo", "TensorRT-LLM's .nemo reader"), ("hf-peft", "Hugging Face PEFT")]
)
def test_double_precision_is_for_readers_that_take_it(root, to, only):
    wide = export_adapter(make(root, dtype=torch.float64), to)
    assert wide.record.reader.startswith(f"{only} (") and "--dtype bfloat16" in wide.record.reader
    assert export_adapter(
        root / "runs" / "one", to, root / "b", dtype="bfloat16"
    ).record.for_servers


@pytest.mark.parametrize(
    "rank, words",
    [
        (16, []),
        (17, ["--max-lora-rank 32"]),
        (33, ["--max-lora-rank 64", "NIM_MAX_LORA_RANK=33"]),
        (600, ["no rank above 512", "RANK=600"]),
    ],
)
def test_a_rank_above_a_server_s_default_is_noted(root, rank, words):
    source = write_adapter(root / "a.nemo", config_of(GQA, rank=rank), tensors_of(GQA, rank=rank))
    notes = export_adapter(source, "hf-peft").notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
    assert not any(
        "vLLM" in note for note in export_adapter(source, "nemo").notes
    )  # which reads no .nemo


def test_baking_a_scale_that_is_no_power_of_two_in_bfloat16(root):
    config = config_of(GQA, rank=RANK, alpha=7.3)
    source = write_adapter(
        root / "a.nemo", config, tensors_of(GQA, rank=RANK, dtype=torch.bfloat16)
    )
    assert export(source, "nemo").exists()
    adapter_config = json.loads((export(source, "hf-peft") / "adapter_config.json").read_text())
    assert adapter_config["lora_alpha"] == 7.3


def test_defaults_of_nemo_for_missing_heads(root):
    config = config_of(SHAPES["mha"])
    config["num_query_groups"] = None
    del config["kv_channels"]
    source = write_adapter(root / "a.nemo", config, tensors_of(SHAPES["mha"]))
    adapter = read_adapter(source)
    assert adapter.architecture.heads == (4, 4, 8)
    assert read_nemo(export(source, "nemo"))[0]["num_query_groups"] == 4


def test_the_same_adapter_gives_the_same_bytes(root):
    source = make(root)
    one, two = export(source, "nemo", root / "one"), export(source, "nemo", root / "two")
    assert one.read_bytes() == two.read_bytes()


def test_an_export_is_reused_and_said_so(root):
    source = make(root)
    for options in ({"to": "nemo"}, {"to": "nemo", "reader": "nemo"}, {"to": "hf-peft"}):
        first = export_adapter(source, **options)
        before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in first.files}
        second = export_adapter(source, **options)
        assert (first.reused, second.reused) == (False, True)
        assert {
            file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in second.files
        } == before
        assert second.rules == first.rules
        assert export_adapter(source, **options, overwrite=True).reused
        copy = source.rename(source.with_name("copy.nemo"))
        assert export_adapter(copy, **options, name="tickets").reused
        copy.rename(source)


def test_the_card_is_honest(root):
    source = make(root, GQA_HEAD_DIM)
    path = export(source, "nemo")
    card = path.with_suffix(".md").read_text()
    for words in (
        "tiny-llama",
        "Q|K|V",
        "not loaded by a NIM",
        "closed",
        "None were given",
        "Learning rate: 0.0005",
        "8 / 4 = 2",
    ):
        assert words in card
    export(source, "nemo", results={"Exact match (test)": "88 %"})
    assert "- Exact match (test): 88 %" in path.with_suffix(".md").read_text()
    assert (
        'base_model: "org/base"'
        in (export(source, "hf-peft", base_model="org/base") / "README.md").read_text()
    )


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["export", *words])
    return args.run(args)


def test_the_command_prints_what_it_made(root, capsys):
    make(root)
    assert run_command(str(root / "runs" / "one"), "--to", "nemo") == 0
    printed = capsys.readouterr().out
    for words in (
        "runs/exports/tickets/trtllm/tickets.nemo",
        "bytes",
        "TensorRT-LLM",
        "row order   qkv",
        "rules kept",
    ):
        assert words in printed
    assert run_command(str(root / "runs" / "one"), "--to", "nemo") == 0
    assert "reused" in capsys.readouterr().out
    assert (
        run_command(
            str(root / "runs" / "one"),
            "--to",
            "hf-peft",
            "--base",
            "org/base",
            "--out",
            str(root / "out"),
        )
        == 0
    )
    assert "org/base" in capsys.readouterr().out
    with pytest.raises(WorkshopError, match="overwrite"):
        run_command(
            str(root / "runs" / "one"),
            "--to",
            "hf-peft",
            "--base",
            "org/other",
            "--out",
            str(root / "out"),
        )
