"""One field of a user's file after another with a value that nobody expects there: each command
ends with its answer or a sentence, never with a traceback. The choice of fields is drawn, the same
each time."""

import json
import os
import random
import shutil
import traceback
from pathlib import Path

import pytest
import yaml
from export_samples import ALL, GQA, config_of, tensors_of, write_adapter

from workshop_utils import cli
from workshop_utils.adapters.export import export

VALUES = (..., None, "x", "", 7, -1, 0, 2.5, float("inf"), 10**18, True, [], ["x"], {})
"""``...`` takes the field out."""

#: Command, sample, file; how many fields in a quick run and in a long one.
CASES = {
    "inspect": (["inspect", "{}"], "model", "config.json", 40, 400),
    "verify": (["verify", "{}"], "model", "config.json", 40, 400),
    "verify tokenizer": (["verify", "{}"], "model", "tokenizer_config.json", 40, 400),
    "generate": (["generate", "--model", "{}", "--max-new-tokens", "2", "hello"], "model",
                 "config.json", 12, 250),
    "generate tokenizer": (["generate", "--model", "{}", "--max-new-tokens", "2", "hello"], "model",
                           "tokenizer_config.json", 12, 250),
    "generation": (["generate", "--model", "{}", "--max-new-tokens", "2", "hello"], "model",
                   "generation_config.json", 12, 76),
    "conform": (["conform", "{}", "--reader", "peft"], "adapter", "adapter_config.json", 60, 400),
    "stage": (["nim", "stage", "{}", "--name", "a", "--store", "store"], "adapter",
              "adapter_config.json", 40, 400),
    "export": (["export", "{}", "--to", "hf-peft", "--out", "out", "--overwrite"], "adapter",
               "adapter_config.json", 20, 400),
    "migrate": (["migrate", "{}"], "settings", "settings.yaml", 60, 600),
}  # fmt: skip
SETTINGS = """
name: x
trainer: {devices: 2, precision: bf16, max_steps: 100, gradient_clip_val: 0.5}
model:
  restore_from_path: /m/llama.nemo
  tensor_model_parallel_size: 2
  optim: {name: fused_adam, lr: 1e-4, sched: {name: CosineAnnealing, warmup_steps: 10}}
  peft: {peft_scheme: lora, lora_tuning: {adapter_dim: 8, adapter_dropout: 0.1}}
  data: {train_ds: {file_names: [a.jsonl], global_batch_size: 128, micro_batch_size: 1}}
exp_manager: {explicit_log_dir: /x, create_early_stopping_callback: true}
"""


def places(value, above=()):
    """The path to each field in ``value``, of lists the first two."""
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value[:2]) if isinstance(value, list) else inner
    for key, its in inner:
        yield (*above, key)
        yield from places(its, (*above, key))


def changed(content, place, value):
    content = json.loads(json.dumps(content))
    *above, last = place
    at = content
    for key in above:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return content


@pytest.fixture(scope="module")
def samples(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    source = write_adapter(folder / "a.nemo", config_of(GQA, ALL), tensors_of(GQA, ALL))
    model = shutil.copytree(tiny, folder / "model")
    ids = {"bos_token_id": 1, "eos_token_id": [2], "transformers_version": "4.51.3"}
    (model / "generation_config.json").write_text(json.dumps(ids))
    settings = folder / "settings"
    settings.mkdir()
    (settings / "settings.yaml").write_text(SETTINGS)
    return {
        "model": model,
        "adapter": export(source, "hf-peft", folder / "adapter"),
        "settings": settings,
    }


def run_all(samples, folder: Path, name: str, count: int, capfd) -> list[str]:
    """Every change at which the command ended otherwise than with a sentence."""
    command, sample, file, *_ = CASES[name]
    text = (samples[sample] / file).read_text()
    content = yaml.safe_load(text)
    changes = [(place, value) for place in places(content) for value in VALUES]
    changes = random.Random(name).sample(changes, min(count, len(changes)))
    faults = []
    for at, (place, value) in enumerate(changes):
        copy = shutil.copytree(samples[sample], folder / str(at), copy_function=os.link)
        (copy / file).unlink()
        (copy / file).write_text(json.dumps(changed(content, place, value)))
        given = copy / file if sample == "settings" else copy
        try:
            cli.main([word.format(given) for word in command])
        except SystemExit:
            pass
        except Exception:
            faults.append(f"{place} = {value!r}: {traceback.format_exc(limit=-2)}")
        said = "".join(capfd.readouterr())
        if "Traceback (most recent call last)" in said:
            faults.append(f"{place} = {value!r}: {said[-500:]}")
    return faults


@pytest.mark.parametrize("name", CASES)
def test_no_field_ends_in_a_traceback(samples, root, monkeypatch, capfd, name):
    monkeypatch.chdir(root)
    faults = run_all(samples, root / "copies", name, CASES[name][3], capfd)
    assert not faults, "\n".join(faults[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_field_of_all_ends_in_a_traceback(samples, root, monkeypatch, capfd, name):
    monkeypatch.chdir(root)
    faults = run_all(samples, root / "copies", name, CASES[name][4], capfd)
    assert not faults, "\n".join(faults[:5])
