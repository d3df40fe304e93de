"""Whatever takes a checkpoint verifies it first: commands, functions, directories and overrides
that name more than one. --trust is explicit."""

import json
import os
import shutil
import sys
from pathlib import Path

import export_samples as adapters
import pytest
import torch
import yaml
from tiny_model import make_tiny_model, write_rows, write_sharded

from workshop_utils.adapters.export import export
from workshop_utils.checkpoints.convert.bridge import bridge
from workshop_utils.checkpoints.convert.huggingface import (
    _check_written,
    export_huggingface,
    import_checkpoint,
)
from workshop_utils.checkpoints.verify.verify import verify
from workshop_utils.cli import main
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
    WorkshopError,
)
from workshop_utils.inference.evaluate import evaluate
from workshop_utils.inference.generate import as_peft, load
from workshop_utils.inference.nemo1_engine import NemoModel, ask_nemo
from workshop_utils.training.script import make_plan
from workshop_utils.training.script.predict import predict


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
    """A Hugging Face model whose weights are a pickle that would run."""
    directory = make_tiny_model(root / "hf")
    (directory / "model.safetensors").unlink()
    torch.save({"a": Evil()}, directory / "pytorch_model.bin")
    return directory


@pytest.fixture
def nemo2(root, originals):
    """A NeMo 2.0 checkpoint whose io.json would run something."""
    directory = Path(shutil.copytree(originals / "plain", root / "nemo2"))
    io = json.loads((directory / "context" / "io.json").read_text())
    io["extra"] = {"type": "pyref", "module": "os", "name": "system"}
    (directory / "context" / "io.json").write_text(json.dumps(io))
    return directory


@pytest.fixture
def base(root):
    """What the script path takes."""
    directory = root / "base"
    tokenizer = make_tiny_model(root / "tokenizer")
    write_sharded(directory / "model_weights")
    (directory / "model_config.yaml").write_text(
        yaml.safe_dump({"tokenizer": {"type": str(tokenizer)}})
    )
    return directory


@pytest.fixture
def evil_base(base):
    directory = shutil.copytree(base, base.with_name("evil"))
    torch.save({"a": Evil()}, directory / "model_weights" / "common.pt")
    return directory


@pytest.fixture
def adapter(root):
    """A .nemo adapter that is sound but for what its configuration names."""
    config = adapters.config_of(adapters.GQA) | {
        "optim": {"_target_": "os.system", "command": "echo executed"}
    }
    return adapters.write_adapter(root / "a.nemo", config, adapters.tensors_of(adapters.GQA))


@pytest.fixture
def cut_model(root):
    """A Hugging Face model that lost its last bytes."""
    directory = make_tiny_model(root / "cut")
    os.truncate(
        directory / "model.safetensors", (directory / "model.safetensors").stat().st_size - 1
    )
    return directory


def test_import(root, model, capsys):
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin.*exec"):
        import_checkpoint(model, root / "out")
    assert main(["import", str(model), "--out", str(root / "out")]) == 1
    assert "--trust" in capsys.readouterr().err
    assert not (root / "out").exists()


def test_import_to_huggingface(root, nemo2, capsys):
    with pytest.raises(UnsafeCheckpoint, match=r"io\.json.*os\.system"):
        export_huggingface(nemo2, root / "out")
    assert main(["import", "--to-huggingface", str(nemo2), "--out", str(root / "out")]) == 1
    assert "os.system" in capsys.readouterr().err
    assert not (root / "out").exists()


def test_bridge(root, nemo2, capsys):
    with pytest.raises(UnsafeCheckpoint, match=r"io\.json.*os\.system"):
        bridge(nemo2, root / "view")
    assert main(["bridge", str(nemo2), "--out", str(root / "view")]) == 1
    assert not (root / "view").exists()
    assert main(["bridge", str(nemo2), "--out", str(root / "view"), "--trust"]) == 0
    assert "warning: UNSAFE" in capsys.readouterr().err


@pytest.mark.parametrize("way", [NemoModel, ask_nemo])
def test_nemo_itself(evil_base, base, adapter, way):
    with pytest.raises(UnsafeCheckpoint, match=r"common\.pt.*exec"):
        way(evil_base)
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        way(base, adapter)
    assert "nemo.collections.nlp" not in sys.modules


def test_finetune(root, evil_base, adapter, capsys):
    rows = write_rows(root / "train.jsonl")
    words = [f"model.restore_from_path={evil_base}"]
    with pytest.raises(UnsafeCheckpoint, match=r"common\.pt.*exec"):
        make_plan(words, data=rows)
    assert make_plan(words, data=rows, trust=True).overrides["model.restore_from_path"] == str(
        evil_base
    )
    torch.save({}, evil_base / "model_weights" / "common.pt")
    make_plan(words, data=rows)
    with pytest.raises(UnsafeCheckpoint, match=r"a\.nemo.*os\.system"):
        make_plan([*words, f"model.peft.restore_from_path={adapter}"], data=rows)
    (evil_base / "model_weights" / "common.pt").unlink()
    capsys.readouterr()
    command = ["finetune", "--dry-run", "--data", str(rows), *words]
    assert main(command) == 1
    assert "common.pt is missing" in capsys.readouterr().err
    assert main([*command[:1], "--trust", *command[1:]]) == 0
    assert "warning: unsound: evil" in capsys.readouterr().err


def test_export(root, adapter, capsys):
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        export(adapter, "hf-peft")
    assert not (root / "runs").exists()
    assert main(["export", str(adapter), "--to", "hf-peft"]) == 1
    assert "--trust" in capsys.readouterr().err
    assert main(["export", str(adapter), "--to", "hf-peft", "--trust"]) == 0
    assert "warning: UNSAFE: a.nemo" in capsys.readouterr().err


def test_generate(cut_model, adapter, capsys):
    with pytest.raises(DamagedCheckpoint, match="cut off"):
        load(cut_model)
    assert main(["generate", "--model", str(cut_model), "hello"]) == 1
    assert "cut off" in capsys.readouterr().err
    sound = make_tiny_model(cut_model.with_name("sound"))
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        load(sound, adapter)


def test_evaluate(root, cut_model, adapter):
    rows = write_rows(root / "rows.jsonl", 2)
    with pytest.raises(DamagedCheckpoint, match="cut off"):
        evaluate(cut_model, None, rows, rows, root / "out")
    sound = make_tiny_model(cut_model.with_name("sound"))
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        evaluate(sound, adapter, rows, rows, root / "out")
    assert not (root / "out").exists()


@pytest.mark.parametrize("other", ["adapter_config.json", "context/model.yaml"])
def test_a_directory_of_two_formats(root, originals, other):
    """transformers follows an adapter_config.json to another base; verification looks for NeMo
    first."""
    model = make_tiny_model(root / "hf")
    if other == "adapter_config.json":
        (model / other).write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(root / "elsewhere")})
        )
    else:
        shutil.copytree(originals / "plain", model, dirs_exist_ok=True)
    rows = write_rows(root / "rows.jsonl", 2)
    with pytest.raises(WorkshopError):
        load(model)
    with pytest.raises(WorkshopError):
        evaluate(model, None, rows, rows, root / "out")
    if other != "adapter_config.json":
        with pytest.raises(
            UnsupportedCheckpoint,
            match="is a NeMo 2.0 directory.*would be loaded here is a Hugging Face model",
        ):
            import_checkpoint(model, root / "out")
        (model / "adapter_config.json").write_text("{}")
        with pytest.raises(
            UnsupportedCheckpoint, match="would be loaded here is a Hugging Face PEFT"
        ):
            as_peft(model)


@pytest.mark.parametrize(
    "run, key",
    [
        *(
            (run, key)
            for run in (make_plan, predict)
            for key in (
                "++model.restore_from_path",
                "model.peft.restore_from_path",
                "++model.peft.restore_from_path",
            )
        ),
        (make_plan, "+exp_manager.resume_from_checkpoint"),
        (predict, "model.peft.restore_from_ckpt"),
    ],
)
def test_other_spellings_of_what_is_loaded(root, base, evil_base, run, key):
    rows = write_rows(root / "train.jsonl")
    with pytest.raises(WorkshopError, match=r"exec|ends up as"):
        words = [f"{key}='{evil_base}'"]
        if key.endswith("ckpt"):
            torch.save(
                {"state_dict": {}, "pytorch-lightning_version": "2.4.0", "a": Evil()},
                root / "a.ckpt",
            )
            words = [f"{key}.checkpoint_dir={root}", f"{key}.checkpoint_name=a.ckpt"]
        run([f"model.restore_from_path={base}", *words], data=rows)


def test_a_module_that_peft_would_import(root):
    from safetensors.numpy import save_file

    save_file({}, root / "adapter_model.safetensors")
    for name, count in (("antigravity", 1), ("megatron.core", 0)):
        (root / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 4, "megatron_core": name})
        )
        assert (
            len([finding for finding in verify(root).findings if "antigravity" in str(finding)])
            == count
        )


@pytest.mark.parametrize("field, value", [("rotary_percent", 0.5), ("rotary_interleaved", True)])
def test_what_nemo_s_exporter_leaves_out_is_refused(tmp_path, field, value):
    """Copied from its source: the exporter of Llama writes nothing of them."""
    file = tmp_path / "model.yaml"
    target = "nemo.collections.llm.gpt.model.llama.LlamaModel"
    file.write_text(yaml.safe_dump({"_target_": target, "config": {field: value}}))
    with pytest.raises(UnsupportedCheckpoint, match=f"config.{field} is {value}"):
        _check_written(file)
    file.write_text(yaml.safe_dump({"_target_": target, "config": {field: None}}))
    _check_written(file)
