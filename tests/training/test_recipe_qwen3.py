"""A tiny Qwen 3 through every phase by the commands that a user types: QK norm, and heads wider
than hidden / heads."""

import json
import subprocess
import sys
from pathlib import Path

import engine_trials
import pytest
from tiny_families import make_tiny_family

from workshop_utils.adapters import proof
from workshop_utils.training.recipe import deliver
from workshop_utils.training.runs.events import read_events

pytestmark = pytest.mark.slow

STEPS, HEAD_DIM = 8, 24
LAYERS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
OPTIONS = f"""
recipe_cls_name: qwen3_600m
max_steps: {STEPS}
val_check_interval: 4
limit_val_batches: 1
micro_batch_size: 2
accumulate_grad_batches: 2
max_seq_length: 64
warmup_steps: 1
learning_rate: 1e-2
lora_dim: 4
lora_alpha: 8.0
lora_target_modules: {LAYERS}
hfdc_split: train
hfdc_train_split_ratio: 0.6
hfdc_input_template: 'Q: {{question}}\\nA:'
hfdc_output_template: ' {{answer}}'
hfdc_num_proc: 1
max_samples: 4
num_tokens_to_generate: 12
inference_max_seq_length: 96
buffer_size_gb: 0.05
max_batch_size: 4
block_size_tokens: 8
"""


def workshop(*words: object) -> str:
    """Standard output of the command; its end and that of standard error if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "workshop_utils", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    """A folder with ``hf``, the configuration ``my.yaml``, and what the command ``all`` made of
    them in ``out``; its output is ``all.txt``."""
    folder = tmp_path_factory.mktemp("qwen3.v1")
    make_tiny_family(folder / "hf", "qwen3")
    rows = [{"question": f"number {i}?", "answer": f"it is {i}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"hf_model_id": "hf", "output_dir": "out", "data_dir": "rows"}
    places |= {"hfdc_dataset_name": "rows.jsonl"}
    lines = [f"{name}: {folder / place}\n" for name, place in places.items()]
    (folder / "my.yaml").write_text(OPTIONS + "".join(lines))
    (folder / "all.txt").write_text(recipe(folder, "all"))
    return folder


def recipe(folder: Path, *words: object) -> str:
    return workshop("recipe", *words, "--preset", "cpu", "--config", folder / "my.yaml")


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_configuration_and_build(qwen3):
    """The plan, and NeMo-Run's whole configuration of it with the imported base."""
    printed = recipe(qwen3, "--dry-run", "--resolve")
    assert "global_batch_size: 4\n" in printed and "# qwen3_600m: Qwen3Config600M" in printed
    sizes = f"qk_layernorm=True kv_channels={HEAD_DIM} hidden_size=64 num_attention_heads=4"
    expected = [*sizes.split(), "accumulate_grad_batches=1"]
    assert [word for word in expected if word not in printed] == []


def test_import_and_data(qwen3):
    lines = (qwen3 / "all.txt").read_text().splitlines()
    phases = [line.removeprefix("== ") for line in lines if line.startswith("== ")]
    assert phases == ["import", "data", "train", "test", "export"]
    described = (qwen3 / "out/imported_hf_ckpt/context/model.yaml").read_text()
    assert "qk_layernorm: true" in described and f"kv_channels: {HEAD_DIM}" in described
    rows = [
        (qwen3 / "rows" / f"{name}.jsonl").read_text().splitlines()
        for name in ("training", "validation", "test")
    ]
    assert list(map(len, rows)) == [24, 8, 8]
    first = json.loads(rows[0][0])
    assert first["input"].startswith("Q: number ") and first["input"].endswith("?\nA:")


def test_training(qwen3):
    events = read_events(qwen3 / "out/nemo_logs/workshop/events.jsonl")
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1, losses
    record = json.loads((qwen3 / "out/nemo_logs/workshop/run.json").read_text())
    assert record["status"] == "finished"
    log = (qwen3 / "out/nemo_logs/workshop/torchrun.log").read_text()
    assert "Missing keys" not in log and "Unexpected keys (for" not in log


def answers(folder: Path, pattern: str) -> list[str]:
    lines = only(folder / "out/predictions", pattern).read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_inference_with_both_engines(qwen3):
    """Of the command: the dynamic engine by ``all``, then the static one. Base and tuned differ,
    the engines do not."""
    dynamic = {name: answers(qwen3, name) for name in ("base.jsonl", "lora--*.jsonl")}
    assert dynamic["base.jsonl"] != dynamic["lora--*.jsonl"] and all(dynamic["lora--*.jsonl"])
    printed = recipe(qwen3, "test", "--inference_engine", "static")
    assert "tuned - base" in printed and "exact match" in printed
    assert {name: answers(qwen3, name) for name in dynamic} == dynamic


def test_export(qwen3):
    """Of the command: merged for transformers (and NeMo 2.0, on the way), then the adapter for
    PEFT; each loads and computes the same."""
    printed = (qwen3 / "all.txt").read_text()
    assert printed.count("re-loaded; its logits differ from NeMo's by at most") == 2
    assert "re-loaded; its logits differ" in recipe(qwen3, "export", "--no_merge")
    exports = qwen3 / "out/exports"
    adapter, merged, model = (only(exports, f"lora--*.{form}") for form in deliver.FORMS)
    assert (merged / "weights/.metadata").is_file()
    assert json.loads((model / "config.json").read_text())["head_dim"] == HEAD_DIM
    layers = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert {name.removesuffix("_proj") for name in layers} == {*"qkvo", "gate", "up", "down"}
    ids, base = [[5, 6, 7, 8, 200, 11, 30, 31]], qwen3 / "hf"
    (tuned,) = proof.logits(model, ids)
    rows = tuned.shape[-1]
    effect = abs(tuned - proof.logits(base, ids)[0][..., :rows]).max()
    assert effect > 0.05, "else the comparisons of this test say nothing"
    adapted = proof.logits((base, adapter), ids)[0][..., :rows]
    assert abs(adapted - tuned).max() < 1e-3 * effect
    # The tolerance of fp32 weights that `deliver` has, a part of the largest logit: here it is also
    # held against NeMo's own.
    trained = only(qwen3, "out/nemo_logs/checkpoints/lora--*[0-9]")
    for checkpoint, its_base in ((merged, None), (trained, qwen3 / "out/imported_hf_ckpt")):
        (logits,) = deliver.nemo_logits(checkpoint, ids, base=its_base)
        apart = abs(logits[..., :rows] - tuned).max()
        assert apart < deliver.TOLERANCE["float32"] * abs(tuned).max()


def test_engines_and_transformers_agree_token_for_token(qwen3, tmp_path):
    """Megatron-Core's engines on the merged NeMo 2.0 checkpoint, transformers on the merged Hugging
    Face model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exports, result = qwen3 / "out/exports", tmp_path / "result.json"
    command = [sys.executable, engine_trials.__file__, str(only(exports, "*.merged")), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    trials = json.loads(result.read_text())
    assert trials["static"] == trials["dynamic"] and any(map(len, trials["static"].values()))
    model = AutoModelForCausalLM.from_pretrained(only(exports, "*.hf_model")).eval()
    tokenizer = AutoTokenizer.from_pretrained(qwen3 / "hf")
    for request, prompt in enumerate(engine_trials.prompts()):
        ids = torch.tensor([tokenizer.encode(prompt)])
        new = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert trials["dynamic"][str(request)] == new, prompt
