"""Damage to Hugging Face models, PEFT and NeMo adapters, .nemo archives and GGUF files is found and
named."""

import io
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
from safetensors.torch import load_file, save_file

from workshop_utils.checkpoints.verify.verify import verify
from workshop_utils.core.errors import UnsafeCheckpoint


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


def found(report, tensor: str | None, *words: str) -> bool:
    named = [finding for finding in report.findings if tensor is None or finding.tensor == tensor]
    return any(all(word in str(finding) for word in words) for finding in named)


def rewrite_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_header(file: Path, change, more: bytes = b"") -> None:
    """Apply ``change`` to the header of a safetensors file, and put ``more`` after its data."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :] + more)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("form", ["whole", "parts", "bin"])
def test_genuine_hugging_face_models_are_sound(model, form):
    report = verify(model(form), deep=True)
    assert report.findings == []
    assert report.notes == []


def test_a_truncated_safetensors_file(model):
    path = model("whole")
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    report = verify(path)
    last = max(
        json.loads(
            file.read_bytes()[8 : 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]]
        ).items(),
        key=lambda item: item[1].get("data_offsets", [0, 0])[1],
    )[0]
    assert found(report, last, "cut off")


def test_bytes_that_belong_to_no_tensor(model):
    path = model("whole")
    rewrite_header(path / "model.safetensors", lambda header: header.pop(DOWN))
    report = verify(path)
    assert found(report, None, "model.safetensors: bytes [", "belong to no tensor")
    assert found(report, "model.layers.*.mlp.down_proj.weight", "is missing in layer 1")
    path = shutil.copytree(path, path.with_name("more"))
    rewrite_header(path / "model.safetensors", lambda header: None, more=b"1234")
    assert found(verify(path), None, "the last 4 bytes belong to no tensor")


def test_overlapping_ranges_of_safetensors(model):
    path = model("whole")

    def change(header):
        header[DOWN]["data_offsets"] = header["model.layers.0.mlp.down_proj.weight"]["data_offsets"]

    rewrite_header(path / "model.safetensors", change)
    report = verify(path)
    assert any(
        "overlap" in str(finding)
        and DOWN in str(finding)
        and "layers.0.mlp.down_proj" in str(finding)
        for finding in report.findings
    )


def test_a_shape_that_the_configuration_contradicts(model):
    path = model("whole")
    rewrite_json(path / "config.json", lambda config: config.update(intermediate_size=256))
    assert found(verify(path), DOWN, "[64, 128]", "has to be [64, 256]")
    rewrite_json(
        path / "config.json",
        lambda config: config.update(intermediate_size=128, num_hidden_layers=3),
    )
    assert found(
        verify(path), "model.layers.*.mlp.down_proj.weight", "is missing in layer 2", "3 layers"
    )


def test_one_layer_of_another_dtype(model):
    path = model("whole")
    state = load_file(path / "model.safetensors")
    state[DOWN] = state[DOWN].half()
    save_file(state, path / "model.safetensors")
    report = verify(path)
    assert [finding.tensor for finding in report.findings] == [DOWN]
    assert found(report, DOWN, "is float16; in the other layers it is float32")


@pytest.mark.parametrize("form", ["whole", "bin"])
def test_a_nan_in_one_layer(model, form):
    path = model(form)
    file = path / ("model.safetensors" if form == "whole" else "pytorch_model.bin")
    state = load_file(file) if form == "whole" else torch.load(file, weights_only=True)
    state[DOWN][5, 7] = float("nan")
    save_file(state, file) if form == "whole" else torch.save(state, file)
    assert verify(path).findings == []
    report = verify(path, deep=True)
    assert [finding.tensor for finding in report.findings] == [DOWN]
    assert found(report, DOWN, "nan at [5, 7]")


def test_a_missing_part(model):
    path = model("parts")
    parts = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    (path / parts[DOWN]).unlink()
    assert found(verify(path), None, parts[DOWN], "is missing")


def test_an_index_that_disagrees_with_the_parts(model):
    path = model("parts")
    index = path / "model.safetensors.index.json"
    parts = json.loads(index.read_text())["weight_map"]
    other = next(part for part in parts.values() if part != parts[DOWN])
    rewrite_json(index, lambda content: content["weight_map"].update({DOWN: other}))
    report = verify(path)
    assert found(report, DOWN, f"is in {other}, and it is not")
    assert found(report, DOWN, f"{parts[DOWN]} holds {DOWN}", f"has in {other}")
    rewrite_json(index, lambda content: content["weight_map"].pop(DOWN))
    assert found(verify(path), DOWN, f"{parts[DOWN]} holds {DOWN}", "has nowhere")


def test_two_parts_swapped(model):
    path = model("parts")
    first, second, *_ = sorted(path.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert found(verify(path), None, "says that", "and it is not")


def test_a_bin_that_would_run_code(model):
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    path = model("bin")
    torch.save({"a": Evil()}, path / "pytorch_model.bin")
    report = verify(path)
    assert isinstance(report.worst, UnsafeCheckpoint)
    assert "exec" in str(report.worst)


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


def test_a_genuine_peft_adapter_is_sound(peft):
    assert verify(peft, deep=True).findings == []


def rewrite_state(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        (
            lambda state: state.pop(HALF.format("B")),
            HALF.format("B"),
            ("is missing; the other half",),
        ),
        (
            lambda state: state.update({HALF.format("A"): torch.zeros(3, 32)}),
            HALF.format("A"),
            ("[3, 32]", "r = 4"),
        ),
        (
            lambda state: [state.pop(HALF.format(half)) for half in "AB"],
            HALF.format("A").replace(".1.", ".*."),
            ("is missing in layer 1",),
        ),
        (
            lambda state: state.update({HALF.format("A")[17:]: state.pop(HALF.format("A"))}),
            HALF.format("A")[17:],
            ("base_model.model",),
        ),
        (
            lambda state: [state.pop(key) for key in list(state) if "down_proj" in key],
            None,
            ("names the module down_proj",),
        ),
    ],
)
def test_damaged_peft_adapters(peft, change, tensor, words):
    rewrite_state(peft / "adapter_model.safetensors", change)
    assert found(verify(peft), tensor, *words)


def test_a_peft_configuration_that_disagrees(peft):
    rewrite_json(peft / "adapter_config.json", lambda config: config.update(r=8))
    assert found(verify(peft), HALF.format("A"), "r = 8")
    rewrite_json(
        peft / "adapter_config.json",
        lambda config: config.update(rank_pattern={"q_proj": 4, "layers.0.mlp.down_proj": 4}),
    )
    named = {finding.tensor for finding in verify(peft).findings}
    assert named == {
        f"base_model.model.model.layers.1.mlp.down_proj.lora_{half}.weight" for half in "AB"
    }
    rewrite_json(
        peft / "adapter_config.json",
        lambda config: config.update(r=4, rank_pattern={}, target_modules=["q_proj"]),
    )
    assert found(verify(peft), None, "down_proj", "does not name in target_modules")


@pytest.fixture
def lora(root):
    """A LoRA adapter as the script path writes it, all targets; called with a change to its
    configuration and tensors."""

    def write(change=lambda config, state: None) -> Path:
        config, state = (
            adapters.config_of(adapters.GQA, adapters.ALL),
            adapters.tensors_of(adapters.GQA, adapters.ALL),
        )
        change(config, state)
        return adapters.write_adapter(root / "lora.nemo", config, state)

    return write


def test_a_genuine_adapter_of_the_script_path_is_sound(lora):
    assert verify(lora(), deep=True).findings == []


OUT = "layers.1.self_attention.adapter_layer.lora_kqv_adapter.linear_out.weight"


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        (
            lambda config, state: state.pop(f"model.decoder.{OUT}"),
            OUT,
            ("layer 1, attention_qkv has no linear_out.weight",),
        ),
        (
            lambda config, state: state.update({f"model.decoder.{OUT}": torch.zeros(64, 3)}),
            OUT,
            ("[64, 3]", "[64, 4]"),
        ),
        (
            lambda config, state: config.update(hidden_size=48),
            OUT.replace("out", "in"),
            ("asks for [4, 48]",),
        ),
        (
            lambda config, state: config.update(num_layers=3),
            None,
            ("layer 2 has no adapter for mlp_fc1",),
        ),
        (
            lambda config, state: config.update(num_layers=10**12),
            None,
            ("states 1,000,000,000,000 layers",),
        ),
        (
            lambda config, state: config["peft"]["lora_tuning"].update(adapter_dim=8),
            OUT,
            ("asks for [64, 8]",),
        ),
        (
            lambda config, state: config["peft"]["lora_tuning"].update(target_modules=["mlp_fc1"]),
            None,
            ("target_modules names mlp_fc1",),
        ),
    ],
)
def test_damaged_adapters_of_the_script_path(lora, change, tensor, words):
    assert found(verify(lora(change)), tensor, *words)


def test_every_fault_of_an_adapter_is_named(lora):
    def change(config, state):
        for layer in range(2):
            state.pop(
                f"model.decoder.layers.{layer}.mlp.adapter_layer.lora_4htoh_adapter.linear_in.weight"
            )
        state[f"model.decoder.{OUT}"] = torch.zeros(64, 3)

    assert len(verify(lora(change)).findings) == 3


def test_parts_of_ranks_in_an_archive(root):
    config = adapters.config_of(adapters.GQA, adapters.ALL) | {"tensor_model_parallel_size": 2}
    parts = [adapters.saved(adapters.tensors_of(adapters.GQA, adapters.ALL)) for _ in range(2)]
    members = {"model_config.yaml": yaml.safe_dump(config).encode()}
    members |= {f"mp_rank_{rank:02}/model_weights.ckpt": part for rank, part in enumerate(parts)}
    path = adapters.write_tar(root / "parts.nemo", members)
    assert verify(path).findings == []
    lacking = adapters.tensors_of(adapters.GQA, adapters.ALL)
    lacking.pop(f"model.decoder.{OUT}")
    path = adapters.write_tar(
        root / "half.nemo", members | {"mp_rank_01/model_weights.ckpt": adapters.saved(lacking)}
    )
    assert found(verify(path), f"model.decoder.{OUT}", "mp_rank_01/model_weights.ckpt has no")
    members.pop("mp_rank_01/model_weights.ckpt")
    assert found(
        verify(adapters.write_tar(root / "one.nemo", members)),
        None,
        "lacks the part of tensor-parallel rank 1",
    )


def base_tensors() -> dict[str, tuple[int, int]]:
    """Module -> (out, in) of the tiny Llama of checkpoint_samples."""
    return {
        "self_attention.linear_qkv": ((HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN),
        "mlp.linear_fc1": (2 * FFN, HIDDEN),
        "mlp.linear_fc2": (HIDDEN, FFN),
    }


@pytest.fixture
def nemo2_adapter(root):
    """A NeMo 2.0 adapter directory, written by torch.distributed.checkpoint; called with a change
    to its tensors."""

    def write(change=lambda state: None) -> Path:
        import torch.distributed.checkpoint as dcp

        path = root / "adapter"
        shutil.rmtree(path, ignore_errors=True)
        write_context(path, "plain")
        state = {}
        for module, (rows, columns) in base_tensors().items():
            stem = f"module.decoder.layers.{module}.adapter"
            state[f"{stem}.linear_in.weight"] = torch.randn(LAYERS, 4, columns)
            state[f"{stem}.linear_out.weight"] = torch.randn(LAYERS, rows, 4)
        change(state)
        dcp.save(state, checkpoint_id=path / "weights", no_dist=True)
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (path / "weights" / "metadata.json").write_text(json.dumps(backend))
        torch.save({}, path / "weights" / "common.pt")
        (path / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/gone/base"}')
        return path

    return write


def test_a_nemo2_adapter(nemo2_adapter):
    report = verify(nemo2_adapter(), deep=True)
    assert report.findings == []
    assert report.notes == ["the base model is recorded as /gone/base, which is not here."]


QKV = "module.decoder.layers.self_attention.linear_qkv.adapter.linear_{}.weight"


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        (
            lambda state: state.pop(QKV.format("out")),
            QKV.format("out"),
            ("is missing; the other half",),
        ),
        (
            lambda state: state.update({QKV.format("in"): torch.zeros(2, 3, 32)}),
            QKV.format("out"),
            ("its base asks for [2, 96, 3]",),
        ),
        (
            lambda state: state.update({QKV.format("in"): torch.zeros(2, 3, 32)}),
            QKV.format("in"),
            ("rank 3", "4"),
        ),
        (
            lambda state: state.update({QKV.format("in"): torch.zeros(1, 4, 32)}),
            QKV.format("in"),
            ("not the 2 layers",),
        ),
        (
            lambda state: state.update({"module.decoder.final_layernorm.weight": torch.zeros(32)}),
            "module.decoder.final_layernorm.weight",
            ("belongs to no adapter",),
        ),
    ],
)
def test_damaged_nemo2_adapters(nemo2_adapter, change, tensor, words):
    assert found(verify(nemo2_adapter(change)), tensor, *words)


@pytest.fixture
def gguf(root):
    tiny_gguf.write_gguf(root / "tiny.gguf")
    return root / "tiny.gguf"


def test_a_gguf(gguf):
    report = verify(gguf, deep=True)
    assert report.findings == []
    size = gguf.stat().st_size
    os.truncate(gguf, size - 200)
    assert found(verify(gguf), None, "cut off")


def test_a_lightning_checkpoint(root):
    state = {f"layers.{layer}.weight": torch.randn(3, 4) for layer in range(2)}
    content = {
        "state_dict": state,
        "epoch": 1,
        "global_step": 7,
        "pytorch-lightning_version": "2.4.0",
        "loops": {},
        "callbacks": {},
    }
    torch.save(content, root / "a.ckpt")
    assert verify(root / "a.ckpt", deep=True).findings == []
    state["layers.1.weight"][2, 1] = float("inf")
    torch.save(content, root / "a.ckpt")
    assert found(verify(root / "a.ckpt", deep=True), None, "inf at [2, 1]")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    (root / "a.ckpt").write_bytes(buffer.getvalue()[:-50])
    assert verify(root / "a.ckpt").findings


def test_tied_tensors_of_torch_save_may_share_their_bytes(root, models):
    """Weights that are tied are stored once by torch.save."""
    weight = torch.randn(3, 4)
    torch.save(
        {"state_dict": {"a": weight, "b": weight}, "pytorch-lightning_version": "2.4.0"},
        root / "tied.ckpt",
    )
    assert verify(root / "tied.ckpt", deep=True).findings == []


@pytest.mark.parametrize("scheme", ["ia3", "adapter", "ptuning"])
def test_an_adapter_of_another_kind_than_lora_is_sound(root, scheme):
    """Its own rules are not known here, and that is said."""
    config = adapters.config_of(adapters.GQA)
    config["peft"]["peft_scheme"] = scheme
    file = adapters.write_adapter(
        root / "a.nemo",
        config,
        {f"model.decoder.layers.{n}.adapter_layer.{scheme}.weight": torch.ones(4) for n in (0, 1)},
    )
    report = verify(file)
    assert report.sound
    assert any(
        f"peft_scheme is {scheme}; the rules of lora are known here" in line
        for line in report.untold
    )
