"""Import, bridge, train, export, prove: the whole chain on a two-layer model, with NeMo doing the
work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from places import ROOT
from tiny_model import make_tiny_model, write_rows

from workshop_utils.adapters.export import export
from workshop_utils.checkpoints.convert.bridge import bridge
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.verify.verify import verify
from workshop_utils.core.errors import TrainingFailed
from workshop_utils.inference.nemo1_engine import nemo_logits
from workshop_utils.runtime.processes import run_quietly
from workshop_utils.training import script
from workshop_utils.training.script.plan import SCRIPT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama 3.1 (scaled rope, grouped queries) imported by NeMo and bridged."""
    folder = tmp_path_factory.mktemp("chain")
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    make_tiny_model(folder / "hf" / "tiny", rope_scaling=scaling)
    run_quietly("import", str(folder / "hf" / "tiny"), "--out", str(folder / "nemo2" / "tiny"))
    bridge(folder / "nemo2" / "tiny", folder / "bridged" / "tiny")
    write_rows(folder / "rows.jsonl", 32)
    return folder


@pytest.fixture(scope="module")
def trained(tiny):
    """The plan of a finished run of 12 steps, and its adapter."""
    os.environ["WORKSHOP_DEVICE"] = "cpu"
    plan = script.make_plan(overrides(tiny), data=tiny / "rows.jsonl")
    return plan, script.finetune(plan, progress=False)


def overrides(tiny: Path, **changes) -> list[str]:
    settings = {
        "model.restore_from_path": tiny / "bridged" / "tiny",
        "exp_manager.exp_dir": tiny / "runs",
        "exp_manager.name": "lora",
        "trainer.max_steps": 12,
        "trainer.val_check_interval": 6,
        "model.peft.lora_tuning.adapter_dim": 8,
        "model.peft.lora_tuning.alpha": 16,
        "model.optim.lr": "2e-2",
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items()]


def test_the_checkpoint_is_genuine(tiny):
    checkpoint = nemo2.read(tiny / "nemo2" / "tiny")
    assert checkpoint.model["_target_"] == "nemo.collections.llm.gpt.model.llama.LlamaModel"
    assert checkpoint.model["config"]["_target_"].endswith("Llama31Config")
    context = {path.name for path in (tiny / "nemo2/tiny/context").iterdir()}
    assert {"model.yaml", "io.json", "nemo_tokenizer"} <= context
    weights = {".metadata", "metadata.json", "common.pt", "__0_0.distcp", "__0_1.distcp"}
    assert set(checkpoint.files) == weights
    # io.json and model.yaml name nothing that NeMo does not write.
    assert verify(tiny / "nemo2" / "tiny", deep=True).sound


def test_bridged_logits_equal_hugging_face(tiny):
    hf, ours = logits(tiny)
    assert np.abs(hf).max() > 0.1
    assert np.abs(hf - ours).max() <= 1e-4


def logits(tiny: Path, adapter: Path | None = None, peft: Path | None = None):
    """(transformers, NeMo) logits ``[1, 300, vocabulary]``: long enough for the rope scaling to
    matter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(3, 250, size=(1, 300))
    nemo = nemo_logits(tiny / "bridged" / "tiny", adapter, tokens)
    model = AutoModelForCausalLM.from_pretrained(tiny / "hf" / "tiny", torch_dtype=torch.float32)
    if peft:
        model = PeftModel.from_pretrained(model, peft).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.numpy(), nemo


def test_training_learns_and_reports(trained):
    plan, adapter = trained
    events = script.read_events(plan.events)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == 12 and losses[-1] < losses[0]
    others = [event["event"] for event in events if event["event"] != "step"]
    assert others == ["start", "validation", "validation", "end"]
    assert adapter.name == "lora.nemo" and script.train_seconds(plan) > 0


def test_an_identical_run_is_reused_and_another_is_not(tiny, trained, capsys):
    plan, adapter = trained
    made = adapter.stat().st_mtime_ns
    assert script.finetune(plan, progress=False).stat().st_mtime_ns == made
    assert "an identical run has finished; its adapter is used" in capsys.readouterr().out


def test_the_export_computes_what_nemo_computes(tiny, trained):
    peft = export(trained[1], "hf-peft", out=tiny / "peft")
    base, _ = logits(tiny)
    hf, nemo = logits(tiny, trained[1], peft)
    assert np.abs(hf - base).max() > 0.05, "the adapter has to change something"
    assert np.abs(hf - nemo).max() <= 1e-4


def test_the_bare_link_and_the_plain_checkpoint_do_not_train(tiny, trained):
    plan, _ = trained
    bridge(tiny / "nemo2" / "tiny", link_only=True)
    run = tiny / "runs" / "link"
    base = str(tiny / "nemo2" / "tiny")
    settings = plan.overrides | {"model.restore_from_path": base, "exp_manager.name": "link"}
    words = [f"{key}={value}" for key, value in settings.items()]
    command = script.torchrun(script.script_path(), words)
    status = script.run_logged(command, script.training_environment(run), tiny / "link.log")
    (tiny / "nemo2" / "tiny" / "model_config.yaml").unlink()
    assert status != 0
    assert "unsafe target" in script.failure_cause(tiny / "link.log")


def test_a_failure_is_shown_as_its_cause(tiny):
    words = [*overrides(tiny, exp_manager__name="bad"), "model.optim.name=no_such_optimizer"]
    plan = script.make_plan(words, data=tiny / "rows.jsonl")
    plan.preflight.problems.clear()  # which knows the optimizers, too
    with pytest.raises(TrainingFailed, match="Cannot resolve optimizer.*no_such_optimizer"):
        script.finetune(plan, progress=False)
    assert not plan.adapter.exists()


NEEDED = {
    "import": "modelopt_at_import fusions_off",
    "train": """cuda_calls_do_nothing cuda_method_keeps_the_cpu cuda_literals_in_megatron
        random_states_of_the_gpu lora_mixin_forward strategy_without_apex container_version
        local_layer_spec process_groups_before_the_model parallel_attributes gradient_norm
        cuda_literals_in_nemo""",
}
PROGRAM = """
import sys
from workshop_utils.runtime import nemo_cpu
from workshop_utils.runtime.nemo_cpu import registry
from workshop_utils.runtime.nemo_cpu import (
    megatron_core, nemo2, nemo_script_path, paged_attention, torch_cuda)
if __name__ == '__main__':
    registry.PATCHES[:] = [patch for patch in registry.PATCHES if patch.name != {name!r}]
    sys.argv = {arguments!r}
    {start}
"""


@pytest.mark.parametrize(
    "job, name", [(job, name) for job, names in NEEDED.items() for name in ["", *names.split()]]
)
def test_without_this_patch_the_job_fails(tiny, trained, job, name, tmp_path):
    """Every other patch in place, this one left out: NeMo stops; and with all of them it does
    not."""
    arguments = ["workshop", "import", str(tiny / "hf" / "tiny"), "--out", str(tmp_path / "out")]
    start = "from workshop_utils.cli import main; raise SystemExit(main())"
    if job == "train":
        settings = {
            key: value
            for key, value in trained[0].overrides.items()
            if not key.startswith("exp_manager")
        } | {
            "exp_manager.exp_dir": tmp_path,
            "trainer.max_steps": 1,
            "trainer.val_check_interval": 1,
        }
        arguments = ["train", *(f"{key}={value}" for key, value in settings.items())]
        start = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(name=name, arguments=arguments, start=start))
    environment = {key: value for key, value in os.environ.items() if "inherited" not in value}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    if not name:
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode != 0, f"it works without {name}: delete the patch"


def test_a_checkpoint_moves_with_its_directory(tiny):
    described = yaml.safe_load((tiny / "nemo2/tiny/context/model.yaml").read_text())
    assert not os.path.isabs(described["tokenizer"]["pretrained_model_name"])
    assert str(tiny) not in json.dumps(described)
