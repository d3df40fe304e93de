"""Damage to Hugging Face models, adapters, .nemo archives, GGUF and Lightning files is found and
named."""

import json
import os
import shutil
import struct
from pathlib import Path

import export_samples as adapters
import pytest
import tiny_gguf
import tiny_model
import torch
import yaml
from checkpoint_samples import FFN, GROUPS, HEAD_DIM, HEADS, HIDDEN, LAYERS, write_context
from damage import Evil, has, rewrite
from safetensors.torch import load_file, save_file

from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.verify.verify import verify


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """One random Llama, as one file (``whole``), in parts (``parts``) and as torch saved it
    (``bin``)."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("hf")
    tiny_model.make_tiny_model(directory / "whole", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(directory / "whole")
    model.save_pretrained(directory / "parts", max_shard_size="200KB")
    model.save_pretrained(directory / "bin", safe_serialization=False)
    return directory


@pytest.fixture
def model(models, root):
    return lambda form: Path(shutil.copytree(models / form, root / form))


def header_of(file: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows it."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def rewrite_header(path: Path, change=lambda header: None, more: bytes = b"") -> None:
    """Apply ``change`` to the header, and put ``more`` after the data."""
    header, data = header_of(path / "model.safetensors")
    change(header)
    new = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + data + more)


def rewrite_state(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def configured(**fields):
    return lambda path: rewrite(path / "config.json", lambda config: config.update(fields))


DOWN = "model.layers.{}.mlp.down_proj.weight"
FIRST, SECOND, EVERY = (DOWN.format(layer) for layer in (0, 1, "*"))


def same_place(header):
    header[SECOND]["data_offsets"] = header[FIRST]["data_offsets"]


#: damage to the model in one file -> code, where, words
WHOLE = {
    "bytes of nobody": (
        lambda path: rewrite_header(path, lambda header: header.pop(SECOND)),
        [
            (Code.NOBODYS_BYTES, "model.safetensors", "bytes ["),
            (Code.MISSING_TENSOR, EVERY, "is missing in layer 1"),
        ],
    ),
    "bytes at the end": (
        lambda path: rewrite_header(path, more=b"1234"),
        [(Code.NOBODYS_BYTES, "model.safetensors", "the last 4 bytes")],
    ),
    "overlap": (
        lambda path: rewrite_header(path, same_place),
        [(Code.OVERLAP, "model.safetensors", FIRST, SECOND)],
    ),
    "shape": (
        configured(intermediate_size=256),
        [(Code.SHAPE, SECOND, "[64, 128]", "has to be [64, 256]")],
    ),
    "layer": (
        configured(num_hidden_layers=3),
        [(Code.MISSING_TENSOR, EVERY, "is missing in layer 2", "3 layers")],
    ),
    "dtype": (
        lambda path: rewrite_state(
            path / "model.safetensors", lambda state: state.update({SECOND: state[SECOND].half()})
        ),
        [(Code.DTYPE, SECOND, "is float16; in the other layers it is float32")],
    ),
}


@pytest.mark.parametrize("form", ["whole", "parts", "bin"])
def test_genuine_hugging_face_models_are_sound(model, form):
    report = verify(model(form), deep=True)
    assert [finding.code for finding in report.findings] == [Code.ORIGIN]


@pytest.mark.parametrize("damage", WHOLE)
def test_damaged_models(model, damage):
    path = model("whole")
    change, expected = WHOLE[damage]
    change(path)
    report = verify(path)
    for code, where, *words in expected:
        assert has(report, code, where, *words), report.findings
    if damage == "dtype":
        assert len(report.refused) == 1


def test_a_truncated_safetensors_file(model):
    file = model("whole") / "model.safetensors"
    header, _ = header_of(file)
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    os.truncate(file, file.stat().st_size - 100)
    assert has(verify(file.parent), Code.DAMAGED, last, "cut off")


@pytest.mark.parametrize("form", ["whole", "bin"])
def test_a_nan_in_one_layer(model, form):
    def change(state):
        state[SECOND][5, 7] = float("nan")

    path = model(form)
    if form == "whole":
        rewrite_state(path / "model.safetensors", change)
    else:
        rewrite(path / "pytorch_model.bin", change)
    assert verify(path).sound
    report = verify(path, deep=True)
    assert len(report.refused) == 1
    assert has(report, Code.NOT_FINITE, SECOND, "nan at [5, 7]")


def test_parts_and_an_index_that_disagree(model):
    path = model("parts")
    index = path / "model.safetensors.index.json"
    parts = json.loads(index.read_text())["weight_map"]
    own, other = parts[SECOND], next(part for part in parts.values() if part != parts[SECOND])
    rewrite(index, lambda content: content["weight_map"].update({SECOND: other}))
    report = verify(path)
    assert has(report, Code.DAMAGED, SECOND, f"is in {other}, and it is not")
    assert has(report, Code.INDEX, SECOND, f"{own} holds {SECOND}", f"has in {other}")
    rewrite(index, lambda content: content["weight_map"].pop(SECOND))
    assert has(verify(path), Code.INDEX, SECOND, f"{own} holds {SECOND}", "has nowhere")
    (path / own).rename(path / "elsewhere")
    assert has(verify(path), Code.DAMAGED, None, own, "is missing")


def test_two_parts_swapped(model):
    path = model("parts")
    first, second, *_ = sorted(path.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert has(verify(path), Code.DAMAGED, None, "says that", "and it is not")


def test_a_bin_that_would_run_code(model):
    path = model("bin")
    torch.save({"a": Evil()}, path / "pytorch_model.bin")
    worst = verify(path).worst
    assert worst.code is Code.UNSAFE
    assert "exec" in worst.message


@pytest.fixture
def peft(root):
    from peft import LoraConfig, get_peft_model

    base = adapters.tiny_llama(adapters.GQA)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = "somebody/a-model"
    # Without the look for the base on the Hub, which takes a while to give up.
    adapted.save_pretrained(root / "peft", save_embedding_layers=False)
    return root / "peft"


HALF = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
A, B = HALF.format("A"), HALF.format("B")
BARE = A.removeprefix("base_model.model.")


def without(*words):
    return lambda state: [state.pop(key) for key in list(state) if all(w in key for w in words)]


#: change to the configuration, to the tensors -> code, where, words
PEFT = {
    "half": ({}, without(B), Code.HALF, B, "is missing"),
    "rank": ({}, lambda s: s.update({A: torch.zeros(3, 32)}), Code.SHAPE, A, "[3, 32]", "r = 4"),
    "layer": ({}, without("layers.1.self_attn"), Code.MISSING_TENSOR, A, "layer 1 has no"),
    "prefix": ({}, lambda s: s.update({BARE: s.pop(A)}), Code.PREFIX, BARE, "base_model.model."),
    "module": ({}, without("down_proj"), Code.TARGETS, None, "names the module down_proj"),
    "nothing": ({}, lambda s: [s.update(x=s.pop(key)) for key in list(s)], Code.MISSING_TENSOR),
    "rank of the configuration": ({"r": 8}, None, Code.SHAPE, A, "r = 8"),
    "targets": ({"target_modules": ["q_proj"]}, None, Code.TARGETS, None, "down_proj", "not name"),
    "layers": ({"layers_to_transform": [5]}, None, Code.LAYERS, None, "for the layers 0, 1"),
    "core": ({"megatron_core": "os"}, None, Code.UNSAFE, None, "'os' as megatron_core"),
    "kind": ({"peft_type": "LOHA"}, None, Code.SCHEME, None, "peft_type is 'LOHA'"),
}


@pytest.mark.parametrize("damage", PEFT)
def test_damaged_peft_adapters(peft, damage):
    fields, change, *finding = PEFT[damage]
    rewrite(peft / "adapter_config.json", lambda config: config.update(fields))
    if change:
        rewrite_state(peft / "adapter_model.safetensors", change)
    assert has(verify(peft), *finding), verify(peft).findings


def test_a_genuine_peft_adapter_is_sound(peft):
    assert verify(peft, deep=True).sound
    pattern = {"r": 8, "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 4}}
    rewrite(peft / "adapter_config.json", lambda config: config.update(pattern))
    assert {finding.tensor for finding in verify(peft).refused} == {
        f"base_model.model.model.layers.1.mlp.down_proj.lora_{half}.weight" for half in "AB"
    }


@pytest.fixture
def lora(root):
    """A LoRA adapter as the script path writes it, all targets; called with a change to its
    configuration and tensors."""

    def write(change=lambda config, state: None) -> Path:
        config = adapters.config_of(adapters.GQA, adapters.ALL)
        state = adapters.tensors_of(adapters.GQA, adapters.ALL)
        change(config, state)
        return adapters.write_adapter(root / "lora.nemo", config, state)

    return write


OUT = "layers.1.self_attention.adapter_layer.lora_kqv_adapter.linear_out.weight"
IN = OUT.replace("linear_out", "linear_in")
NEMO1_OUT = f"model.decoder.{OUT}"


def tuned(**fields):
    return lambda config, state: config["peft"]["lora_tuning"].update(fields)


def smaller(config, state):
    state[NEMO1_OUT] = torch.zeros(64, 3)


NEMO1 = {
    "half": (lambda _, state: state.pop(NEMO1_OUT), OUT, "has no linear_out.weight"),
    "rank": (smaller, OUT, "[64, 3]", "[64, 4]"),
    "features": (lambda config, _: config.update(hidden_size=48), IN, "asks for [4, 48]"),
    "layer": (lambda config, _: config.update(num_layers=3), None, "layer 2 has no adapter for"),
    "layers": (lambda config, _: config.update(num_layers=10**12), None, "1,000,000,000,000"),
    "stated rank": (tuned(adapter_dim=8), OUT, "asks for [64, 8]"),
    "targets": (tuned(target_modules=["mlp_fc1"]), None, "target_modules names mlp_fc1"),
}


@pytest.mark.parametrize("damage", NEMO1)
def test_damaged_adapters_of_the_script_path(lora, damage):
    change, where, *words = NEMO1[damage]
    code = Code.LAYERS if damage == "layers" else Code.DAMAGED
    assert has(verify(lora(change)), code, where, *words), verify(lora(change)).findings


def test_every_fault_of_an_adapter_is_named(lora):
    assert verify(lora(), deep=True).sound
    unsafe = lora(lambda config, _: config.update(optim={"_target_": "os.system"}))
    assert verify(unsafe).worst.message.startswith("lora.nemo:model_config.yaml: optim._target_")

    def change(config, state):
        smaller(config, state)
        without("lora_4htoh_adapter.linear_in")(state)

    assert len(verify(lora(change)).refused) == 3


def test_parts_of_ranks_in_an_archive(root):
    config = adapters.config_of(adapters.GQA, adapters.ALL) | {"tensor_model_parallel_size": 2}
    state = adapters.tensors_of(adapters.GQA, adapters.ALL)
    members = {"model_config.yaml": yaml.safe_dump(config).encode()}
    part = "mp_rank_{:02}/model_weights.ckpt".format
    members |= {part(rank): adapters.saved(state) for rank in (0, 1)}
    assert verify(adapters.write_tar(root / "parts.nemo", members)).sound
    state.pop(NEMO1_OUT)
    path = adapters.write_tar(root / "half.nemo", members | {part(1): adapters.saved(state)})
    assert has(verify(path), Code.RANKS, NEMO1_OUT, f"{part(1)} has no")
    members.pop(part(1))
    path = adapters.write_tar(root / "one.nemo", members)
    assert has(verify(path), Code.DAMAGED, None, "lacks the part of tensor-parallel rank 1")


@pytest.fixture
def nemo2_adapter(root):
    """An adapter of the tiny Llama of checkpoint_samples, written by torch.distributed.checkpoint;
    called with a change to its tensors."""

    def write(change=lambda state: None) -> Path:
        import torch.distributed.checkpoint as dcp

        path = root / "adapter"
        shutil.rmtree(path, ignore_errors=True)
        write_context(path, "plain")
        state = {}
        for module, rows, columns in (
            ("self_attention.linear_qkv", (HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN),
            ("mlp.linear_fc1", 2 * FFN, HIDDEN),
            ("mlp.linear_fc2", HIDDEN, FFN),
        ):
            stem = f"module.decoder.layers.{module}.adapter"
            state[f"{stem}.linear_in.weight"] = torch.randn(LAYERS, 4, columns)
            state[f"{stem}.linear_out.weight"] = torch.randn(LAYERS, rows, 4)
        change(state)
        dcp.save(state, checkpoint_id=path / "weights", no_dist=True)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        (path / "weights" / "metadata.json").write_text(json.dumps(backend))
        torch.save({}, path / "weights" / "common.pt")
        (path / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/gone/base"}')
        return path

    return write


QKV = "module.decoder.layers.self_attention.linear_qkv.adapter.linear_{}.weight"
QKV_IN, QKV_OUT = QKV.format("in"), QKV.format("out")
NORM = "module.decoder.final_layernorm.weight"


def replaced(*shape):
    return lambda state: state.update({QKV_IN: torch.zeros(shape)})


NEMO2 = {
    "half": (without(QKV_OUT), Code.HALF, QKV_OUT, "is missing"),
    "rank": (replaced(2, 3, 32), Code.SHAPE, QKV_IN, "[2, 3, 32]", "asks for [2, 4, 32]"),
    "features": (replaced(2, 4, 31), Code.SHAPE, QKV_IN, "asks for [2, 4, 32]"),
    "layers": (replaced(1, 4, 32), Code.SHAPE, QKV_IN, "asks for [2, 4, 32]"),
    "axes": (replaced(4), Code.SHAPE, QKV_IN, "is [4]"),
    "foreign": (lambda s: s.update({NORM: torch.zeros(32)}), Code.FOREIGN_TENSOR, NORM),
}


@pytest.mark.parametrize("damage", NEMO2)
def test_damaged_nemo2_adapters(nemo2_adapter, damage):
    change, *finding = NEMO2[damage]
    report = verify(nemo2_adapter(change))
    assert has(report, *finding), report.findings


def test_a_nemo2_adapter(nemo2_adapter):
    report = verify(nemo2_adapter(), deep=True)
    assert report.sound
    assert [finding.code for finding in report.notes] == [Code.BASE]
    assert report.notes[0].message == "the base model is recorded as /gone/base, which is not here."


def test_a_gguf(root):
    file = root / "tiny.gguf"
    tiny_gguf.write_gguf(file)
    assert verify(file, deep=True).sound
    os.truncate(file, file.stat().st_size - 200)
    assert has(verify(file), Code.DAMAGED, None, "cut off")


def test_a_lightning_checkpoint(root):
    file = root / "a.ckpt"
    # Tied weights are stored once by torch.save, and may share their bytes.
    shared = torch.randn(3, 4)
    state = {"layers.0.weight": torch.randn(3, 4), "a": shared, "b": shared}
    content = {"state_dict": state, "pytorch-lightning_version": "2.4.0", "epoch": 1}
    torch.save(content, file)
    assert verify(file, deep=True).sound
    state["layers.0.weight"][2, 1] = float("inf")
    torch.save(content, file)
    assert has(verify(file, deep=True), Code.NOT_FINITE, "layers.0.weight", "inf at [2, 1]")
    os.truncate(file, file.stat().st_size - 50)
    assert not verify(file).sound


@pytest.mark.parametrize("scheme", ["ia3", "adapter", "ptuning"])
def test_an_adapter_of_another_kind_than_lora_is_sound(root, scheme):
    """Its own rules are not known here, and that is said."""
    config = adapters.config_of(adapters.GQA)
    config["peft"]["peft_scheme"] = scheme
    state = {
        f"model.decoder.layers.{layer}.adapter_layer.{scheme}.weight": torch.ones(4)
        for layer in (0, 1)
    }
    report = verify(adapters.write_adapter(root / "a.nemo", config, state))
    assert report.sound
    assert has(report, Code.SCHEME, None, f"peft_scheme is {scheme}")
