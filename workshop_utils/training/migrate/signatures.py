"""What the installed NeMo's classes take, read from their source: nothing of it is imported, so it
answers in milliseconds."""

import ast
import functools
import importlib.util
from pathlib import Path

from workshop_utils.core.errors import WorkshopError

TARGETS = {
    "strategy": (
        "nl.MegatronStrategy",
        [
            ("nemo/lightning/pytorch/strategies/megatron_strategy.py", "MegatronStrategy"),
            ("torch/nn/parallel/distributed.py", "DistributedDataParallel"),
        ],
    ),
    "ddp": (
        "DistributedDataParallelConfig",
        [
            (
                "megatron/core/distributed/distributed_data_parallel_config.py",
                "DistributedDataParallelConfig",
            )
        ],
    ),
    "precision": (
        "nl.MegatronMixedPrecision",
        [("nemo/lightning/pytorch/plugins/mixed_precision.py", "MegatronMixedPrecision")],
    ),
    "trainer": ("nl.Trainer", [("lightning/pytorch/trainer/trainer.py", "Trainer")]),
    "stopping": (
        "EarlyStopping",
        [("lightning/pytorch/callbacks/early_stopping.py", "EarlyStopping")],
    ),
    "checkpoint": (
        "nl.ModelCheckpoint",
        [
            ("nemo/lightning/pytorch/callbacks/model_checkpoint.py", "ModelCheckpoint"),
            ("lightning/pytorch/callbacks/model_checkpoint.py", "ModelCheckpoint"),
        ],
    ),
    "log": ("nl.NeMoLogger", [("nemo/lightning/nemo_logger.py", "NeMoLogger")]),
    "restore": (
        "nl.RestoreConfig",
        [("nemo/lightning/pytorch/strategies/utils.py", "RestoreConfig")],
    ),
    "resume": ("nl.AutoResume", [("nemo/lightning/resume.py", "AutoResume")]),
    "optimizer": (
        "OptimizerConfig",
        [("megatron/core/optimizer/optimizer_config.py", "OptimizerConfig")],
    ),
    "tokenizer": (
        "get_nmt_tokenizer",
        [("nemo/collections/nlp/modules/common/tokenizer_utils.py", "get_nmt_tokenizer")],
    ),
    "config": (
        "llm.GPTConfig",
        [
            ("nemo/collections/llm/gpt/model/base.py", "GPTConfig"),
            ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
            ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
        ],
    ),
    "peft": ("llm.peft.LoRA", [("nemo/collections/llm/peft/lora.py", "LoRA")]),
    "rows": ("dict", [("nemo/collections/llm/gpt/data/core.py", "create_sft_dataset")]),
    "finetuning": (
        "llm.FineTuningDataModule",
        [("nemo/collections/llm/gpt/data/fine_tuning.py", "FineTuningDataModule")],
    ),
    "pretraining": (
        "llm.PreTrainingDataModule",
        [("nemo/collections/llm/gpt/data/pre_training.py", "PreTrainingDataModule")],
    ),
}
"""How each part of a NeMo 2.0 script is written, and the sources of what it takes: a class and
those it passes the rest on to."""

_SCHEDULES = "nemo/lightning/pytorch/optim/lr_scheduler.py"


@functools.cache
def parameters(target: str) -> frozenset[str]:
    """The keyword arguments that ``target`` (a key of TARGETS) takes in the installed versions.

    Raises:
        WorkshopError: the package is not installed, or has no such class any more.
    """
    return frozenset(
        name for file, name_of in TARGETS[target][1] for name in _parameters(file, name_of)
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
    found = [
        node
        for node in _tree(file).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
    ]
    if not found:
        raise WorkshopError(
            f"{file} of the installed packages has no {name}: this NeMo is not one that "
            "`workshop migrate` knows."
        )
    node = found[0]
    if isinstance(node, ast.ClassDef):
        methods = [
            one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"
        ]
        if not methods:  # a dataclass
            return [
                one.target.id
                for one in node.body
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            ]
        node = methods[0]
    return [one.arg for one in [*node.args.args, *node.args.kwonlyargs] if one.arg != "self"]


@functools.cache
def _tree(file: str) -> ast.Module:
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / rest).is_file():
            return ast.parse((Path(folder) / rest).read_text(encoding="utf-8"))
    raise WorkshopError(
        f"{file} is not there. Install the environment of this workshop (make env): the "
        "arguments are checked against it."
    )
