"""Every command that takes a checkpoint verifies it first, from Python too; --trust is explicit."""

import os

import export_samples as adapters
import pytest
import torch
import yaml
from tiny_model import make_tiny_model, write_rows, write_sharded

from workshop_utils.cli import main
from workshop_utils.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.evaluate import evaluate
from workshop_utils.export import export
from workshop_utils.finetune import make_plan
from workshop_utils.generate import load


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.setenv("WORKSHOP_DEVICE", "cpu")
    monkeypatch.delenv("NEMO_PATH", raising=False)
    return tmp_path


@pytest.fixture
def model(root):
    """A Hugging Face model that lost its last bytes."""
    directory = make_tiny_model(root / "hf")
    os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size - 1)
    return directory


@pytest.fixture
def base(root):
    """What the script path takes, with a pickle that would run code."""
    directory = root / "base"
    tokenizer = make_tiny_model(root / "tokenizer")
    write_sharded(directory / "model_weights")
    (directory / "model_config.yaml").write_text(yaml.safe_dump({"tokenizer": {"type": str(tokenizer)}}))
    torch.save({"a": Evil()}, directory / "model_weights" / "common.pt")
    return directory


@pytest.fixture
def adapter(root):
    """A .nemo adapter that is sound but for what its configuration names."""
    config = adapters.config_of(adapters.GQA) | {"optim": {"_target_": "os.system", "command": "echo executed"}}
    return adapters.write_adapter(root / "a.nemo", config, adapters.tensors_of(adapters.GQA))


def test_finetune(root, base, adapter, capsys):
    rows = write_rows(root / "train.jsonl")
    with pytest.raises(UnsafeCheckpoint, match=r"common\.pt.*exec"):
        make_plan([f"model.restore_from_path={base}"], data=rows)
    assert make_plan([f"model.restore_from_path={base}"], data=rows, trust=True).overrides["model.restore_from_path"] == str(
        base
    )
    torch.save({}, base / "model_weights" / "common.pt")
    make_plan([f"model.restore_from_path={base}"], data=rows)
    with pytest.raises(UnsafeCheckpoint, match=r"a\.nemo.*os\.system"):
        make_plan([f"model.restore_from_path={base}", f"model.peft.restore_from_path={adapter}"], data=rows)
    (base / "model_weights" / "common.pt").unlink()
    capsys.readouterr()
    command = ["finetune", "--dry-run", "--data", str(rows), f"model.restore_from_path={base}"]
    assert main(command) == 1
    assert "common.pt is missing" in capsys.readouterr().err
    assert main([*command[:1], "--trust", *command[1:]]) == 0
    assert "warning: unsound: base" in capsys.readouterr().err


def test_export(root, adapter, capsys):
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        export(adapter, "hf-peft")
    assert not (root / "runs").exists()
    assert main(["export", str(adapter), "--to", "hf-peft"]) == 1
    assert "--trust" in capsys.readouterr().err
    assert main(["export", str(adapter), "--to", "hf-peft", "--trust"]) == 0
    assert "warning: UNSAFE: a.nemo" in capsys.readouterr().err


def test_generate(model, adapter, capsys):
    with pytest.raises(DamagedCheckpoint, match="cut off"):
        load(model)
    assert main(["generate", "--model", str(model), "hello"]) == 1
    assert "cut off" in capsys.readouterr().err
    sound = make_tiny_model(model.with_name("sound"))
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        load(sound, adapter)


def test_evaluate(root, model, adapter):
    rows = write_rows(root / "rows.jsonl", 2)
    with pytest.raises(DamagedCheckpoint, match="cut off"):
        evaluate(model, None, rows, rows, root / "out")
    sound = make_tiny_model(model.with_name("sound"))
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        evaluate(sound, adapter, rows, rows, root / "out")
    assert not (root / "out").exists()
