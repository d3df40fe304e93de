"""What the installed NeMo's classes take, read from their source: nothing of it is imported, so it
answers in milliseconds."""

import ast
import functools
import importlib.util
from pathlib import Path

from workshop_utils.core.errors import WorkshopError

_NL, _LLM, _CORE = "nemo/lightning/", "nemo/collections/llm/", "megatron/core/"
_NLP = "nemo/collections/nlp/modules/common/"
_LIGHTNING = "lightning/pytorch/"
_SCHEDULES = f"{_NL}pytorch/optim/lr_scheduler.py"
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
def parameters(target: str) -> frozenset[str]:
    """The keyword arguments that ``target`` (a key of TARGETS) takes in the installed versions.
    Raises WorkshopError where the package is not installed, or has no such class any more."""
    written, *sources = TARGETS[target]
    names = (source.partition(":") for source in sources)
    return frozenset(
        argument
        for file, _, name in names
        for argument in _parameters(file, name or written.rpartition(".")[2])
    )


@functools.cache
def schedules() -> dict[str, frozenset[str]]:
    """NeMo 2.0's schedules of the learning rate, by NeMo 1.0's name, with the arguments that each
    takes."""
    names = [node.name for node in _tree(_SCHEDULES).body if isinstance(node, ast.ClassDef)]
    return {
        name.removesuffix("Scheduler"): frozenset(_parameters(_SCHEDULES, name)) for name in names
    }


def _parameters(file: str, name: str) -> list[str]:
    named = {getattr(node, "name", None): node for node in reversed(_tree(file).body)}
    if not (node := named.get(name)):
        raise WorkshopError(
            f"{file} of the installed packages has no {name}: this NeMo is not one that "
            "`workshop migrate` knows."
        )
    if isinstance(node, ast.ClassDef):
        methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        if "__init__" not in methods:  # a dataclass
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            return [field.id for field in fields if isinstance(field, ast.Name)]
        node = methods["__init__"]
    arguments = (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    return [name for name in arguments if name != "self"]


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
