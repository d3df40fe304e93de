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
    def copy(form: str, change=lambda path: None) -> Path:
        path = Path(shutil.copytree(models / form, root / form))
        change(path)
        return path

    return copy


@pytest.fixture
def whole(model):
    return lambda change: model("whole", change)


def header_of(file: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows it."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def in_header(change=lambda header: None, more: bytes = b""):
    """Apply ``change`` to the header, and put ``more`` after the data."""

    def apply(path):
        header, data = header_of(path / SAFE)
        change(header)
        new = json.dumps(header).encode()
        (path / SAFE).write_bytes(struct.pack("<Q", len(new)) + new + data + more)

    return apply


def configured(**fields):
    return lambda path: rewrite(path / "config.json", lambda config: config.update(fields))


def half(path):
    rewrite(path / SAFE, lambda state: state.update({SECOND: state[SECOND].half()}))


SAFE, DOWN = "model.safetensors", "model.layers.{}.mlp.down_proj.weight"
FIRST, SECOND, EVERY = (DOWN.format(layer) for layer in (0, 1, "*"))


def without(*words):
    return lambda *given: [
        given[-1].pop(key) for key in list(given[-1]) if all(word in key for word in words)
    ]


def same_place(header):
    header[SECOND]["data_offsets"] = header[FIRST]["data_offsets"]


#: fixture, damage -> code, where, words
DAMAGE = [
    ("whole", in_header(without(SECOND)), Code.NOBODYS_BYTES, SAFE, "bytes ["),
    ("whole", in_header(without(SECOND)), Code.MISSING_TENSOR, EVERY, "is missing in layer 1"),
    ("whole", in_header(more=b"1234"), Code.NOBODYS_BYTES, SAFE, "the last 4 bytes"),
    ("whole", in_header(same_place), Code.OVERLAP, SAFE, FIRST, SECOND),
    ("whole", configured(intermediate_size=256), Code.SHAPE, SECOND, "has to be [64, 256]"),
    ("whole", configured(num_hidden_layers=3), Code.MISSING_TENSOR, EVERY, "in layer 2"),
    ("whole", half, Code.DTYPE, SECOND, "is float16; in the other layers it is float32"),
]


@pytest.mark.parametrize("form", ["whole", "parts", "bin"])
def test_genuine_hugging_face_models_are_sound(model, form):
    report = verify(model(form), deep=True)
    assert [finding.code for finding in report.findings] == [Code.ORIGIN]


def test_a_truncated_safetensors_file(model):
    file = model("whole") / SAFE
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
    rewrite(path / (SAFE if form == "whole" else "pytorch_model.bin"), change)
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

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(adapters.tiny_llama(adapters.GQA), config)
    adapted.peft_config["default"].base_model_name_or_path = "somebody/a-model"
    # Without the look for the base on the Hub, which takes a while to give up.
    adapted.save_pretrained(root / "peft", save_embedding_layers=False)

    def change_it(change=lambda config, state: None) -> Path:
        file = root / "peft" / "adapter_model.safetensors"
        rewrite(
            root / "peft" / "adapter_config.json",
            lambda config: rewrite(file, lambda state: change(config, state)),
        )
        return root / "peft"

    return change_it


HALF = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
A, B = HALF.format("A"), HALF.format("B")
BARE = A.removeprefix("base_model.model.")


def stated(**fields):
    return lambda config, state: config.update(fields)


def unprefixed(_, state):
    state[BARE] = state.pop(A)


def narrow(_, state):
    state[A] = torch.zeros(3, 32)


def drawn_anew(config, state):
    """Where a module has no tensors, PEFT draws both halves."""
    config["init_lora_weights"] = False
    without("layers.1.self_attn")(config, state)


def no_lora(_, state):
    for number, name in enumerate(list(state)):
        state[f"base_model.model.{number}"] = state.pop(name)


DAMAGE += [
    ("peft", without(B), Code.HALF, B, "is missing"),
    ("peft", narrow, Code.SHAPE, A, "[3, 32]", "r = 4"),
    ("peft", drawn_anew, Code.MISSING_TENSOR, A, "layer 1 has no adapter"),
    ("peft", unprefixed, Code.PREFIX, BARE, "base_model.model."),
    ("peft", without("down_proj"), Code.TARGETS, None, "names the module down_proj"),
    ("peft", no_lora, Code.MISSING_TENSOR, None, "holds no LoRA matrices"),
    ("peft", stated(r=8), Code.SHAPE, A, "r = 8"),
    ("peft", stated(target_modules=["q_proj"]), Code.TARGETS, None, "down_proj", "not name"),
    ("peft", stated(layers_to_transform=[5]), Code.LAYERS, None, "for the layers 0, 1"),
    ("peft", stated(megatron_core="os"), Code.UNSAFE, None, "'os' as megatron_core"),
    ("peft", stated(peft_type="LOHA"), Code.SCHEME, None, "peft_type is 'LOHA'"),
]


def test_a_genuine_peft_adapter_is_sound(peft):
    assert verify(peft(), deep=True).sound
    pattern = {"q_proj": 4, "layers.0.mlp.down_proj": 4}
    assert {item.tensor for item in verify(peft(stated(r=8, rank_pattern=pattern))).refused} == {
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


DAMAGE += [
    ("lora", without(NEMO1_OUT), Code.HALF, OUT, "has no linear_out.weight"),
    ("lora", smaller, Code.SHAPE, OUT, "[64, 3]", "[64, 4]"),
    ("lora", stated(hidden_size=48), Code.SHAPE, IN, "asks for [4, 48]"),
    ("lora", stated(num_layers=3), Code.MISSING_TENSOR, None, "layer 2 has no adapter for mlp_fc1"),
    ("lora", stated(num_layers=10**12), Code.LAYERS, None, "states 1,000,000,000,000 layers"),
    ("lora", stated(optim={"_target_": "os.system"}), Code.UNSAFE, "lora.nemo:model_config.yaml"),
    ("lora", tuned(adapter_dim=8), Code.SHAPE, OUT, "asks for [64, 8]"),
    ("lora", tuned(target_modules=["mlp_fc1"]), Code.TARGETS, None, "names mlp_fc1"),
]


def test_every_fault_of_an_adapter_is_named(lora):
    assert verify(lora(), deep=True).sound

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


def with_norm(state):
    state[NORM] = torch.zeros(32)


DAMAGE += [
    ("nemo2_adapter", without(QKV_OUT), Code.HALF, QKV_OUT, "is missing"),
    ("nemo2_adapter", replaced(2, 3, 32), Code.SHAPE, QKV_IN, "[2, 3, 32]", "for [2, 4, 32]"),
    ("nemo2_adapter", replaced(2, 4, 31), Code.SHAPE, QKV_IN, "asks for [2, 4, 32]"),
    ("nemo2_adapter", replaced(1, 4, 32), Code.SHAPE, QKV_IN, "asks for [2, 4, 32]"),
    ("nemo2_adapter", replaced(4), Code.SHAPE, QKV_IN, "is [4]"),
    ("nemo2_adapter", with_norm, Code.FOREIGN_TENSOR, NORM, "belongs to no adapter"),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: f"{damage[0]} {damage[2]}")
def test_damage(request, damage):
    fixture, change, *finding = damage
    report = verify(request.getfixturevalue(fixture)(change))
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
