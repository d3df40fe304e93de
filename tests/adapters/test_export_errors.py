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


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def good(root: Path, targets=("attention_qkv",), name: str = "a") -> Path:
    return write_adapter(root / f"{name}.nemo", config_of(GQA, targets), tensors_of(GQA, targets))


# A change of configuration or tensors, the error it gives, and words of the message.
CONFIG_FAULTS = {
    "whole model": (lambda c: c.pop("peft"), NotACheckpoint, "whole model"),
    "no scheme": (lambda c: c["peft"].update(peft_scheme=None), NotACheckpoint, "whole model"),
    "p-tuning": (lambda c: c["peft"].update(peft_scheme="ptuning"), NotACheckpoint, "ptuning"),
    "no lora_tuning": (
        lambda c: c["peft"].pop("lora_tuning"),
        DamagedCheckpoint,
        "peft.lora_tuning",
    ),
    "canonical": (
        lambda c: c["peft"]["lora_tuning"].update(variant="canonical"),
        UnsupportedAdapter,
        "canonical",
    ),
    "layer selection": (
        lambda c: c["peft"]["lora_tuning"].update(layer_selection=[1]),
        UnsupportedAdapter,
        "layer_selection",
    ),
    "tied": (
        lambda c: c["peft"]["lora_tuning"].update(weight_tying=True),
        UnsupportedAdapter,
        "weight_tying",
    ),
    "alpha missing": (
        lambda c: c["peft"]["lora_tuning"].pop("alpha"),
        DamagedCheckpoint,
        "no peft.lora_tuning.alpha",
    ),
    "alpha null": (
        lambda c: c["peft"]["lora_tuning"].update(alpha=None),
        DamagedCheckpoint,
        "no peft.lora_tuning.alpha",
    ),
    "alpha text": (
        lambda c: c["peft"]["lora_tuning"].update(alpha="32"),
        DamagedCheckpoint,
        "positive number",
    ),
    "alpha zero": (
        lambda c: c["peft"]["lora_tuning"].update(alpha=0),
        DamagedCheckpoint,
        "positive number",
    ),
    "rank missing": (
        lambda c: c["peft"]["lora_tuning"].pop("adapter_dim"),
        DamagedCheckpoint,
        "adapter_dim",
    ),
    "wrong rank": (
        lambda c: c["peft"]["lora_tuning"].update(adapter_dim=8),
        DamagedCheckpoint,
        "adapter_dim 8",
    ),
    "no hidden size": (lambda c: c.pop("hidden_size"), DamagedCheckpoint, "hidden_size"),
    "no layers": (lambda c: c.update(num_layers=0), DamagedCheckpoint, "num_layers"),
    "too few layers": (lambda c: c.update(num_layers=1), DamagedCheckpoint, "layer 1"),
    "too many layers": (
        lambda c: c.update(num_layers=3),
        DamagedCheckpoint,
        "layer 2 has no adapter",
    ),
    "other groups": (
        lambda c: c.update(num_query_groups=4),
        DamagedCheckpoint,
        r"asks for \[96, 4\]",
    ),
    "uneven groups": (
        lambda c: c.update(num_query_groups=3),
        DamagedCheckpoint,
        "not a multiple of num_query_groups",
    ),
    "other channels": (lambda c: c.update(kv_channels=16), DamagedCheckpoint, "4/2/16"),
    "uneven channels": (
        lambda c: c.update(kv_channels=None, hidden_size=30),
        DamagedCheckpoint,
        "kv_channels is not set",
    ),
    "unknown target": (
        lambda c: c["peft"]["lora_tuning"].update(target_modules=["attention_qkv", "lm_head"]),
        UnsupportedAdapter,
        "unknown target 'lm_head'",
    ),
    "other targets": (
        lambda c: c["peft"]["lora_tuning"].update(target_modules=["all"]),
        DamagedCheckpoint,
        "target_modules",
    ),
    "two ranks": (
        lambda c: c.update(tensor_model_parallel_size=2),
        DamagedCheckpoint,
        "2 tensor-parallel ranks x 1 pipeline stages, the archive holds model_weights.ckpt",
    ),
    "two stages": (
        lambda c: c.update(pipeline_model_parallel_size=2),
        DamagedCheckpoint,
        "1 tensor-parallel ranks x 2",
    ),
    "strange order": (lambda c: c.update(workshop={"qkv_order": "kvq"}), DamagedCheckpoint, "kvq"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_wrong_configuration_is_named(root, fault):
    change, error, words = CONFIG_FAULTS[fault]
    config = config_of(GQA)
    change(config)
    path = write_adapter(root / "a.nemo", config, tensors_of(GQA))
    with pytest.raises(error, match=words) as raised:
        export(path, "hf-peft")
    assert "a.nemo" in str(raised.value)
    assert not (root / "runs").exists()


TENSOR_FAULTS = {
    "missing half": (
        lambda s: s.pop(OUT),
        DamagedCheckpoint,
        "layer 0, attention_qkv has no linear_out",
    ),
    "missing other half": (
        lambda s: s.pop(IN),
        DamagedCheckpoint,
        "layer 0, attention_qkv has no linear_in",
    ),
    "missing layer": (
        lambda s: (s.pop(IN), s.pop(OUT)),
        DamagedCheckpoint,
        "layer 0 has no adapter for attention_qkv",
    ),
    "nan": (
        lambda s: s[IN].fill_(float("nan")),
        DamagedCheckpoint,
        "layer 0, attention_qkv linear_in.weight holds NaN",
    ),
    "infinity": (lambda s: s[OUT][0].fill_(float("inf")), DamagedCheckpoint, "NaN or infinity"),
    "one-dimensional": (
        lambda s: s.update({IN: torch.ones(4)}),
        DamagedCheckpoint,
        r"linear_in.weight is \[4\]",
    ),
    "transposed": (
        lambda s: s.update({OUT: s[OUT].T}),
        DamagedCheckpoint,
        r"linear_out.weight is \[4, 64\]",
    ),
    "integers": (
        lambda s: s.update({key: value.to(torch.int8) for key, value in s.items()}),
        UnsupportedAdapter,
        "int8",
    ),
    "one of integers": (
        lambda s: s.update({IN: s[IN].to(torch.int8)}),
        DamagedCheckpoint,
        "is int8; in the other layers",
    ),
    "base weight": (
        lambda s: s.update({"model.embedding.weight": torch.ones(2, 2)}),
        NotACheckpoint,
        "embedding",
    ),
    "unknown adapter": (
        lambda s: s.update(
            {
                "model.decoder.layers.0.mlp.adapter_layer.lora_moe_hto4h_adapter.linear_in.weight": torch.ones(  # noqa: E501
                    1, 1
                )
            }
        ),
        UnsupportedAdapter,
        "lora_moe_hto4h_adapter",
    ),
    "twice": (
        lambda s: s.update({IN.replace("model.", "model.module."): s[IN]}),
        DamagedCheckpoint,
        "two tensors",
    ),
    "nested": (lambda s: s.update({"model_0": {}}), NotACheckpoint, "model_0"),
    "empty": (lambda s: s.clear(), NotACheckpoint, "no tensors"),
}


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


def test_code_in_the_weights_is_not_run(root, capsys):
    members = {
        "model_config.yaml": yaml.safe_dump(config_of(GQA)).encode(),
        "model_weights.ckpt": saved({"key": Evil()}),
    }
    with pytest.raises(UnsafeCheckpoint, match="something else than tensors"):
        read_adapter(write_tar(root / "a.nemo", members))
    members["model_weights.ckpt"] = pickle.dumps(Evil())
    with pytest.raises(UnsafeCheckpoint):
        read_adapter(write_tar(root / "b.nemo", members))
    assert "executed" not in capsys.readouterr().out


def test_truncated_weights(root):
    members = {
        "model_config.yaml": yaml.safe_dump(config_of(GQA)).encode(),
        "model_weights.ckpt": saved(tensors_of(GQA))[:700],
    }
    with pytest.raises(DamagedCheckpoint, match="model_weights.ckpt"):
        read_adapter(write_tar(root / "a.nemo", members))


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
                if (
                    "hto4h_adapter.linear_out" in name
                ):  # the gate's rows, then those of the up projection, of this rank
                    mine = torch.cat([half.chunk(tensor)[rank] for half in whole.chunk(2)])
                elif ("dense" in name or "4htoh" in name) and "linear_in" in name:
                    mine = whole.chunk(tensor, dim=1)[rank]
                else:
                    mine = whole.chunk(tensor)[rank]
                part[
                    name.replace(
                        f"layers.{layer}.", f"layers.{layer - stage * layers // pipeline}."
                    )
                ] = mine.clone()
            folder = (
                f"tp_rank_{rank:02}_pp_rank_{stage:03}" if pipeline > 1 else f"mp_rank_{rank:02}"
            )
            members[f"{folder}/model_weights.ckpt"] = saved(part)
    return members


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2), (2, 2)])
def test_parts_of_several_ranks_are_put_together(root, tensor, pipeline):

    state = tensors_of(GQA, ALL)
    config = config_of(GQA, ALL) | {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
    }
    members = {
        "model_config.yaml": yaml.safe_dump(config).encode(),
        **parts_of(state, tensor, pipeline),
    }
    merged = read_adapter(write_tar(root / "a.nemo", members)).weights
    whole = read_adapter(write_adapter(root / "b.nemo", config_of(GQA, ALL), state)).weights
    assert merged.keys() == whole.keys()
    assert all(
        torch.equal(merged[place][half], whole[place][half]) for place in whole for half in (0, 1)
    )


def test_parts_that_do_not_belong_together(root):
    config = config_of(GQA) | {"tensor_model_parallel_size": 2}
    text = yaml.safe_dump(config).encode()
    members = {"model_config.yaml": text, **parts_of(tensors_of(GQA), 2, 1)}
    lacking = {name: content for name, content in members.items() if "01" not in name}
    with pytest.raises(
        DamagedCheckpoint,
        match="2 tensor-parallel ranks x 1 pipeline stages, the archive holds mp_rank_00",
    ):
        read_adapter(write_tar(root / "a.nemo", lacking))
    other = parts_of(tensors_of(GQA, rank=8), 2, 1)
    with pytest.raises(DamagedCheckpoint, match="do not have one shape"):
        read_adapter(
            write_tar(
                root / "b.nemo",
                members | {name: content for name, content in other.items() if "01" in name},
            )
        )
    fewer = {name: value for name, value in tensors_of(GQA).items() if "layers.0." in name}
    with pytest.raises(DamagedCheckpoint, match="hold different tensors"):
        read_adapter(
            write_tar(
                root / "c.nemo",
                members
                | {
                    "mp_rank_01/model_weights.ckpt": parts_of(fewer, 2, 1)[
                        "mp_rank_01/model_weights.ckpt"
                    ]
                },
            )
        )


def test_no_weights_or_no_tar(root):
    config = yaml.safe_dump(config_of(GQA)).encode()
    with pytest.raises(WorkshopError, match="model_weights.ckpt"):
        read_adapter(write_tar(root / "a.nemo", {"model_config.yaml": config}))
    (root / "b.nemo").write_bytes(b"not a tar")
    with pytest.raises(WorkshopError, match="b.nemo"):
        read_adapter(root / "b.nemo")


def test_directories(root):
    with pytest.raises(NotACheckpoint, match="does not exist"):
        read_adapter(root / "nothing")
    (root / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(NotACheckpoint, match=r"holds no adapter: no \.nemo"):
        read_adapter(root / "run")
    one = good(root / "run" / "checkpoints")
    assert read_adapter(root / "run").source == one
    good(root / "run" / "checkpoints", name="b")
    with pytest.raises(NotACheckpoint, match="holds 2 .nemo files") as raised:
        read_adapter(root / "run")
    assert "run/checkpoints/b.nemo" in str(raised.value)
    (root / "distributed" / "weights").mkdir(parents=True)
    (root / "distributed" / "weights" / ".metadata").touch()
    with pytest.raises(NotACheckpoint, match="distributed checkpoint"):
        read_adapter(root / "distributed")


def test_trtllm_takes_attention_qkv_only(root):
    path = good(root, ALL)
    with pytest.raises(UnsupportedAdapter, match="attention_dense, mlp_fc1, mlp_fc2.*--to hf-peft"):
        export(path, "nemo")
    assert not (root / "runs").exists()


def test_a_plain_mlp_has_no_gate(root):
    config = {**config_of(GQA, ("mlp_fc1",)), "activation": "gelu"}
    state = {
        key: tensor[:48] if "linear_out" in key else tensor
        for key, tensor in tensors_of(GQA, ("mlp_fc1",)).items()
    }
    path = write_adapter(root / "a.nemo", config, state)
    assert export(path, "nemo", reader="nemo").exists()
    with pytest.raises(UnsupportedAdapter, match="gate"):
        export(path, "hf-peft")
    assert not list(root.rglob("*.partial"))


@pytest.mark.parametrize("to", ["nemo", "hf-peft"])
def test_an_untrained_adapter_is_refused(root, to):
    state = {
        key: tensor * (0 if "linear_out" in key else 1) for key, tensor in tensors_of(GQA).items()
    }
    with pytest.raises(ConformanceFailed, match="trained.*every B is zero"):
        export(write_adapter(root / "a.nemo", config_of(GQA), state), to)
    assert not [path for path in root.rglob("*") if path.is_file() and path.name != "a.nemo"]


def test_a_base_that_nobody_knows(root):
    config = config_of(GQA)
    del config["restore_from_path"]
    path = write_adapter(root / "a.nemo", config, tensors_of(GQA))
    with pytest.raises(ConformanceFailed, match="--base"):
        export(path, "hf-peft")
    assert export(path, "hf-peft", base_model="org/base").is_dir()


def test_arguments(root):
    path = good(root)
    for options in (
        {"to": "gguf"},
        {"to": "nemo", "reader": "vllm"},
        {"to": "nemo", "name": "../x"},
        {"to": "nemo", "name": "-x"},
    ):
        with pytest.raises(WorkshopError):
            export(path, **options)


@pytest.mark.parametrize("to", ["nemo", "hf-peft"])
def test_another_export_is_replaced_only_when_told(root, to):
    first = export(good(root), to)
    files = {file: file.read_bytes() for file in first.parent.rglob("*") if file.is_file()}
    other = tensors_of(GQA)
    other[OUT] += 1
    write_adapter(root / "a.nemo", config_of(GQA), other)
    with pytest.raises(OutputExists, match="--overwrite"):
        export(root / "a.nemo", to)
    assert {file: file.read_bytes() for file in first.parent.rglob("*") if file.is_file()} == files
    assert export(root / "a.nemo", to, overwrite=True) == first
    weights = first if to == "nemo" else first / write_peft.WEIGHTS
    assert weights.read_bytes() != files[weights]


def test_a_spoilt_export_is_not_reused(root):
    source = good(root)
    directory = export(source, "hf-peft")
    state = load_file(directory / write_peft.WEIGHTS)
    key = next(key for key in state if "k_proj.lora_B" in key)
    state[key] = state[key] + 1
    save_file(state, directory / write_peft.WEIGHTS)
    with pytest.raises(OutputExists, match="k_proj.*--overwrite"):
        export(source, "hf-peft")
    (directory / write_peft.WEIGHTS).write_bytes(b"short")
    with pytest.raises(OutputExists, match="safetensors"):
        export(source, "hf-peft")
    (directory / write_peft.RECORD).unlink()
    with pytest.raises(OutputExists, match="not made by this workshop.*--overwrite"):
        export(source, "hf-peft")
    export(source, "hf-peft", overwrite=True)
    path = export(source, "nemo")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(OutputExists, match="--overwrite"):
        export(source, "nemo")


def test_nothing_of_somebody_else_s_is_replaced(root):
    source = good(root)
    place = root / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("x")
    with pytest.raises(OutputExists, match=r"thesis\.txt"):
        export(source, "hf-peft", place, overwrite=True)
    with pytest.raises(OutputExists, match="is a file"):
        export(source, "hf-peft", place / "thesis.txt", overwrite=True)
    with pytest.raises(OutputExists, match=r"exactly one \.nemo"):
        export(source, "nemo", root / "b.nemo", overwrite=True)
    with pytest.raises(OutputExists, match="that is exported"):
        export(source, "nemo", source, reader="nemo", overwrite=True)
    assert (place / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("shape", [GQA, MHA], ids=["gqa", "mha"])
def test_a_wrong_row_order_never_leaves_the_exporter(root, shape, monkeypatch):
    path = write_adapter(root / "a.nemo", config_of(shape), tensors_of(shape))
    monkeypatch.setattr(write_nemo1, "reorder", lambda rows, *_: rows)
    with pytest.raises(ConformanceFailed, match="update equals the trained one.*layer 0"):
        export(path, "nemo")
    assert not [file for file in (root / "runs").rglob("*") if file.is_file()]


def broken_peft(change):
    original = write_peft.tensors_for

    def tensors_for(adapter):
        state = original(adapter)
        change(state)
        return state

    return tensors_for


PEFT_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
PEFT_FAULTS = {
    "no prefix": (
        lambda s: s.update({PEFT_KEY.removeprefix("base_model."): s.pop(PEFT_KEY)}),
        "the key 'model.model",
    ),
    "missing": (lambda s: s.pop(PEFT_KEY), "q_proj.lora_B"),
    "half the scale": (lambda s: s.update({PEFT_KEY: s[PEFT_KEY] / 2}), "q_proj: off by"),
    "wrong shape": (lambda s: s.update({PEFT_KEY: s[PEFT_KEY][:8].clone()}), "lora_B is"),
    "nan": (lambda s: s.update({PEFT_KEY: s[PEFT_KEY] * float("nan")}), "finite"),
}


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_a_wrong_peft_export_is_not_kept(root, fault, monkeypatch):
    change, words = PEFT_FAULTS[fault]
    monkeypatch.setattr(write_peft, "tensors_for", broken_peft(change))
    with pytest.raises(ConformanceFailed, match=words):
        export(good(root), "hf-peft")
    assert not list((root / "runs").rglob("*.safetensors"))
