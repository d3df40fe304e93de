"""The recipes that NeMo has, from ``recipe_index.json`` beside this file: names are checked and listed without NeMo's 20 s import.

``python -m workshop_utils.recipe.index`` writes the file anew from the installed NeMo; tests keep it true.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from workshop_utils import paths
from workshop_utils.errors import WorkshopError

FILE = Path(__file__).with_name("recipe_index.json")


@dataclass(frozen=True)
class Recipe:
    """One recipe: a module of ``nemo.collections.llm.recipes``.

    ``model`` and ``config`` are NeMo's classes, ``layers`` and ``hidden`` their sizes. ``finetune`` says whether it has a
    ``finetune_recipe``; the fields after it come from that with LoRA (None without one): ``base`` is the checkpoint it names,
    ``global_batch_size`` rows, ``seq_length`` tokens.
    """

    name: str
    model: str
    config: str
    layers: int | None
    hidden: int | None
    finetune: bool
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
    import difflib

    # NeMo writes llama31_8b where people write llama3_1_8b or Llama-3.1-8B: compare without what separates.
    plain = {known.replace("_", ""): known for known in recipes()}
    close = difflib.get_close_matches("".join(filter(str.isalnum, name.lower())), plain, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(plain[one] for one in close)}?" if close else ""
    raise WorkshopError(
        f"recipe_cls_name: NeMo {nemo_version()} has no recipe '{name}'.{hint} `workshop recipe --list` shows all."
    )


@functools.cache
def _content() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def generate() -> dict:
    """The content of the file, from the installed NeMo: every recipe is built, none is run. Imports NeMo."""
    from workshop_utils import nemo_cpu

    nemo_cpu.apply()
    import nemo
    from nemo.collections.llm import recipes as modules

    found = {name: module for name, module in vars(modules).items() if hasattr(module, "model") and hasattr(module, "__file__")}
    return {"nemo": nemo.__version__, "recipes": [asdict(_described(name, module)) for name, module in sorted(found.items())]}


def _described(name: str, module) -> Recipe:
    model = module.model()
    config = model.config if hasattr(model, "config") else None
    finetune = hasattr(module, "finetune_recipe")
    fields = {
        "name": name,
        "model": model.__fn_or_cls__.__name__,
        "config": config.__fn_or_cls__.__name__ if config is not None else "",
        "layers": getattr(config, "num_layers", None),
        "hidden": getattr(config, "hidden_size", None),
        "finetune": finetune,
        "pretrain": hasattr(module, "pretrain_recipe"),
    }
    if finetune:
        recipe = module.finetune_recipe(peft_scheme="lora")
        print(name, recipe)
    return Recipe(**fields)


if __name__ == "__main__":
    paths.write_text(FILE, json.dumps(generate(), indent=1) + "\n")
    print(f"{len(recipes())} recipes")
