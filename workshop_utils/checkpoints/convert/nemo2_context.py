"""``context/`` of a NeMo 2.0 checkpoint: ``model.yaml`` for people and other tools, ``io.json`` for
NeMo.

NeMo itself reads only ``io.json`` (``nemo.lightning.io.load_context``), which fiddle wrote: a graph
of ``fiddle.Config`` objects, each a class and its arguments. This writes such a graph without
loading NeMo or fiddle; the tests have both read it. Source of the format:
``fiddle/_src/experimental/serialization.py`` (fiddle 0.3) and ``nemo/lightning/io/mixin.py`` (NeMo
2.4.1).
"""

import json
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.checkpoints.formats.gpt_classes import ROPE_SCALING, Family

_FUNCTIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "relu": "torch.nn.functional.relu",
    "squared_relu": "nemo.collections.llm.fn.activation.squared_relu",
}
_TRAINER = {
    "_target_": "nemo.lightning.pytorch.trainer.Trainer",
    "accelerator": "cpu",
    "devices": 1,
    "strategy": {
        "_target_": "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy",
        "ckpt_save_optimizer": False,
    },
}
"""As NeMo's importers write it; llm.finetune and llm.generate bring their own."""


def model_tree(
    fields: dict[str, Any], family: Family, rows: int, dtype: str, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """``context/model.yaml`` of a model with ``fields``
    (:mod:`workshop_utils.checkpoints.formats.gpt_config`).

    ``rows`` and ``dtype`` are those of the embedding, ``tokenizer`` is the section of that name.
    """
    scaled = all(name in fields for name in ROPE_SCALING)
    kind = family.scaled if scaled and family.scaled else next(iter(family.configs))
    config = {name: fields[name] for name in family.configs[kind]}
    config |= {
        "_target_": kind,
        "activation_func": _reference(_FUNCTIONS[fields["activation_func"]]),
        "vocab_size": rows,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": _reference(f"torch.{dtype}"),
    }
    return {"_target_": family.models[0], "config": config, "tokenizer": tokenizer}


def _reference(name: str) -> dict[str, Any]:
    """A class, function or dtype itself, not called."""
    return {"_target_": name, "_call_": False}


def write(context: Path, tree: dict[str, Any]) -> None:
    """Write ``model.yaml`` and ``io.json`` for ``tree`` (of :func:`model_tree`)."""
    (context / "model.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (context / "io.json").write_text(json.dumps(_Graph(tree).as_dict()), encoding="utf-8")


class _Graph:
    """The objects of an ``io.json``."""

    def __init__(self, model: dict[str, Any]) -> None:
        self._objects: dict[str, Any] = {}
        context = {"_target_": "nemo.lightning.io.pl.TrainerContext", "model": model}
        self._root = self._value(context | {"trainer": _TRAINER, "extra": {}}, "<root>")

    def as_dict(self) -> dict[str, Any]:
        return {
            "root": self._root,
            "objects": self._objects,
            "refcounts": dict.fromkeys(self._objects, 1),
            "version": "0.0.1",
        }

    def _value(self, value: Any, path: str) -> dict[str, Any]:
        """An argument: a plain value, a class or function, a ``fiddle.Config``, or a container."""
        if isinstance(value, dict) and "_target_" in value:
            if value.get("_call_", True):
                return self._config(value, path)
            return _symbol(value["_target_"], path)
        if isinstance(value, dict):
            items = [
                [f"Key(key={key!r})", self._value(item, f"{path}[{key!r}]")]
                for key, item in value.items()
            ]
            return self._add("dict", "builtins.dict", items, _keys(list(value)), path)
        if isinstance(value, list):
            items = [
                [f"Index(index={index})", self._value(item, f"{path}[{index}]")]
                for index, item in enumerate(value)
            ]
            return self._add("list", "builtins.list", items, None, path)
        return {"type": "leaf", "value": value, "paths": [path]}

    def _config(self, value: dict[str, Any], path: str) -> dict[str, Any]:
        target = value["_target_"]
        arguments = {name: value[name] for name in value if name not in ("_target_", "_call_")}
        items = [
            [f"Attr(name={name!r})", self._value(item, f"{path}.{name}")]
            for name, item in arguments.items()
        ]
        traverser = "fiddle._src.config.BuildableTraverserMetadata"
        names = _keys(list(arguments))["items"]
        parts = [
            ["Attr(name='fn_or_cls')", _symbol(target)],
            ["Attr(name='argument_names')", self._add("tuple", "builtins.tuple", names)],
            ["Attr(name='argument_tags')", self._add("dict", "builtins.dict", [], _keys([]))],
            ["Attr(name='argument_history')", self._add("dict", "builtins.dict", [], _keys([]))],
        ]
        hint = "buildable_traverser_metadata"
        metadata = self._add(hint, traverser, parts, _symbol(traverser))
        kind = "fiddle._src.config.Config"
        return self._add(target.rpartition(".")[2], kind, items, metadata, path)

    def _add(
        self, hint: str, kind: str, items: list, metadata: Any = None, path: str | None = None
    ) -> dict[str, Any]:
        key = f"{hint}_{1 + sum(name.rpartition('_')[0] == hint for name in self._objects)}"
        entry = {"type": _symbol(kind), "items": items, "metadata": metadata}
        self._objects[key] = entry | {"paths": [path]} if path else entry
        return {"type": "ref", "key": key}


def _keys(keys: list[Any]) -> dict[str, Any]:
    """Metadata of a dictionary: the tuple of its keys, in place."""
    items = [[f"Index(index={index})", key] for index, key in enumerate(keys)]
    return {"type": _symbol("builtins.tuple"), "items": items, "metadata": None}


def _symbol(dotted: str, path: str | None = None) -> dict[str, Any]:
    module, _, name = dotted.rpartition(".")
    reference: dict[str, Any] = {"type": "pyref", "module": module, "name": name}
    return reference | {"paths": [path]} if path else reference
