"""What the installed NeMo's classes take, read from their source: nothing of it is imported, so it
answers in milliseconds."""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

from workshop_utils.core.errors import WorkshopError

_NL, _LLM, _CORE = "nemo/lightning/", "nemo/collections/llm/", "megatron/core/"
_NLP = "nemo/collections/nlp/modules/common/"
_LIGHTNING = "lightning/pytorch/"
_SCHEDULES = f"{_NL}pytorch/optim/lr_scheduler.py"
_POLICIES = "nemo/core/optim/lr_scheduler.py"
# fmt: off
TARGETS = {
    "strategy": ("nl.MegatronStrategy",
                 f"{_NL}pytorch/strategies/megatron_strategy.py",
                 "torch/nn/parallel/distributed.py:DistributedDataParallel"),
    "ddp": ("DistributedDataParallelConfig",
            f"{_CORE}distributed/distributed_data_parallel_config.py"),
    "precision": ("nl.MegatronMixedPrecision", f"{_NL}pytorch/plugins/mixed_precision.py"),
    "trainer": ("nl.Trainer", f"{_LIGHTNING}trainer/trainer.py"),
    "stopping": ("EarlyStopping", f"{_LIGHTNING}callbacks/early_stopping.py"),
    "checkpoint": ("nl.ModelCheckpoint",
                   f"{_NL}pytorch/callbacks/model_checkpoint.py",
                   f"{_LIGHTNING}callbacks/model_checkpoint.py"),
    "log": ("nl.NeMoLogger", f"{_NL}nemo_logger.py"),
    "restore": ("nl.RestoreConfig", f"{_NL}pytorch/strategies/utils.py"),
    "resume": ("nl.AutoResume", f"{_NL}resume.py"),
    "optimizer": ("OptimizerConfig", f"{_CORE}optimizer/optimizer_config.py"),
    "tokenizer": ("get_nmt_tokenizer", f"{_NLP}tokenizer_utils.py"),
    "config": ("llm.GPTConfig",
               f"{_LLM}gpt/model/base.py",
               f"{_CORE}transformer/transformer_config.py:TransformerConfig",
               f"{_CORE}model_parallel_config.py:ModelParallelConfig"),
    "peft": ("llm.peft.LoRA", f"{_LLM}peft/lora.py"),
    "rows": ("dict", f"{_LLM}gpt/data/core.py:create_sft_dataset"),
    "finetuning": ("llm.FineTuningDataModule", f"{_LLM}gpt/data/fine_tuning.py"),
    "pretraining": ("llm.PreTrainingDataModule", f"{_LLM}gpt/data/pre_training.py"),
}
# fmt: on
"""How each part of a NeMo 2.0 script is written, and the sources of what it takes: FILE:CLASS where
the class is called otherwise, and those that it passes the rest on to."""


@functools.cache
def defaults(target: str) -> dict[str, Any]:
    """The keyword arguments that ``target`` (a key of TARGETS) takes in the installed versions, and
    their defaults; what is no literal stands there as code. Raises WorkshopError where the package
    is not installed, or has no such class any more."""
    written, *sources = TARGETS[target]
    found: dict[str, Any] = {}
    for source in sources:
        file, _, name = source.partition(":")
        found = _defaults(file, name or written.rpartition(".")[2]) | found
    return found


def parameters(target: str) -> frozenset[str]:
    """The keyword arguments that ``target`` takes."""
    return frozenset(defaults(target))


@functools.cache
def schedules() -> dict[str, dict[str, Any]]:
    """NeMo 2.0's schedules of the learning rate, by NeMo 1.0's name, with the arguments that each
    takes and their defaults."""
    names = [node.name for node in _tree(_SCHEDULES).body if isinstance(node, ast.ClassDef)]
    return {name.removesuffix("Scheduler"): _defaults(_SCHEDULES, name) for name in names}


def schedule_of_nemo1(name: str) -> dict[str, Any]:
    """The same for NeMo 1.0's class; its bases take what it hands on."""
    try:
        node = next(one for one in _tree(_POLICIES).body if getattr(one, "name", None) == name)
    except StopIteration:
        return {}
    base = schedule_of_nemo1(getattr(node.bases[0], "id", "")) if node.bases else {}
    return base | _defaults(_POLICIES, name)


def _defaults(file: str, name: str) -> dict[str, Any]:
    named = {getattr(node, "name", None): node for node in reversed(_tree(file).body)}
    if not (node := named.get(name)):
        raise WorkshopError(
            f"{file} of the installed packages has no {name}: this NeMo is not one that "
            "`workshop migrate` knows."
        )
    if isinstance(node, ast.ClassDef):
        methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        if "__init__" not in methods:  # a dataclass
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return {
                field.target.id: _value(field.value)
                for field in fields
                if isinstance(field.target, ast.Name)
            }
        node = methods["__init__"]
    arguments, values = node.args, node.args.defaults
    plain = [argument.arg for argument in arguments.args if argument.arg != "self"]
    first = [None] * (len(plain) - len(values))
    pairs = [*zip(plain, [*first, *values], strict=True)]
    named_only = [argument.arg for argument in arguments.kwonlyargs]
    pairs += zip(named_only, arguments.kw_defaults, strict=True)
    return {argument: _value(value) for argument, value in pairs}


def _value(node: ast.expr | None) -> Any:
    """The literal that ``node`` is, or makes (``field(default_factory=lambda: [])``)."""
    if isinstance(node, ast.Call) and node.keywords:
        node = node.keywords[0].value
    if isinstance(node, ast.Lambda):
        node = node.body
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


@functools.cache
def _tree(file: str) -> ast.Module:
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / rest).is_file():
            return ast.parse((Path(folder) / rest).read_text(encoding="utf-8"))
    raise WorkshopError(
        f"{file} is not there. Install the environment of this workshop (make env): the "
        "arguments are checked against it."
    )
