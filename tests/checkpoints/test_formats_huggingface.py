"""Hugging Face directories as transformers and PEFT write them: parts, ``.bin``, kinds of adapters;
nothing heavy is imported."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
import torch
from export_samples import GQA, config_of, tensors_of, write_adapter
from reading import Evil, answers, check_values, shapes

from workshop_utils.checkpoints.formats import huggingface
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint


@pytest.fixture
def hf(tiny, root):
    return Path(shutil.copytree(tiny, root / "hf"))


def model_of(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def test_a_model_and_its_rope(hf):
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        rope_scaling=scaling
        | {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
        rope_theta=5000.0,
        tie_word_embeddings=False,
        **counts,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(hf)
    checkpoint = identify(hf)
    assert checkpoint.format == "Hugging Face model directory (llama)"
    assert shapes(checkpoint.tensors) == shapes(model.state_dict())
    assert checkpoint.parameters == model.num_parameters()
    sizes = checkpoint.architecture
    assert (sizes.layers, sizes.groups, sizes.head_dim, sizes.ffn) == (2, 2, 8, 48)
    assert (sizes.vocabulary, sizes.tied, sizes.rope_base) == (64, False, 5000.0)
    assert sizes.rope_scaling == scaling | {"scale_factor": 8.0, "old_context_len": 64}


@pytest.mark.parametrize("safe", [True, False])
def test_parts_with_an_index(hf, root, safe):
    model, parts = model_of(hf), root / "parts"
    model.save_pretrained(parts, max_shard_size="100KB", safe_serialization=safe)
    checkpoint = identify(parts)
    stored = dict(model.state_dict())
    # Tied: transformers leaves it out, in both forms or in one.
    if "lm_head.weight" not in shapes(checkpoint.tensors):
        del stored["lm_head.weight"]
    files = {Path(tensor.files[0]) for tensor in checkpoint.tensors}
    assert len(files) > 1
    assert {file.suffix for file in files} == {".safetensors" if safe else ".bin"}
    check_values(checkpoint, stored)
    assert checkpoint.architecture.tied

    index = next(parts.glob("*.index.json"))
    described = json.loads(index.read_text())
    places = described["weight_map"]
    name, own = next(iter(places.items()))
    other = next(part for part in places.values() if part != own)
    index.write_text(json.dumps(described | {"weight_map": places | {name: other}}))
    with pytest.raises(DamagedCheckpoint, match=f"says that {name} is in {other}, and it is not"):
        identify(parts)
    faults = []
    assert identify(parts, faults.append).tensors
    assert [fault.tensor for fault in faults] == [name]

    (parts / other).unlink()
    faults = []
    assert identify(parts, faults.append).tensors
    assert f"{other} is missing" in str(faults[0])
    lost = {tensor for tensor, part in places.items() if part == other}
    assert lost <= {fault.tensor for fault in faults}
    index.write_text(json.dumps({"weight_map": {"a": "../hf/model.safetensors"}}))
    with pytest.raises(UnsafeCheckpoint, match="no file beside it"):
        identify(parts)


def test_a_bin_is_never_run(hf):
    (hf / "model.safetensors").unlink()
    torch.save({"a": Evil()}, hf / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin.*exec"):
        identify(hf)


def test_damaged_safetensors(hf):
    file = hf / "model.safetensors"
    whole = file.read_bytes()
    broken = [b"", whole[:5], whole[:100], whole[:-1], struct.pack("<Q", 2**63) + whole[8:]]
    for content in (*broken, struct.pack("<Q", 3) + b"[1]"):
        file.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors"):
            huggingface.read_safetensors(file)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DamagedCheckpoint, match="needs 8"):
        huggingface.read_safetensors(file)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="has no weights"):
        identify(hf)


def test_every_damaged_tensor_is_reported(hf):
    file = hf / "model.safetensors"
    names = set(shapes(identify(hf).tensors))
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 70_000)
    faults = []
    rest = set(shapes(identify(hf, faults.append).tensors))
    assert len(faults) > 1
    assert {fault.tensor for fault in faults} | rest == names


def adapter(hf: Path, name: str, safe: bool = True, **changes) -> Path:
    from peft import LoraConfig, get_peft_model

    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    adapted = get_peft_model(model_of(hf), LoraConfig(task_type="CAUSAL_LM", **usual | changes))
    adapted.peft_config["default"].base_model_name_or_path = str(hf)
    adapted.save_pretrained(hf.parent / name, safe_serialization=safe)
    return hf.parent / name


@pytest.mark.parametrize("safe", [True, False])
def test_adapters_of_peft(hf, safe):
    from safetensors.torch import load_file

    path = adapter(hf, "adapter", safe)
    checkpoint = identify(path)
    assert checkpoint.format == "Hugging Face PEFT adapter directory (LORA)"
    told = checkpoint.adapter
    assert (told.rank, told.alpha, told.targets) == (4, 8, ("q_proj", "v_proj"))
    assert (told.variant, told.base, told.base_is_here) == ("LoRA", str(hf), True)
    name = "adapter_model.safetensors" if safe else "adapter_model.bin"
    assert {tensor.files[0] for tensor in checkpoint.tensors} == {name}
    read = load_file if safe else torch.load
    check_values(checkpoint, read(path / name))
    refusing = {name for name, (answer, _) in answers(checkpoint).items() if answer == "no"}
    assert refusing == {"NeMo 2.0 API", "Megatron-Bridge"}
    hf.rename(hf.parent / "moved")
    assert not identify(path).adapter.base_is_here


def test_dora_and_different_ranks(hf):
    checkpoint = identify(adapter(hf, "dora", use_dora=True))
    assert checkpoint.adapter.variant == "DoRA"
    refusing = {name for name, (answer, _) in answers(checkpoint).items() if answer == "no"}
    assert {"vLLM", "TensorRT-LLM", "NIM 1.x", "NIM 2.x"} <= refusing
    checkpoint = identify(adapter(hf, "ranks", rank_pattern={"v_proj": 8}))
    assert checkpoint.notes == ("its modules have different ranks: 4, 8",)


def test_what_the_configuration_of_an_adapter_lacks_is_in_its_tensors(hf):
    path = adapter(hf, "a", target_modules="all-linear")
    config = json.loads((path / "adapter_config.json").read_text())
    for name in ("r", "target_modules", "use_dora"):
        del config[name]
    (path / "adapter_config.json").write_text(json.dumps(config))
    told = identify(path).adapter
    assert (told.rank, told.variant) == (4, "LoRA")
    modules = ("down", "gate", "k", "o", "q", "up", "v")
    assert told.targets == tuple(f"{name}_proj" for name in modules)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {"a": []}}', '{"weight_map": {"a": "b"}}', "["]
)
def test_an_index_beside_one_file_is_not_looked_at(hf, index):
    (hf / "model.safetensors.index.json").write_text(index)
    (hf / "modeling_x.py").write_text("raise SystemExit('executed')")
    checkpoint = identify(hf)
    assert checkpoint.tensors
    assert any("modeling_x.py" in note for note in checkpoint.notes)


LIGHT = """
import sys
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.adapters.loads_in import loads_in
for path in sys.argv[1:]: loads_in(identify(path))
heavy = {"torch", "numpy", "nemo", "megatron", "transformers", "gguf", "safetensors", "zarr"}
print(sorted(heavy & set(sys.modules)))
"""


def test_nothing_heavy_is_imported_for_any_format(hf, root, originals):
    state = {"state_dict": {"a": torch.ones(2)}, "pytorch-lightning_version": "2.4.0"}
    torch.save(state, root / "a.ckpt")
    tiny_gguf.write_gguf(root / "a.gguf")
    write_adapter(root / "a.nemo", config_of(GQA), tensors_of(GQA))
    paths = [root / "a.ckpt", root / "a.gguf", root / "a.nemo", hf, originals / "gpu"]
    command = [sys.executable, "-c", LIGHT, *paths, adapter(hf, "peft")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
