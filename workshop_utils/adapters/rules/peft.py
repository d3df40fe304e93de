"""Rules for an adapter in the layout of Hugging Face PEFT, for PEFT itself and for vLLM.

Sources: ``LoraConfig`` and ``set_peft_model_state_dict`` (PEFT 0.17);
``vllm/lora/{lora_model,peft_helper}.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.adapters.base_id import is_hub_id, is_place
from workshop_utils.adapters.rules.rules import (
    TRAINED,
    Judgement,
    check_rank,
    check_storage,
    check_values,
    first,
)
from workshop_utils.checkpoints.formats import huggingface
from workshop_utils.checkpoints.formats.architecture import number, size
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.verify.adapters import check_peft
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core.errors import CheckpointError

PREFIX = "base_model.model."
_KEY = re.compile(
    rf"{re.escape(PREFIX)}model\.layers\.(\d+)\.((?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight"
)
_MAGNITUDE = re.compile(
    rf"{re.escape(PREFIX)}model\.layers\.(\d+)\.((?:self_attn|mlp)\.(\w+))\.lora_magnitude_vector"
)
_CONFIG, _SAFE = "adapter_config.json", "adapter_model.safetensors"


def check(found: Judgement, path: Path, max_rank: int | None) -> None:
    """Judge the directory ``path``; ``found.reader`` is ``peft`` or a server that is stricter."""
    served = found.reader != "peft"
    again = found.again("hf-peft")
    readable, report = Report(path), Report(path)
    try:
        config = read_json(path / _CONFIG)
        checkpoint = huggingface.describe_peft(path, readable.add)
        check_peft(report, checkpoint.tensors, config)
    except CheckpointError as error:
        readable.add(error)
    unsafe = [fault for fault in report.refused if fault.code is Code.UNSAFE]
    faults = [str(fault) for fault in (*unsafe, *readable.refused)]
    fix = (
        "do not load it: its author wants something run"
        if unsafe
        else "fetch it again from where it was made; do not load it"
    )
    if not found.check("it can be read, and nothing in it runs code", first(faults), fix):
        return
    if served:
        others = ", ".join(sorted(file.name for file in path.glob("adapter_model*")))
        found.check(
            f"the weights are {_SAFE}",
            None if (path / _SAFE).is_file() else f"it has {others}",
            again,
        )
    _check_config(found, config, served, again)
    _check_keys(found, checkpoint, config, again)
    # Halves, ranks, layers and the two-way agreement with target_modules are the doctor's.
    rest = _odd_fields(found, config)
    rest += [str(fault) for fault in report.refused if fault.code is not Code.PREFIX]
    found.check(
        "every module of every layer has lora_A [r, in] and lora_B [out, r], and target_modules "
        "names just these",
        first(rest),
        "write target_modules, r and layers_to_transform as the tensors have them; where "
        f"tensors are missing, {TRAINED}",
    )
    ranks = sorted(
        {
            tensor.shape[0]
            for tensor in checkpoint.tensors
            if ".lora_A." in tensor.name and tensor.shape
        }
    )
    if served:
        uneven = f"ranks {ranks}" if len(ranks) > 1 else None
        uneven = uneven or next(
            (f"{name} is set" for name in ("rank_pattern", "alpha_pattern") if config.get(name)),
            None,
        )
        found.check(
            "one rank and one alpha for all modules", uneven, f"fill up with zeros: {again}"
        )
    check_rank(
        found,
        max(ranks, default=None),
        max_rank,
        "NIM_MAX_LORA_RANK" if found.reader.startswith("nim") else "--max-lora-rank",
    )
    check_storage(found, checkpoint, checkpoint.nbytes, again)
    check_values(
        found,
        checkpoint,
        {tensor.name for tensor in checkpoint.tensors if ".lora_B" in tensor.name},
        again,
    )


def _check_config(found: Judgement, config: Mapping[str, Any], served: bool, again: str) -> None:
    def exact(field: str, *allowed: Any, fix: str = again) -> None:
        """A rule: ``field`` has one of the values ``allowed``; the first one is named."""
        value = config.get(field)
        found.check(
            f"{_CONFIG}: {field} is {allowed[0]!r}",
            None if value in allowed else f"it is {value!r}",
            fix,
        )

    exact(
        "peft_type",
        "LORA",
        fix="only LoRA adapters are served this way; merge another kind into its base",
    )
    exact(
        "task_type",
        "CAUSAL_LM",
        fix="write task_type CAUSAL_LM there; NeMo's exporter leaves it out",
    )
    rank, alpha = size(config, "r"), number(config, "lora_alpha")
    fix = "write the rank there, the first size of each lora_A"
    found.check(
        f"{_CONFIG}: r is a positive whole number",
        None if rank else f"it is {config.get('r')!r}",
        fix,
    )
    fault = None if alpha is not None and 0 < alpha < 1e9 else f"it is {config.get('lora_alpha')!r}"
    found.check(
        f"{_CONFIG}: lora_alpha is a positive number",
        fault,
        "write the alpha of the training there: without it nobody knows the scale",
    )
    base = config.get("base_model_name_or_path")
    fault = (
        None
        if isinstance(base, str) and base
        else "base_model_name_or_path is empty; --base ID records it"
    )
    if not fault and is_place(base):
        fault = f"base_model_name_or_path is {base!r}, a place on the machine of the training"
    if found.check(
        f"{_CONFIG} names the base", fault, f"name it: {again} --base ID"
    ) and not is_hub_id(base):
        found.note(
            f"base_model_name_or_path is {base!r}, without an organisation: the Hub has no such id"
        )
    exact(
        "bias",
        "none",
        fix="merge it into its base with PEFT (merge_and_unload): a server adds no bias",
    )
    merged = found.again("hf-merged", "--base DIR")
    if served:
        exact(
            "modules_to_save",
            None,
            [],
            fix="whole layers were trained beside the adapter: merge it into its base with PEFT "
            "(merge_and_unload)",
        )
        exact("use_dora", False, None, fix=f"servers take no DoRA; merge it: {merged}")
    elif config.get("modules_to_save"):
        found.note(
            f"modules_to_save is {config['modules_to_save']!r}: PEFT loads them, servers do not"
        )


def _odd_fields(found: Judgement, config: Mapping[str, Any]) -> list[str]:
    """Faults of the fields that say which modules there are, and their ranks and alphas, whatever
    the tensors are."""
    targets, faults = config.get("target_modules"), []
    names = targets if isinstance(targets, list) else [targets]
    if not names or not all(name and isinstance(name, str) for name in names):
        faults.append(f"target_modules is {targets!r}")
    elif isinstance(targets, str):
        found.note(
            f"target_modules is {targets!r}: a pattern, which was not compared with the keys"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not (
            isinstance(pattern, Mapping) and all((number(pattern, key) or 0) > 0 for key in pattern)
        ):
            faults.append(f"{field} is {pattern!r}, no table of positive numbers")
    return faults


def _check_keys(
    found: Judgement, checkpoint: Checkpoint, config: Mapping[str, Any], again: str
) -> None:
    names = [tensor.name for tensor in checkpoint.tensors]
    bare = [f"the key {name!r}" for name in names if not name.startswith(PREFIX)]
    found.check(
        f"keys begin with {PREFIX}",
        first(bare),
        f"PEFT leaves them out with a warning, and B stays zero: {again} --trust",
    )
    saved = config.get("modules_to_save")
    saved = saved if isinstance(saved, list) else []
    dora = bool(config.get("use_dora"))
    odd = [
        f"the key {name!r}"
        for name in names
        if not (
            _KEY.fullmatch(name)
            or (dora and _MAGNITUDE.fullmatch(name))
            or not name.startswith(PREFIX)
            or any(f".{it}." in name for it in saved)
        )
    ]
    fix = "rename them, or train without the other modules: servers take these only"
    if all(".default" in name for name in names):
        fix = (
            f"they still have the adapter's name in them, which PEFT puts in itself: {again} "
            "--trust"
        )
    found.check(
        "keys are base_model.model.model.layers.N.BLOCK.PROJ.lora_A|B.weight", first(odd), fix
    )
    if dora:
        places = {_KEY.fullmatch(name).group(1, 2) for name in names if _KEY.fullmatch(name)}
        lengths = {
            _MAGNITUDE.fullmatch(name).group(1, 2) for name in names if _MAGNITUDE.fullmatch(name)
        }
        lacking = [
            f"layer {layer}, {module} has none" for layer, module in sorted(places - lengths)
        ]
        found.check(
            "every module of a DoRA adapter has its lora_magnitude_vector", first(lacking), TRAINED
        )
