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
    "tokenizer": "from nemo.collections.nlp.modules.common.tokenizer_utils import "
    "get_nmt_tokenizer",
}
Arguments = dict[str, Argument]


def script(migration: Migration) -> str:
    """The whole script. What it defines can be executed without training: that stands under ``if
    __name__ == "__main__"``."""
    body = _body(migration)
    used = {"import torch": "torch.", "from nemo.lightning import io": "io.load_context"}
    imports = [
        *(line for line, name in used.items() if any(name in text for text in body)),
        "from nemo import lightning as nl",
        "from nemo.collections import llm",
        *(line for part, line in _IMPORTS.items() if part in migration.parts),
    ]
    title = f"# NeMo 2.0 code for {_one_line(migration.name)}, written by `workshop migrate`."
    return "\n".join([title, "", *sorted(imports), "", *body, "", *_left(migration)])


def table(rows: list) -> str:
    """Rows of the table of keys, as Markdown."""
    lines = [
        f"| `{row.key}` | `{TARGETS[row.target][0]}` | `{row.argument}` | {row.note} |"
        for row in rows
    ]
    return "\n".join(["| NeMo 1.0 | NeMo 2.0 | argument | remark |", "|---|---|---|---|", *lines])


def _body(migration: Migration) -> list[str]:
    parts, defined, lines = migration.parts, [], []

    def define(variable: str, call: str, arguments: Arguments) -> None:
        text = _call(call, arguments)
        lines.extend([f"{variable} = {text[0]}", *text[1:]])
        defined.append(variable)

    def nested(argument: str, part: str, wrap: str = "{}", name: str = "") -> Arguments:
        """``argument`` as the call of ``part``, where there is that part."""
        if part not in parts:
            return {}
        text = "\n    ".join(_call(name or TARGETS[part][0], parts[part]))
        return {argument: Argument(Code(wrap.format(text)), "")}

    def with_parts(target: str, *calls: Arguments) -> Arguments:
        arguments = dict(parts.get(target, {}))
        for call in calls:
            arguments |= call
        return arguments

    define("strategy", "nl.MegatronStrategy", with_parts("strategy", nested("ddp", "ddp")))
    trainer = with_parts(
        "trainer", nested("plugins", "precision"), nested("callbacks", "stopping", "[{}]")
    )
    define("trainer", "nl.Trainer", {"strategy": Argument(Code("strategy"), "")} | trainer)
    define("log", "nl.NeMoLogger", with_parts("log", nested("ckpt", "checkpoint")))
    define("resume", "nl.AutoResume", with_parts("resume", nested("restore_config", "restore")))
    if "optimizer" in parts:
        optim = nested("config", "optimizer")
        if migration.schedule:
            name = f"nl.lr_scheduler.{migration.schedule}Scheduler"
            optim |= nested("lr_scheduler", "schedule", name=name)
        define("optim", "nl.MegatronOptimizerModule", optim)
    for variable in ("peft", "tokenizer"):
        if variable in parts:
            define(variable, TARGETS[variable][0], parts[variable])
    data = "finetuning" if migration.finetuning else "pretraining"
    if data in parts:
        arguments = with_parts(data, nested("dataset_kwargs", "rows"))
        if "tokenizer" in parts:
            arguments["tokenizer"] = Argument(Code("tokenizer"), "")
        define("data", TARGETS[data][0], arguments)
    return [*lines, *_run(migration, defined)]


def _run(migration: Migration, defined: list[str]) -> list[str]:
    """The model and the call that trains it."""
    config = migration.parts.get("config", {})
    settings = [
        f"model.config.{name} = {_python(setting.value)}  # {setting.source}"
        for name, setting in config.items()
    ]
    known = ("model", "data", "trainer", "log", "resume", "optim", "peft")
    names = ", ".join(f"{name}={name}" for name in known if name in (*defined, "model"))
    if "num_layers" in config:
        model = _call("llm.GPTConfig", config)
        tokenizer = ", tokenizer=tokenizer" if "tokenizer" in defined else ""
        lines = [f"config = {model[0]}", *model[1:], f"model = llm.GPTModel(config{tokenizer})"]
        end = [f"llm.{'finetune' if migration.finetuning else 'pretrain'}({names})"]
    else:
        # Without data these settings belong to a model that is loaded, which nothing here does.
        lines = [] if "data" in defined else [f"# {line}" for line in settings]
        context = _python((migration.value("restore", "path") or "CHECKPOINT") + "/context")
        end = [
            f'model = io.load_context({context}, subpath="model")',
            *settings,
            f"llm.finetune({names}, tokenizer='model')",
        ]
    if migration.no_peft:
        text = f"{migration.no_peft}: give peft=, or take this line out to train every weight"
        end.insert(-1, f"raise NotImplementedError({_python(text)})")
    if "data" not in defined:
        missing = "# Add data=, a data module: the configuration names none. Then llm.pretrain or "
        return [*lines, f"{missing}llm.finetune."]
    return [*lines, "", 'if __name__ == "__main__":', *(f"    {line}" for line in end)]


def _call(called: str, arguments: Arguments) -> list[str]:
    if not arguments:
        return [f"{called}()"]
    lines = []
    for name, argument in arguments.items():
        said = "; ".join(filter(None, (argument.source, argument.note)))
        lines.append(f"    {name}={_python(argument.value)},{f'  # {said}' if said else ''}")
    return [f"{called}(", *lines, ")"]


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


def _left(migration: Migration) -> list[str]:
    """The keys without a counterpart, by reason."""
    reasons: dict[str, list[str]] = {}
    for key, (value, why) in migration.left.items():
        reasons.setdefault(why, []).append(_one_line(f"{key}: {_python(value)}"))
    lines = []
    if migration.left:
        name = _one_line(migration.name)
        lines.append(f"# Keys of {name} that were not migrated: {len(migration.left)}")
    for why, keys in reasons.items():
        lines += [f"# - {why}:", *(f"#     {key}" for key in keys)]
    if migration.unset:
        lines.append(f"# Keys that are null and so need no argument: {migration.unset}")
    return lines
