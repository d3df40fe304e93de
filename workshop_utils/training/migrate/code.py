"""A :class:`~workshop_utils.training.migrate.Migration` as a Python script."""

import json
import math
from typing import Any

from workshop_utils.training.migrate import Argument, Migration
from workshop_utils.training.migrate.signatures import TARGETS
from workshop_utils.training.migrate.table import Code

_IMPORTS = {
    "ddp": "from megatron.core.distributed import DistributedDataParallelConfig",
    "optimizer": "from megatron.core.optimizer import OptimizerConfig",
    "stopping": "from lightning.pytorch.callbacks import EarlyStopping",
    "tokenizer": "from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer",  # noqa: E501
}


def script(made: Migration) -> str:
    """The whole script. What it defines can be executed without training: that stands under ``if
    __name__ == "__main__"``."""
    body = _body(made)
    imports = ["import torch"] if any("torch." in line for line in body) else []
    imports += (
        ["from nemo.lightning import io"] if any("io.load_context" in line for line in body) else []
    )
    imports += [
        "from nemo import lightning as nl",
        "from nemo.collections import llm",
        *(line for part, line in _IMPORTS.items() if part in made.parts),
    ]
    return "\n".join(
        [
            f"# NeMo 2.0 code for {_one_line(made.name)}, written by `workshop migrate`.",
            "",
            *sorted(imports),
            "",
            *body,
            "",
            *_left(made),
        ]
    )


def table(rows: list) -> str:
    """Rows of the table of keys, as Markdown."""
    lines = [
        f"| `{row.key}` | `{TARGETS[row.target][0]}` | `{row.argument}` | {row.note} |"
        for row in rows
    ]
    return "\n".join(["| NeMo 1.0 | NeMo 2.0 | argument | remark |", "|---|---|---|---|", *lines])


def _body(made: Migration) -> list[str]:
    parts, built, lines = made.parts, {}, []

    def add(variable: str, text: list[str]) -> None:
        """Append ``variable = text``, an expression of several lines, and remember that the
        variable is there."""
        lines.extend([f"{variable} = {text[0]}", *text[1:]])
        built[variable] = True

    if "ddp" in parts:
        parts["strategy"] = parts.get("strategy", {}) | {"ddp": _inline("ddp", parts["ddp"])}
    add("strategy", _call("nl.MegatronStrategy", parts.get("strategy", {})))
    trainer = {"strategy": Argument(Code("strategy"), "")} | parts.get("trainer", {})
    if "precision" in parts:
        trainer["plugins"] = _inline("precision", parts["precision"])
    if "stopping" in parts:
        trainer["callbacks"] = _inline("stopping", parts["stopping"], "[{}]")
    add("trainer", _call("nl.Trainer", trainer))
    log = dict(parts.get("log", {}))
    if "checkpoint" in parts:
        log["ckpt"] = _inline("checkpoint", parts["checkpoint"])
    add("log", _call("nl.NeMoLogger", log))
    resume = dict(parts.get("resume", {}))
    if "restore" in parts:
        resume["restore_config"] = _inline("restore", parts["restore"])
    add("resume", _call("nl.AutoResume", resume))
    if "optimizer" in parts:
        optim = {"config": _inline("optimizer", parts["optimizer"])}
        if made.schedule:
            optim["lr_scheduler"] = _inline(
                "schedule", parts["schedule"], name=f"nl.lr_scheduler.{made.schedule}Scheduler"
            )
        add("optim", _call("nl.MegatronOptimizerModule", optim))
    if "peft" in parts:
        add("peft", _call("llm.peft.LoRA", parts["peft"]))
    if "tokenizer" in parts:
        add("tokenizer", _call("get_nmt_tokenizer", parts["tokenizer"]))
    data = "finetuning" if made.finetuning else "pretraining"
    if data in parts:
        arguments = dict(parts[data])
        if "rows" in parts:
            arguments["dataset_kwargs"] = _inline("rows", parts["rows"])
        if "tokenizer" in parts:
            arguments["tokenizer"] = Argument(Code("tokenizer"), "")
        add("data", _call(TARGETS[data][0], arguments))
    return [*lines, *_run(made, built)]


def _run(made: Migration, built: dict[str, bool]) -> list[str]:
    """The model and the call that trains it."""
    config = made.parts.get("config", {})
    names = ", ".join(
        f"{name}={name}"
        for name in ("model", "data", "trainer", "log", "resume", "optim", "peft")
        if name in built or name == "model"
    )
    if "num_layers" in config:
        model = _call("llm.GPTConfig", config)
        tokenizer = ", tokenizer=tokenizer" if "tokenizer" in built else ""
        lines = [f"config = {model[0]}", *model[1:], f"model = llm.GPTModel(config{tokenizer})"]
        end = [f"    llm.{'finetune' if made.finetuning else 'pretrain'}({names})"]
    else:
        lines, base = [], made.value("restore", "path") or "CHECKPOINT"
        end = [
            f'    model = io.load_context({_python(base + "/context")}, subpath="model")',
            *(
                f"    model.config.{name} = {_python(one.value)}  # {one.source}"
                for name, one in config.items()
            ),
            f"    llm.finetune({names}, tokenizer='model')",
        ]
    if "data" not in built:
        # Without num_layers they belong to a model that is loaded, which nothing here does.
        settings = (
            []
            if "num_layers" in config
            else [
                f"# model.config.{name} = {_python(one.value)}  # {one.source}"
                for name, one in config.items()
            ]
        )
        return [
            *lines,
            *settings,
            (
                "# Add data=, a data module: the configuration names none. Then llm.pretrain or "
                "llm.finetune."
            ),
        ]
    return [*lines, "", 'if __name__ == "__main__":', *end]


def _call(name: str, arguments: dict[str, Argument]) -> list[str]:
    if not arguments:
        return [f"{name}()"]
    return [
        f"{name}(",
        *(
            f"    {argument}={_python(one.value)},{_remark(one)}"
            for argument, one in arguments.items()
        ),
        ")",
    ]


def _inline(
    part: str, arguments: dict[str, Argument], wrap: str = "{}", name: str | None = None
) -> Argument:
    """A call as the value of an argument."""
    lines = _call(name or TARGETS[part][0], arguments)
    return Argument(Code(wrap.format("\n    ".join(lines))), "")


def _remark(one: Argument) -> str:
    said = "; ".join(part for part in (one.source, one.note) if part)
    return f"  # {said}" if said else ""


def _python(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _one_line(text: str) -> str:
    """``text`` of the user's as part of a comment: a line break in it would begin a line of
    code."""
    return " ".join(text.split())


def _left(made: Migration) -> list[str]:
    """The keys without a counterpart, by reason."""
    reasons: dict[str, list[str]] = {}
    for key, (value, why) in made.left.items():
        reasons.setdefault(why, []).append(_one_line(f"{key}: {_python(value)}"))
    lines = (
        [f"# Keys of {_one_line(made.name)} that were not migrated: {len(made.left)}"]
        if made.left
        else []
    )
    for why, keys in reasons.items():
        lines += [f"# - {why}:", *(f"#     {key}" for key in keys)]
    return (
        [*lines, f"# Keys that are null and so need no argument: {made.unset}"]
        if made.unset
        else lines
    )
