"""Adapters that two ranks trained over gloo, delivered: whole, as NeMo itself loads them on one
process, and right.

What NeMo loads on one process could be wrong itself (the halves of a gated layer in another order,
for example). So the loss that the two ranks had on the validation rows is computed again, from the
export alone.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from test_recipe_train import losses, options

from workshop_utils.adapters.export import export
from workshop_utils.training.recipe import deliver, job
from workshop_utils.training.recipe.options import from_mapping
from workshop_utils.training.recipe.plan import resolve
from workshop_utils.training.recipe.prepare_data import prepare

pytestmark = pytest.mark.slow

ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
GROUPS, HEAD_DIM = 2, 16  # of the tiny model, with two heads a group
LOADED = """
import sys, numpy
from workshop_utils.inference.nemo2_engine import Model
parameters = Model(sys.argv[1]).core.named_parameters()
adapter = {name: one.detach().numpy() for name, one in parameters if ".adapter." in name}
numpy.savez(sys.argv[2], **adapter)
"""


RUNS = [
    ("tensor", "lora", ALL),
    ("pipeline", "lora", ALL),
    ("tensor", "dora", ALL[:1]),
    ("pipeline", "dora", ALL),
]
"""NeMo saves no other DoRA right under tensor parallelism: the plan refuses it."""


@pytest.fixture(scope="module", params=RUNS, ids=lambda one: "-".join(one[:2]))
def run(request, bridged_tiny, tmp_path_factory):
    """A finished run on two ranks, and what was settled for it."""
    size, scheme, targets = request.param
    folder = tmp_path_factory.mktemp("two-ranks")
    (folder / "base").symlink_to(bridged_tiny / "nemo2" / "tiny")
    # Rows of one length: the mean of the batch is then that of all tokens.
    rows = [{"input": f"number {i}?", "output": f"it is {i}"} for i in range(10, 30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = {"hfdc_dataset_name": str(folder / "rows.jsonl"), "hfdc_train_split_ratio": 0.6}
    adapter = {"lora_target_modules": targets, "peft_scheme": scheme}
    base = {"hf_model_id": str(bridged_tiny / "hf" / "tiny"), "gpus_per_node": 2}
    given = options(folder, hfdc_split="train", **rows, **adapter, **base)
    settled = resolve(from_mapping(given | {f"{size}_parallel_size": 2}))
    prepare(settled.dataset, settled.data_dir, settled.nemo_ckpt_dir, 64, progress=False)
    return settled, job.train(settled)


def peft_tensors(directory: Path) -> dict[str, numpy.ndarray]:
    from safetensors.numpy import load_file

    return load_file(directory / "adapter_model.safetensors")


def fused(parts: list[numpy.ndarray], layer: str) -> numpy.ndarray:
    """Rows of q, k and v as NeMo interleaves them by group, those of gate and up one after the
    other."""
    if layer != "linear_qkv":
        return numpy.concatenate(parts)
    groups = [part.reshape(GROUPS, -1, *part.shape[1:]) for part in parts]
    return numpy.concatenate(groups, axis=1).reshape(-1, *parts[0].shape[1:])


def test_the_adapter_is_what_nemo_loads_on_one_process(run, tmp_path):
    settled, result = run
    delivered = peft_tensors(deliver.export(settled, "hf_peft"))
    subprocess.run(
        [sys.executable, "-c", LOADED, str(result.best), str(tmp_path / "loaded.npz")],
        check=True,
        capture_output=True,
    )
    loaded = numpy.load(tmp_path / "loaded.npz")
    places = {
        "linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "linear_proj": ["self_attn.o_proj"],
        "linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
        "linear_fc2": ["mlp.down_proj"],
    }
    parts = {"lora_B.weight": "linear_out.weight"}
    if settled.options.peft_scheme == "dora":
        parts["lora_magnitude_vector"] = "weight_magnitude"
    layers, seen = settled.options.lora_target_modules, 0
    for number, layer in itertools.product(range(2), layers):
        block = "mlp" if "fc" in layer else "self_attention"
        above = f"decoder.layers.{number}.{block}.{layer}.adapter"
        names = [f"base_model.model.model.layers.{number}.{module}" for module in places[layer]]
        for name in names:
            a = delivered[f"{name}.lora_A.weight"]
            assert (a == loaded[f"{above}.linear_in.weight"]).all(), name
        for theirs, ours in parts.items():
            rows = fused([delivered[f"{name}.{theirs}"] for name in names], layer)
            assert (rows == loaded[f"{above}.{ours}"]).all(), above
        seen += len(names) * (1 + len(parts))
    assert len(delivered) == seen and len(loaded.files) == 2 * len(layers) * (1 + len(parts))


def test_the_export_has_the_loss_that_the_ranks_had(run, bridged_tiny, tmp_path):
    """Of the recipe's command, and of ``workshop export``, which needs no base."""
    (settled, result), model = run, bridged_tiny / "hf" / "tiny"
    assert losses(result)[-1] < losses(result)[0]
    of_command = export(result.best, "hf-peft", tmp_path / "p")
    for adapter in (deliver.export(settled, "hf_peft"), of_command):
        exported = loss(model, adapter, settled.data_dir)
        assert exported == pytest.approx(result.val_loss, abs=1e-4)
    assert loss(model, None, settled.data_dir) > result.val_loss + 0.01


def test_merged_and_for_transformers(run):
    """Each is compared with NeMo's logits of the adapter before it gets its name."""
    model = deliver.export(run[0], "hf_model")
    assert (model / "config.json").is_file()
    assert (model.with_suffix(".merged") / "weights" / ".metadata").is_file()


def loss(model: Path, adapter: Path | None, data: Path) -> float:
    """Mean over the tokens of the answers of the validation rows, stop token included, by
    transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded = (PeftModel.from_pretrained(loaded, adapter) if adapter else loaded).eval()
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    prompts = [tokenizer.encode(row["input"]) for row in rows]
    answers = [[*tokenizer.encode(f" {row['output']}"), tokenizer.eos_token_id] for row in rows]
    pairs = list(zip(prompts, answers, strict=True))
    labels = [[-100] * len(prompt) + answer for prompt, answer in pairs]
    ids = [prompt + answer for prompt, answer in pairs]
    with torch.inference_mode():
        return float(loaded(torch.tensor(ids), labels=torch.tensor(labels)).loss)
