"""The model card that comes with every export. It says what is known, and what was not tested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.adapters.record import Record

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
) -> str:
    """The card in Markdown. ``results`` are measured figures by name; without them the card says
    that none were given."""
    base = f"`{record.base}`" if record.base else "a base model that was not recorded"
    merged = record.to.endswith("-merged")
    kind = "DoRA" if adapter.magnitudes else "LoRA"
    what = (
        f"{base} with a {kind} adapter merged into it" if merged else f"A {kind} adapter for {base}"
    )
    return "\n".join(
        [
            *_front_matter(record),
            f"# {name}",
            "",
            f"{what}, exported by nemo-lora-workshop.",
            "The licence of the base applies to its use."
            if merged
            else "The base model is not included; its licence applies to its use.",
            "",
            "## Format",
            "",
            f"- Intended reader: {record.reader}.",
            f"- Row order of the fused q/k/v matrix: {_ORDER[record.qkv_order]}.",
            f"- Scale: {_scale(adapter, record)}.",
            (
                f"- Made from `{record.source}` (sha256 "
                f"`{record.source_sha256}`){'' if merged else ', without loading the base model'}."
            ),
            *(f"- {note[:1].upper()}{note[1:]}." for note in adapter.notes),
            *_cautions(adapter, record),
            "",
            "## Use",
            "",
            *_use(record, name),
            "",
            "## Training",
            "",
            *_training(adapter),
            "",
            "## Results",
            "",
            *(
                [f"- {what}: {figure}" for what, figure in results.items()]
                if results
                else ["None were given to the export."]
            ),
            "",
            "## Not tested",
            "",
            (
                f"The {'model' if merged else 'adapter'} was not loaded by a NIM. NIM 1.x "
                "documents `.nemo` adapters, but its own loader is closed; NIM 2.x"
            ),
            (
                "documents the Hugging Face layout only. What was checked is the rules of the "
                "public readers."
            ),
            "",
        ]
    )


def _front_matter(record: Record) -> list[str]:
    if not record.to.startswith("hf-"):
        return []
    base = [f"base_model: {json.dumps(record.base)}"] if record.base else []
    return [
        "---",
        *base,
        f"library_name: {'peft' if record.to == 'hf-peft' else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [lora, nemo]",
        "---",
        "",
    ]


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
        (
            f"- Rank {adapter.rank}: the server must allow it (vLLM `--max-lora-rank`, NIM "
            "`NIM_MAX_LORA_RANK`)."
        )
    ]
    if record.qkv_order == "qkv":
        lines.append(
            "- Do not give this file to NeMo or to NeMo's converter: they expect interleaved rows."
        )
    if record.qkv_order == "interleaved":
        lines.append(
            "- Do not give this file to TensorRT-LLM: it expects `Q|K|V` rows and applies no scale."
        )
        heads, hidden = adapter.architecture.heads, adapter.architecture.hidden_size
        if heads.channels * heads.attention != hidden:
            lines.append(
                "- NeMo's converter takes hidden_size / heads for the head size; this model's "
                f"is {heads.channels}."
            )
    return lines


def _use(record: Record, name: str) -> list[str]:
    if record.to == "hf-peft":
        return [
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            "base = AutoModelForCausalLM.from_pretrained(BASE_DIRECTORY_OR_ID)",
            "model = PeftModel.from_pretrained(base, THIS_DIRECTORY)",
            "```",
            "",
            (
                "For NIM or vLLM, give this directory the name that clients will ask for, such as "
                f"`{name}`."
            ),
        ]
    if record.to == "hf-merged":
        return [
            (
                "Load it as any model: `AutoModelForCausalLM.from_pretrained(THIS_DIRECTORY)`. It "
                "needs no adapter."
            )
        ]
    if record.to == "nemo2-merged":
        return [
            (
                "Give it to NeMo 2.0 as any checkpoint: `llm.generate(path=THIS_DIRECTORY, "
                "...)`, or train on from it."
            )
        ]
    if record.qkv_order == "qkv":
        return [
            (
                f"For a NIM 1.x store, copy the file to `$NIM_PEFT_SOURCE/{name}/{name}.nemo`: one "
                "`.nemo` in each directory."
            )
        ]
    return [
        (
            "Restore it with NeMo onto the base it was trained on, or convert it with "
            "`nemo/export/utils/lora_converter.py`."
        )
    ]


def _training(adapter: LoraAdapter) -> list[str]:
    """What the configuration records; a field that is absent is left out rather than guessed."""
    config = adapter.config
    lora = config["peft"]["lora_tuning"]
    facts: dict[str, Any] = {
        "Targets": ", ".join(adapter.targets),
        "Rank": adapter.rank,
        "Alpha": f"{adapter.alpha:g}",
        "Dropout": lora.get("adapter_dropout"),
        "Optimiser": _at(config, "optim", "name"),
        "Learning rate": _at(config, "optim", "lr"),
        "Global batch size": config.get("global_batch_size"),
        "Longest sequence (tokens)": _at(config, "data", "train_ds", "max_seq_length"),
        "Precision": config.get("precision"),
        "Layers": adapter.layers,
        "Trainable parameters": sum(
            half.numel() for halves in adapter.weights.values() for half in halves
        ),
    }
    return [f"- {what}: {value}" for what, value in facts.items() if value is not None]


def _at(config: Any, *path: str) -> Any:
    for field in path:
        config = config.get(field) if isinstance(config, dict) else None
    return config
