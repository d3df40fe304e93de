"""Adapters that cannot be exported, places that are taken, and exports that would be wrong."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from export_samples import (
    ALL,
    GQA,
    MHA,
    NAMES,
    config_of,
    saved,
    tensors_of,
    write_adapter,
    write_tar,
)
from safetensors.torch import load_file, save_file

from workshop_utils.adapters import write_nemo1, write_peft
from workshop_utils.adapters.export import export
from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.record import FILE
from workshop_utils.core.errors import (
    ConformanceFailed,
    DamagedCheckpoint,
    NotACheckpoint,
    OutputExists,
    UnsafeCheckpoint,
    UnsupportedAdapter,
    WorkshopError,
)

FIRST = f"model.decoder.layers.0.{NAMES['attention_qkv']}"
IN, OUT = f"{FIRST}.linear_in.weight", f"{FIRST}.linear_out.weight"
MOE = "model.decoder.layers.0.mlp.adapter_layer.lora_moe_hto4h_adapter.linear_in.weight"
Damaged, Unsupported = DamagedCheckpoint, UnsupportedAdapter


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def good(root: Path, targets=("attention_qkv",), name: str = "a") -> Path:
    return write_adapter(root / f"{name}.nemo", config_of(GQA, targets), tensors_of(GQA, targets))


def text_of(config: dict) -> bytes:
    return yaml.safe_dump(config).encode()


def files_in(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


#: Fields of the whole configuration, of peft, of lora_tuning (None: taken out of it), the error it
#: gives, and words of the message.
CONFIG_FAULTS = {
    "no scheme": ({}, {"peft_scheme": None}, {}, NotACheckpoint, "whole model"),
    "p-tuning": ({}, {"peft_scheme": "ptuning"}, {}, NotACheckpoint, "ptuning"),
    "no lora_tuning": ({}, {"lora_tuning": None}, {}, Damaged, "peft.lora_tuning"),
    "canonical": ({}, {}, {"variant": "canonical"}, Unsupported, "canonical"),
    "layer selection": ({}, {}, {"layer_selection": [1]}, Unsupported, "layer_selection"),
    "tied": ({}, {}, {"weight_tying": True}, Unsupported, "weight_tying"),
    "alpha missing": ({}, {}, {"alpha": None}, Damaged, "no peft.lora_tuning.alpha"),
    "alpha text": ({}, {}, {"alpha": "32"}, Damaged, "positive number"),
    "alpha zero": ({}, {}, {"alpha": 0}, Damaged, "positive number"),
    "alpha without end": ({}, {}, {"alpha": float("inf")}, Damaged, "positive number"),
    "rank missing": ({}, {}, {"adapter_dim": None}, Damaged, "adapter_dim"),
    "wrong rank": ({}, {}, {"adapter_dim": 8}, Damaged, "adapter_dim 8"),
    "whole model": ({"peft": None}, None, None, NotACheckpoint, "whole model"),
    "no hidden size": ({"hidden_size": None}, {}, {}, Damaged, "hidden_size"),
    "no layers": ({"num_layers": 0}, {}, {}, Damaged, "num_layers"),
    "too few layers": ({"num_layers": 1}, {}, {}, Damaged, "layer 1"),
    "too many layers": ({"num_layers": 3}, {}, {}, Damaged, "layer 2 has no adapter"),
    "other groups": ({"num_query_groups": 4}, {}, {}, Damaged, r"asks for \[96, 4\]"),
    "uneven groups": ({"num_query_groups": 3}, {}, {}, Damaged, "not a multiple of num_query"),
    "other channels": ({"kv_channels": 16}, {}, {}, Damaged, "4/2/16"),
    "uneven channels": (
        {"kv_channels": None, "hidden_size": 30}, {}, {}, Damaged, "kv_channels is not set"),
    "unknown target": (
        {}, {}, {"target_modules": ["lm_head"]}, Unsupported, "unknown target 'lm_head'"),
    "other targets": ({}, {}, {"target_modules": ["all"]}, Damaged, "target_modules"),
    "two ranks": (
        {"tensor_model_parallel_size": 2}, {}, {}, Damaged,
        "2 tensor-parallel ranks x 1 pipeline stages, the archive holds model_weights.ckpt"),
    "two stages": (
        {"pipeline_model_parallel_size": 2}, {}, {}, Damaged, "1 tensor-parallel ranks x 2"),
    "strange order": ({"workshop": {"qkv_order": "kvq"}}, {}, {}, Damaged, "kvq"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_wrong_configuration_is_named(root, fault):
    fields, peft, lora, error, words = CONFIG_FAULTS[fault]
    config = config_of(GQA)
    if peft is not None:
        config["peft"]["lora_tuning"] |= lora
        config["peft"] |= peft
    path = write_adapter(root / "a.nemo", config | fields, tensors_of(GQA))
    with pytest.raises(error, match=words) as raised:
        export(path, "hf-peft")
    assert "a.nemo" in str(raised.value)
    assert not (root / "runs").exists()


#: A change of the tensors.
TENSOR_FAULTS = {
    "missing half": (lambda s: s.pop(OUT), Damaged, "layer 0, attention_qkv has no linear_out"),
    "missing other half": (lambda s: s.pop(IN), Damaged, "layer 0, attention_qkv has no linear_in"),
    "missing layer": (
        lambda s: (s.pop(IN), s.pop(OUT)), Damaged, "layer 0 has no adapter for attention_qkv"),
    "nan": (lambda s: s[IN].fill_(float("nan")), Damaged,
            "layer 0, attention_qkv linear_in.weight holds NaN"),
    "infinity": (lambda s: s[OUT][0].fill_(float("inf")), Damaged, "NaN or infinity"),
    "one-dimensional": (
        lambda s: s.update({IN: torch.ones(4)}), Damaged, r"linear_in.weight is \[4\]"),
    "transposed": (
        lambda s: s.update({OUT: s[OUT].T}), Damaged, r"linear_out.weight is \[4, 64\]"),
    "integers": (
        lambda s: s.update({k: t.to(torch.int8) for k, t in s.items()}), Unsupported, "int8"),
    "one of integers": (
        lambda s: s.update({IN: s[IN].to(torch.int8)}), Damaged, "is int8; in the other layers"),
    "base weight": (
        lambda s: s.update({"model.embedding.weight": torch.ones(2)}), NotACheckpoint, "embedding"),
    "unknown adapter": (
        lambda s: s.update({MOE: torch.ones(1, 1)}), Unsupported, "lora_moe_hto4h_adapter"),
    "twice": (lambda s: s.update({IN.replace("model.", "model.module."): s[IN]}), Damaged,
              "two tensors"),
    "nested": (lambda s: s.update({"model_0": {}}), NotACheckpoint, "model_0"),
    "empty": (lambda s: s.clear(), NotACheckpoint, "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_wrong_tensor_is_named(root, fault):
    change, error, words = TENSOR_FAULTS[fault]
    state = tensors_of(GQA)
    change(state)
    with pytest.raises(error, match=words):
        export(write_adapter(root / "a.nemo", config_of(GQA), state), "nemo")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "weights, error, words",
    [
        (saved({"key": Evil()}), UnsafeCheckpoint, "something else than tensors"),
        (pickle.dumps(Evil()), UnsafeCheckpoint, "model_weights.ckpt"),
        (saved(tensors_of(GQA))[:700], Damaged, "model_weights.ckpt"),
        (None, WorkshopError, "model_weights.ckpt"),
    ],
    ids=["code", "a pickle", "cut off", "no weights"],
)
def test_weights_that_are_none_run_nothing(root, capsys, weights, error, words):
    members = {"model_config.yaml": text_of(config_of(GQA))}
    members |= {"model_weights.ckpt": weights} if weights else {}
    with pytest.raises(error, match=words):
        read_adapter(write_tar(root / "a.nemo", members))
    assert "executed" not in capsys.readouterr().out


def test_no_tar(root):
    (root / "b.nemo").write_bytes(b"not a tar")
    with pytest.raises(WorkshopError, match=r"b\.nemo"):
        read_adapter(root / "b.nemo")


def parts_of(state: dict, tensor: int, pipeline: int) -> dict[str, bytes]:
    """``state`` of a gated model as ``tensor`` x ``pipeline`` ranks would hold and save it, written
    from NeMo's layers, not from ours."""
    layers = 1 + max(int(re.search(r"layers\.(\d+)", name)[1]) for name in state)
    members = {}
    for rank in range(tensor):
        for stage in range(pipeline):
            part = {}
            for name, whole in state.items():
                layer = int(re.search(r"layers\.(\d+)", name)[1])
                if layer * pipeline // layers != stage:
                    continue
                if "hto4h_adapter.linear_out" in name:
                    # The gate's rows, then those of the up projection, of this rank.
                    mine = torch.cat([half.chunk(tensor)[rank] for half in whole.chunk(2)])
                else:
                    columns = ("dense" in name or "4htoh" in name) and "linear_in" in name
                    mine = whole.chunk(tensor, dim=int(columns))[rank]
                here = layer - stage * layers // pipeline
                part[name.replace(f"layers.{layer}.", f"layers.{here}.")] = mine.clone()
            folder = f"mp_rank_{rank:02}"
            if pipeline > 1:
                folder = f"tp_rank_{rank:02}_pp_rank_{stage:03}"
            members[f"{folder}/model_weights.ckpt"] = saved(part)
    return members


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2), (2, 2)])
def test_parts_of_several_ranks_are_put_together(root, tensor, pipeline):
    state, config = tensors_of(GQA, ALL), config_of(GQA, ALL)
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    members = {"model_config.yaml": text_of(config | sizes), **parts_of(state, tensor, pipeline)}
    merged = read_adapter(write_tar(root / "a.nemo", members)).weights
    whole = read_adapter(write_adapter(root / "b.nemo", config, state)).weights
    assert merged.keys() == whole.keys()
    for place, halves in whole.items():
        assert all(torch.equal(*pair) for pair in zip(merged[place], halves, strict=True))


def test_parts_that_do_not_belong_together(root):
    config = text_of(config_of(GQA) | {"tensor_model_parallel_size": 2})
    parts = parts_of(tensors_of(GQA), 2, 1)
    first, second = parts
    fewer = {name: value for name, value in tensors_of(GQA).items() if "layers.0." in name}
    for other, words in (
        ({}, "2 tensor-parallel ranks x 1 pipeline stages, the archive holds mp_rank_00"),
        ({second: parts_of(tensors_of(GQA, rank=8), 2, 1)[second]}, "do not have one shape"),
        ({second: parts_of(fewer, 2, 1)[second]}, "hold different tensors"),
    ):
        members = {"model_config.yaml": config, first: parts[first]} | other
        with pytest.raises(DamagedCheckpoint, match=words):
            read_adapter(write_tar(root / "a.nemo", members))


def test_directories(root):
    def refused(name: str, words: str) -> str:
        with pytest.raises(NotACheckpoint, match=words) as raised:
            read_adapter(root / name)
        return str(raised.value)

    refused("nothing", "does not exist")
    (root / "run" / "checkpoints").mkdir(parents=True)
    refused("run", r"holds no adapter: no \.nemo")
    only = good(root / "run" / "checkpoints")
    assert read_adapter(root / "run").source == only
    good(root / "run" / "checkpoints", name="b")
    assert "run/checkpoints/b.nemo" in refused("run", "holds 2 .nemo files")
    (root / "distributed" / "weights").mkdir(parents=True)
    (root / "distributed" / "weights" / ".metadata").touch()
    refused("distributed", "distributed checkpoint")


def test_trtllm_takes_attention_qkv_only(root):
    path = good(root, ALL)
    with pytest.raises(UnsupportedAdapter, match="attention_dense, mlp_fc1, mlp_fc2.*--to hf-peft"):
        export(path, "nemo", reader="trtllm")
    assert not (root / "runs").exists()


def test_a_plain_mlp_has_no_gate(root):
    config = {**config_of(GQA, ("mlp_fc1",)), "activation": "gelu"}
    state = tensors_of(GQA, ("mlp_fc1",))
    state = {key: each[:48] if "linear_out" in key else each for key, each in state.items()}
    path = write_adapter(root / "a.nemo", config, state)
    assert export(path, "nemo", reader="nemo").exists()
    with pytest.raises(UnsupportedAdapter, match="gate"):
        export(path, "hf-peft")
    assert not list(root.rglob("*.partial"))


@pytest.mark.parametrize("to", ["nemo", "hf-peft"])
def test_an_untrained_adapter_is_refused(root, to):
    state = {key: each * ("linear_in" in key) for key, each in tensors_of(GQA).items()}
    source = write_adapter(root / "a.nemo", config_of(GQA), state)
    with pytest.raises(ConformanceFailed, match="trained.*every B is zero"):
        export(source, to)
    assert files_in(root).keys() == {source}


def test_a_base_that_nobody_knows(root):
    config = config_of(GQA) | {"restore_from_path": None}
    path = write_adapter(root / "a.nemo", config, tensors_of(GQA))
    with pytest.raises(ConformanceFailed, match="--base"):
        export(path, "hf-peft")
    assert export(path, "hf-peft", base_model="org/base").is_dir()


@pytest.mark.parametrize(
    "options",
    [
        {"to": "gguf"},
        {"to": "nemo", "reader": "vllm"},
        {"to": "nemo", "name": "../x"},
        {"to": "nemo", "name": "-x"},
    ],
)
def test_arguments(root, options):
    with pytest.raises(WorkshopError):
        export(good(root), **options)


@pytest.mark.parametrize("to", ["nemo", "hf-peft"])
def test_another_export_is_replaced_only_when_told(root, to):
    first = export(good(root), to)
    files = files_in(first.parent)
    other = tensors_of(GQA)
    other[OUT] += 1
    write_adapter(root / "a.nemo", config_of(GQA), other)
    with pytest.raises(OutputExists, match="--overwrite"):
        export(root / "a.nemo", to)
    assert files_in(first.parent) == files
    assert export(root / "a.nemo", to, overwrite=True) == first
    weights = first if to == "nemo" else first / write_peft.WEIGHTS
    assert weights.read_bytes() != files[weights]


def test_a_spoilt_export_is_not_reused(root):
    source = good(root)
    directory = export(source, "hf-peft")
    weights = directory / write_peft.WEIGHTS
    state = load_file(weights)
    key = next(key for key in state if "k_proj.lora_B" in key)
    state[key] = state[key] + 1
    save_file(state, weights)
    with pytest.raises(OutputExists, match="k_proj.*--overwrite"):
        export(source, "hf-peft")
    weights.write_bytes(b"short")
    with pytest.raises(OutputExists, match="safetensors"):
        export(source, "hf-peft")
    (directory / FILE).unlink()
    with pytest.raises(OutputExists, match="not made by this workshop.*--overwrite"):
        export(source, "hf-peft")
    export(source, "hf-peft", overwrite=True)
    path = export(source, "nemo")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(OutputExists, match="--overwrite"):
        export(source, "nemo")


def test_nothing_of_somebody_else_s_is_replaced(root):
    source, thesis = good(root), root / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("x")
    for to, out, reader, words in (
        ("hf-peft", thesis.parent, "trtllm", r"thesis\.txt"),
        ("hf-peft", thesis, "trtllm", "is a file"),
        ("nemo", source, "nemo", "that is exported"),
    ):
        with pytest.raises(OutputExists, match=words):
            export(source, to, out, reader=reader, overwrite=True)
    assert thesis.read_text() == "x"


@pytest.mark.parametrize("shape", [GQA, MHA], ids=["gqa", "mha"])
def test_a_wrong_row_order_never_leaves_the_exporter(root, shape, monkeypatch):
    path = write_adapter(root / "a.nemo", config_of(shape), tensors_of(shape))
    monkeypatch.setattr(write_nemo1, "reorder", lambda rows, *_: rows)
    with pytest.raises(ConformanceFailed, match="update equals the trained one.*layer 0"):
        export(path, "nemo", reader="trtllm")
    assert not files_in(root / "runs")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {KEY.removeprefix("base_model."): s.pop(KEY)}, "the key 'model.model"),
        (lambda s: s.pop(KEY) is None or {}, "q_proj has no lora_B"),
        (lambda s: {KEY: s[KEY] / 2}, "q_proj: off by"),
        (lambda s: {KEY: s[KEY][:8].clone()}, "lora_B is"),
        (lambda s: {KEY: s[KEY] * float("nan")}, "finite"),
    ],
    ids=["no prefix", "missing", "half the scale", "wrong shape", "nan"],
)
def test_a_wrong_peft_export_is_not_kept(root, change, words, monkeypatch):
    original = write_peft.tensors_for

    def tensors_for(adapter):
        state = original(adapter)
        state.update(change(state))
        return state

    monkeypatch.setattr(write_peft, "tensors_for", tensors_for)
    with pytest.raises(ConformanceFailed, match=words):
        export(good(root), "hf-peft")
    assert not list((root / "runs").rglob("*.safetensors"))
