"""The recipes that NeMo has, from ``recipe_index.json`` beside this file: names are checked and
listed without NeMo's 20 s import.

``python -m workshop_utils.training.recipe.index`` writes the file anew from the installed NeMo;
tests keep it true.
"""

import functools
import inspect
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.nearest import did_you_mean, nearest

if TYPE_CHECKING:
    import nemo_run as run

FILE = Path(__file__).with_name("recipe_index.json")


@dataclass(frozen=True)
class Recipe:
    """One recipe: a module of ``nemo.collections.llm.recipes``, and NeMo's classes in it.

    ``schemes`` are the values of ``peft_scheme`` that its ``finetune_recipe`` takes (none where it
    has none), each with its own values of the options that may be left to it: ``learning_rate``,
    ``lora_dim`` and so on. The fields after ``pretrain`` come from the first of them: ``base`` is
    the checkpoint it names, ``global_batch_size`` rows, ``seq_length`` tokens.
    """

    name: str
    model: str
    config: str | None
    layers: int | None
    hidden: int | None
    schemes: dict[str, dict[str, Any]]
    pretrain: bool
    base: str | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    context_parallel_size: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    seq_length: int | None = None


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Every recipe, by name."""
    return {entry["name"]: Recipe(**entry) for entry in _content()["recipes"]}


def table() -> str:
    """The recipes as a table: schemes, parallel sizes and batches of their fine-tuning, and the
    model."""
    head = ("recipe", "fine-tuning", "TP", "PP", "CP", "tokens")
    head += ("layers", "hidden", "model", "base")
    rows = [
        (
            *(recipe.name, ", ".join(recipe.schemes) or "-", recipe.tensor_parallel_size),
            *(recipe.pipeline_parallel_size, recipe.context_parallel_size, recipe.seq_length),
            *(recipe.layers, recipe.hidden, recipe.config, recipe.base),
        )
        for recipe in recipes().values()
    ]
    cells = [head, *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    usable = sum(bool(recipe.schemes) for recipe in recipes().values())
    lines.append(
        f"{len(rows)} recipes of NeMo {nemo_version()}, {usable} of them for fine-tuning. TP, PP, "
        "CP and tokens: its own, with LoRA."
    )
    return "\n".join(lines)


def nemo_version() -> str:
    """The NeMo that the index was made from."""
    return _content()["nemo"]


def find(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        WorkshopError: there is none; the nearest names are offered.
    """
    if name in recipes():
        return recipes()[name]
    # NeMo writes llama31_8b where people write llama3_1_8b or Llama-3.1-8B: compare without what
    # separates.
    plain = {known.replace("_", ""): known for known in recipes()}
    hint = did_you_mean(
        plain[spelling]
        for spelling in nearest("".join(filter(str.isalnum, name.lower())), plain, most=3)
    )
    raise WorkshopError(
        f"recipe_cls_name: NeMo {nemo_version()} has no recipe '{name}'.{hint} `workshop recipe "
        "--list` shows all."
    )


@functools.cache
def _content() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def generate() -> dict:
    """The content of the file, from the installed NeMo: every recipe is built, none is run. Imports
    NeMo."""
    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    import nemo
    from nemo.collections.llm import recipes as modules

    described = [
        asdict(_described(name, module))
        for name, module in sorted(vars(modules).items())
        if isinstance(module, ModuleType) and _gives_a_model(module)
    ]
    return {"nemo": nemo.__version__, "recipes": described}


def _gives_a_model(module: ModuleType) -> bool:
    """Whether the recipe knows its model. ``hf_auto_model_for_causal_lm`` takes any of
    transformers', without Megatron."""
    if not hasattr(module, "model"):
        return False
    parameters = inspect.signature(module.model).parameters.values()
    return all(parameter.default is not parameter.empty for parameter in parameters)


def _get(config: Any, *names: str) -> Any:
    """The value at the end of ``names``; None where one is not there."""
    for name in names:
        config = getattr(config, name, None)
    return config


def _size(model: "run.Config", name: str) -> int | None:
    """Fiddle does not see the defaults of a class that only inherits from a dataclass."""
    config = _get(model, "config")
    return _get(config, name) or _get(config, "__fn_or_cls__", name)


def _described(name: str, module: ModuleType) -> Recipe:
    model = module.model()
    built = _finetunings(module) if hasattr(module, "finetune_recipe") else {}
    first = next(iter(built.values()), None)
    strategy, base = _get(first, "trainer", "strategy"), _get(first, "resume", "restore_config")
    base = _get(base, "path")
    return Recipe(
        name=name,
        model=model.__fn_or_cls__.__name__,
        config=_get(model, "config", "__fn_or_cls__", "__name__"),
        layers=_size(model, "num_layers"),
        hidden=_size(model, "hidden_size"),
        schemes={scheme: _own(recipe) for scheme, recipe in built.items()},
        pretrain=hasattr(module, "pretrain_recipe"),
        base=base and base.removeprefix("nemo://"),
        tensor_parallel_size=_get(strategy, "tensor_model_parallel_size"),
        pipeline_parallel_size=_get(strategy, "pipeline_model_parallel_size"),
        context_parallel_size=_get(strategy, "context_parallel_size"),
        global_batch_size=_get(first, "data", "global_batch_size"),
        micro_batch_size=_get(first, "data", "micro_batch_size"),
        seq_length=_get(first, "data", "seq_length"),
    )


def _finetunings(module: ModuleType) -> dict[str, "run.Partial"]:
    """The fine-tuning recipe with each of our schemes that it takes."""
    built = {}
    for scheme, theirs in (("lora", "lora"), ("dora", "dora"), ("full_ft", "none")):
        try:
            # Some refuse to be built for few nodes.
            built[scheme] = module.finetune_recipe(peft_scheme=theirs, num_nodes=16)
        # What NeMo's recipes raise for a scheme that they lack.
        except (AssertionError, TypeError, ValueError) as error:
            print(f"{module.__name__} {scheme}: {error}", file=sys.stderr)
    return built


def _own(recipe: "run.Partial") -> dict[str, Any]:
    """What the recipe has for the options that may be left to it; without those that it has nothing
    for."""
    import fiddle

    peft = fiddle.build(getattr(recipe, "peft", None))  # its layers are made by a factory
    values = {
        "learning_rate": _get(recipe, "optim", "config", "lr"),
        "warmup_steps": _get(recipe, "optim", "lr_scheduler", "warmup_steps"),
    }
    for name in ("dim", "alpha", "dropout", "target_modules"):
        values[f"lora_{name}"] = _get(peft, name)
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    index = generate()
    lines = ",\n".join(map(json.dumps, index["recipes"]))  # one a line
    paths.write_text(FILE, f'{{"nemo": {json.dumps(index["nemo"])}, "recipes": [\n{lines}\n]}}\n')
    print(f"{len(recipes())} recipes")
