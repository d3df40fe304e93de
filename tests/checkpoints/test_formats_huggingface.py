"""Hugging Face directories as transformers and PEFT write them: parts, ``.bin``, kinds of adapters;
nothing heavy is imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
import torch
from export_samples import GQA, config_of, tensors_of, write_adapter
from tiny_model import make_tiny_model

from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.values import read_tensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture
def root(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "hf")
    return tmp_path


def model_of(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def check_values(found, state: dict) -> None:
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        name: tuple(value.shape) for name, value in state.items()
    }
    for tensor in found.tensors:
        assert torch.equal(torch.from_numpy(read_tensor(found, tensor).copy()), state[tensor.name])


@pytest.mark.parametrize("safe", [True, False])
def test_parts_with_an_index(root, safe):
    model = model_of(root / "hf")
    model.save_pretrained(root / "parts", max_shard_size="100KB", safe_serialization=safe)
    found = identify(root / "parts")
    stored = dict(model.state_dict())
    # Tied: transformers leaves it out, in both forms or in one.
    if "lm_head.weight" not in {tensor.name for tensor in found.tensors}:
        del stored["lm_head.weight"]
    assert len({tensor.files[0] for tensor in found.tensors}) > 1
    assert {Path(tensor.files[0]).suffix for tensor in found.tensors} == {
        ".safetensors" if safe else ".bin"
    }
    check_values(found, stored)
    assert found.architecture.tied

    index = next((root / "parts").glob("*.index.json"))
    described = json.loads(index.read_text())
    name = next(iter(described["weight_map"]))
    other = next(
        part for part in described["weight_map"].values() if part != described["weight_map"][name]
    )
    described["weight_map"][name] = other
    index.write_text(json.dumps(described))
    with pytest.raises(DamagedCheckpoint, match=f"says that {name} is in {other}, and it is not"):
        identify(root / "parts")
    faults = []
    assert identify(root / "parts", faults.append).tensors
    assert [fault.tensor for fault in faults] == [name]

    described["weight_map"][name] = str(
        next(part for part in described["weight_map"].values() if part != other)
    )
    (root / "parts" / other).unlink()
    faults = []
    found = identify(root / "parts", faults.append)
    assert f"{other} is missing" in str(faults[0])
    lost = {tensor for tensor, part in described["weight_map"].items() if part == other}
    assert lost <= {fault.tensor for fault in faults}
    assert found.tensors


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_bin_is_never_run(root):
    (root / "hf" / "model.safetensors").unlink()
    torch.save({"a": Evil()}, root / "hf" / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin.*exec"):
        identify(root / "hf")


def test_every_damaged_tensor_is_reported(root):
    file = root / "hf" / "model.safetensors"
    names = {tensor.name for tensor in identify(root / "hf").tensors}
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 70_000)
    faults = []
    found = identify(root / "hf", faults.append)
    assert len(faults) > 1
    assert {fault.tensor for fault in faults} | {tensor.name for tensor in found.tensors} == names


def adapter(root: Path, name: str, safe: bool = True, **changes) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
        }
        | changes
    )
    adapted = get_peft_model(model_of(root / "hf"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(root / "hf")
    adapted.save_pretrained(root / name, safe_serialization=safe)
    return root / name


def test_adapters_of_peft(root):
    found = identify(adapter(root, "bin", safe=False))
    assert (found.adapter.rank, found.adapter.variant, found.adapter.base_is_here) == (
        4,
        "LoRA",
        True,
    )
    assert {tensor.files[0] for tensor in found.tensors} == {"adapter_model.bin"}
    check_values(found, torch.load(root / "bin" / "adapter_model.bin", weights_only=True))
    refused = {reader.name for reader in loads_in(found) if reader.answer == "no"}
    assert refused == {"NeMo 2.0 API", "Megatron-Bridge"}
    shutil.rmtree(root / "hf" / "nothing", ignore_errors=True)
    (root / "hf").rename(root / "moved")
    assert (
        identify(root / "bin").adapter.base_is_here is None
        or not identify(root / "bin").adapter.base_is_here
    )


def test_dora_and_different_ranks(root):
    found = identify(adapter(root, "dora", use_dora=True))
    assert found.adapter.variant == "DoRA"
    refused = {reader.name for reader in loads_in(found) if reader.answer == "no"}
    assert {"vLLM", "TensorRT-LLM", "NIM 1.x", "NIM 2.x"} <= refused
    found = identify(adapter(root, "ranks", rank_pattern={"v_proj": 8}))
    assert found.notes == ("its modules have different ranks: 4, 8",)


def test_what_the_configuration_of_an_adapter_lacks_is_in_its_tensors(root):
    path = adapter(root, "a", target_modules="all-linear")
    config = json.loads((path / "adapter_config.json").read_text())
    for name in ("r", "target_modules", "use_dora"):
        del config[name]
    (path / "adapter_config.json").write_text(json.dumps(config))
    found = identify(path).adapter
    assert (found.rank, found.variant) == (4, "LoRA")
    assert found.targets == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {"a": []}}', '{"weight_map": {"a": "b"}}', "["]
)
def test_an_index_beside_one_file_is_not_looked_at(root, index):
    (root / "hf" / "model.safetensors.index.json").write_text(index)
    assert identify(root / "hf").tensors


def test_code_beside_the_weights_is_named(root):
    (root / "hf" / "modeling_x.py").write_text("raise SystemExit('executed')")
    assert any("modeling_x.py" in note for note in identify(root / "hf").notes)


def test_nothing_heavy_is_imported_for_any_format(root, originals):
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "pytorch-lightning_version": "2.4.0"}, root / "a.ckpt"
    )
    tiny_gguf.write_gguf(root / "a.gguf")
    write_adapter(root / "a.nemo", config_of(GQA), tensors_of(GQA))
    code = (
        "import sys\nfrom workshop_utils.checkpoints.formats.identify import identify\nfrom "
        "workshop_utils.adapters.loads_in import loads_in\nfor path in sys.argv[1:]: "
        "loads_in(identify(path))\nprint(sorted({'torch', 'numpy', 'nemo', 'megatron', "
        "'transformers', 'gguf', 'safetensors', 'zarr'} & set(sys.modules)))"
    )
    paths = [
        root / "a.ckpt",
        root / "a.gguf",
        root / "a.nemo",
        root / "hf",
        originals / "gpu",
        adapter(root, "peft"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
