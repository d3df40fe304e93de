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
    """One recipe: a module of ``nemo.collections.llm.recipes``.

    ``model`` and ``config`` are NeMo's classes, ``layers`` and ``hidden`` their sizes. ``schemes``
    are the values of ``peft_scheme`` that its ``finetune_recipe`` takes (none where it has none),
    each with its own values of the options that may be left to it: ``learning_rate``,
    ``warmup_steps``, ``lora_dim`` and so on. The fields after ``pretrain`` come from the first of
    them: ``base`` is the checkpoint it names, ``global_batch_size`` rows, ``seq_length`` tokens.
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
    head = (
        "recipe",
        "fine-tuning",
        "TP",
        "PP",
        "CP",
        "tokens",
        "layers",
        "hidden",
        "model",
        "base",
    )
    rows = [
        (
            one.name,
            ", ".join(one.schemes) or "-",
            *(
                one.tensor_parallel_size,
                one.pipeline_parallel_size,
                one.context_parallel_size,
                one.seq_length,
            ),
            *(one.layers, one.hidden, one.config, one.base),
        )
        for one in recipes().values()
    ]
    cells = [head, *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    usable = sum(bool(one.schemes) for one in recipes().values())
    return "\n".join(
        [
            *lines,
            (
                f"{len(rows)} recipes of NeMo {nemo_version()}, {usable} of them for fine-tuning. "
                "TP, PP, CP and tokens: its own, with LoRA."
            ),
        ]
    )


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
        plain[one] for one in nearest("".join(filter(str.isalnum, name.lower())), plain, most=3)
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

    found = {
        name: module
        for name, module in vars(modules).items()
        if isinstance(module, ModuleType) and _gives_a_model(module)
    }
    return {
        "nemo": nemo.__version__,
        "recipes": [asdict(_described(name, module)) for name, module in sorted(found.items())],
    }


def _gives_a_model(module: ModuleType) -> bool:
    """Whether the recipe knows its model. ``hf_auto_model_for_causal_lm`` takes any of
    transformers', without Megatron."""
    parameters = (
        inspect.signature(module.model).parameters.values() if hasattr(module, "model") else None
    )
    return parameters is not None and all(one.default is not one.empty for one in parameters)


def _described(name: str, module: ModuleType) -> Recipe:
    model = module.model()
    config = getattr(model, "config", None)
    built = _finetunings(module) if hasattr(module, "finetune_recipe") else {}
    first = next(iter(built.values()), None)
    return Recipe(
        name=name,
        model=model.__fn_or_cls__.__name__,
        config=config.__fn_or_cls__.__name__ if config is not None else None,
        layers=getattr(config, "num_layers", None),
        hidden=getattr(config, "hidden_size", None),
        schemes={scheme: _own(recipe) for scheme, recipe in built.items()},
        pretrain=hasattr(module, "pretrain_recipe"),
        **(_finetuning(first) if first is not None else {}),
    )


def _finetunings(module: ModuleType) -> dict[str, "run.Partial"]:
    """The fine-tuning recipe with each of our schemes that it takes."""
    built = {}
    for scheme, theirs in (("lora", "lora"), ("dora", "dora"), ("full_ft", "none")):
        try:
            built[scheme] = module.finetune_recipe(
                peft_scheme=theirs, num_nodes=16
            )  # some refuse to be built for few
        except (
            AssertionError,
            TypeError,
            ValueError,
        ) as error:  # what NeMo's recipes raise for a scheme that they lack
            print(f"{module.__name__} {scheme}: {error}", file=sys.stderr)
    return built


def _finetuning(recipe: "run.Partial") -> dict[str, int | str | None]:
    """Sizes and base of a fine-tuning recipe, where it gives them."""
    strategy, data = getattr(recipe.trainer, "strategy", None), getattr(recipe, "data", None)
    resume = getattr(getattr(recipe, "resume", None), "restore_config", None)
    sizes = {
        size: getattr(strategy, size, None)
        for size in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
        )
    }
    batches = {
        size: getattr(data, size, None)
        for size in ("global_batch_size", "micro_batch_size", "seq_length")
    }
    base = getattr(resume, "path", None)
    return (
        {size.replace("_model_", "_"): value for size, value in sizes.items()}
        | batches
        | {"base": base and base.removeprefix("nemo://")}
    )


def _own(recipe: "run.Partial") -> dict[str, Any]:
    """What the recipe has for the options that may be left to it; without those that it has nothing
    for."""
    import fiddle

    optim, peft = (
        getattr(recipe, "optim", None),
        fiddle.build(getattr(recipe, "peft", None)),
    )  # built: its layers are made by a factory
    found = {
        "learning_rate": getattr(getattr(optim, "config", None), "lr", None),
        "warmup_steps": getattr(getattr(optim, "lr_scheduler", None), "warmup_steps", None),
        **{
            f"lora_{name}": getattr(peft, name, None)
            for name in ("dim", "alpha", "dropout", "target_modules")
        },
    }
    return {name: value for name, value in found.items() if value is not None}


if __name__ == "__main__":
    made = generate()
    lines = ",\n".join(json.dumps(one) for one in made["recipes"])  # one a line
    paths.write_text(FILE, f'{{"nemo": {json.dumps(made["nemo"])}, "recipes": [\n{lines}\n]}}\n')
    print(f"{len(recipes())} recipes")
