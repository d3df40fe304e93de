"""The model card that comes with every export. It says what is known, and what was not tested."""

from __future__ import annotations

import json
from collections.abc import Mapping

from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.adapters.record import Record
from workshop_utils.checkpoints.formats.architecture import section

_ORDER = {
    "qkv": "all query rows, then all key rows, then all value rows (`Q|K|V`)",
    "interleaved": "interleaved by group: the query heads of a group, its key head, its value head",
    "separate": "none: q, k and v are separate tensors",
}


def model_card(
    adapter: LoraAdapter,
    record: Record,
    name: str,
    results: Mapping[str, float | str] | None = None,
    proof: str = "not proven",
) -> str:
    """The card in Markdown. ``results`` are measured figures by name; without them the card says
    that none were given. ``proof``: how it was proven to compute what was trained, or that it was
    not."""
    merged = record.to.endswith("-merged")
    base = f"`{record.base}`" if record.base else "a base model that was not recorded"
    kind = "DoRA" if adapter.magnitudes else "LoRA"
    if merged:
        what = f"{base} with a {kind} adapter merged into it"
        licence = "The licence of the base applies to its use."
    else:
        what = f"A {kind} adapter for {base}"
        licence = "The base model is not included; its licence applies to its use."
    loaded = "" if merged else ", without loading the base model"
    notes = [f"- {note[:1].upper()}{note[1:]}." for note in adapter.notes]
    figures = [f"- {figure}: {value}" for figure, value in (results or {}).items()]
    front = ""
    if record.to.startswith("hf-"):
        base_line = f"base_model: {json.dumps(record.base)}\n" if record.base else ""
        library = "peft" if record.to == "hf-peft" else "transformers"
        front = (
            f"---\n{base_line}library_name: {library}\npipeline_tag: text-generation\n"
            "tags: [lora, nemo]\n---\n\n"
        )
    notes_text = "\n".join(
        [
            f"- Made from `{record.source}` (sha256 `{record.source_sha256}`){loaded}.",
            *notes,
            *_cautions(adapter, record),
        ]
    )
    return f"""{front}# {name}

{what}, exported by nemo-lora-workshop.
{licence}

## Format

- Intended reader: {record.reader}.
- Row order of the fused q/k/v matrix: {_ORDER[record.qkv_order]}.
- Scale: {_scale(adapter, record)}.
{notes_text}

## Use

{_use(record, name)}

## Training

{_training(adapter)}

## Results

{chr(10).join(figures) or "None were given to the export."}

Proof: {proof}

## Not tested

The {"model" if merged else "adapter"} was not loaded by a NIM. By NVIDIA's pages NIM 1.x takes a `.nemo` as NeMo writes it, or the Hugging
Face layout; NIM 2.x documents the latter only. What was checked is the rules of the public readers.
"""  # noqa: E501


def _scale(adapter: LoraAdapter, record: Record) -> str:
    if record.to.endswith("-merged"):
        return "in the weights: W + alpha / rank * B A, summed in single precision, rounded once"
    fraction = f"alpha / rank = {adapter.alpha:g} / {adapter.rank} = {adapter.scale:g}"
    if record.alpha_baked_in:
        return (
            f"{fraction} is multiplied into `linear_out`, because the reader applies none; the "
            "configuration says alpha = rank"
        )
    return f"the reader applies {fraction}"


def _cautions(adapter: LoraAdapter, record: Record) -> list[str]:
    if record.to.endswith("-merged"):
        return []
    lines = [
        f"- Rank {adapter.rank}: the server must allow it (vLLM `--max-lora-rank`, NIM "
        "`NIM_MAX_LORA_RANK`)."
    ]
    if record.qkv_order == "qkv":
        lines.append(
            "- Do not give this file to NeMo, its converter or a NIM: by NVIDIA's code and pages "
            "they take interleaved rows, and apply the scale."
        )
    if record.qkv_order == "interleaved":
        lines.append(
            "- Do not give this file to TensorRT-LLM: it expects `Q|K|V` rows and applies no scale."
        )
        heads, hidden = adapter.architecture.qkv, adapter.architecture.hidden
        if heads.channels * heads.attention != hidden:
            lines.append(
                "- NeMo's converter takes hidden_size / heads for the head size; this model's "
                f"is {heads.channels}."
            )
    return lines


def _use(record: Record, name: str) -> str:
    if record.to == "hf-peft":
        return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(BASE_DIRECTORY_OR_ID)
model = PeftModel.from_pretrained(base, THIS_DIRECTORY)
```

For NIM or vLLM, give this directory the name that clients will ask for, such as `{name}`."""
    if record.to == "hf-merged":
        return (
            "Load it as any model: `AutoModelForCausalLM.from_pretrained(THIS_DIRECTORY)`. It "
            "needs no adapter."
        )
    if record.to == "nemo2-merged":
        return (
            "Give it to NeMo 2.0 as any checkpoint: `llm.generate(path=THIS_DIRECTORY, ...)`, or "
            "train on from it."
        )
    if record.qkv_order == "qkv":
        return 'Give it to TensorRT-LLM: `LoraConfig(lora_dir=[FILE], lora_ckpt_source="nemo")`.'
    return (
        "Restore it with NeMo onto the base it was trained on, or convert it with "
        "`nemo/export/utils/lora_converter.py`. For a NIM 1.x store, copy the file to "
        f"`$NIM_PEFT_SOURCE/{name}/{name}.nemo`: one `.nemo` in each directory."
    )


def _training(adapter: LoraAdapter) -> str:
    """What the configuration records; a field that is absent is left out rather than guessed."""
    config = adapter.config
    optimiser = section(config, "optim")
    facts = {
        "Targets": ", ".join(adapter.targets),
        "Rank": adapter.rank,
        "Alpha": f"{adapter.alpha:g}",
        "Dropout": config["peft"]["lora_tuning"].get("adapter_dropout"),
        "Optimiser": optimiser.get("name"),
        "Learning rate": optimiser.get("lr"),
        "Global batch size": config.get("global_batch_size"),
        "Longest sequence (tokens)": section(section(config, "data"), "train_ds").get(
            "max_seq_length"
        ),
        "Precision": config.get("precision"),
        "Layers": adapter.layers,
        "Trainable parameters": sum(
            half.numel() for halves in adapter.weights.values() for half in halves
        ),
    }
    return "\n".join(f"- {what}: {value}" for what, value in facts.items() if value is not None)
