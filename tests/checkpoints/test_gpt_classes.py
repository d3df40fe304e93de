"""The table of NeMo's configuration classes against the installed NeMo."""

import json
import subprocess
import sys

import pytest

from workshop_utils.checkpoints.formats import gpt_classes

PROGRAM = """
import dataclasses, importlib, inspect, json
from workshop_utils.runtime import nemo_cpu
nemo_cpu.apply()
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
found, models = {}, []
for name in ("llama", "llama_nemotron", "mistral", "mixtral", "qwen2", "qwen3", "nemotron"):
    module = importlib.import_module(f"nemo.collections.llm.gpt.model.{name}")
    for kind in list(vars(module).values()):
        if not inspect.isclass(kind) or kind.__module__ != module.__name__:
            continue
        if issubclass(kind, GPTModel):
            models.append(f"{kind.__module__}.{kind.__name__}")
        if issubclass(kind, GPTConfig):
            fields = {}
            for field in dataclasses.fields(kind):
                made = field.default_factory() if field.default is dataclasses.MISSING and callable(field.default_factory) else field.default
                if isinstance(made, (int, float, str, list, type(None))) or callable(made):
                    fields[field.name] = getattr(made, "__name__", made)
            found[f"{kind.__module__}.{kind.__name__}"] = fields
print("FOUND", json.dumps([found, models], default=str))
"""  # noqa: E501


@pytest.mark.slow
def test_the_defaults_are_those_of_the_installed_nemo():
    """Compares every class of the table, and that no plain class of these modules is missing from
    it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line, done.stderr[-3000:]
    installed, models = json.loads(line.removeprefix("FOUND "))
    known = {
        kind: defaults
        for family in gpt_classes.FAMILIES.values()
        for kind, defaults in family.configs.items()
    }
    for kind, defaults in known.items():
        # Classes of other families than Megatron-Core's plain GPT lack some fields altogether.
        assert {name: installed[kind].get(name) for name in defaults} == defaults, kind
        assert ("scale_factor" in installed[kind]) == ("scale_factor" in defaults), kind
    others = {kind.rpartition(".")[2] for kind in set(installed) - set(known)}
    unlike = (
        "Llama4",
        "Llama33NemotronSuper",
        "Llama31NemotronUltra",
        "Qwen3MoE",
        "Qwen3Config30B_A3B",
        "Qwen3Config235B_A22B",
    )
    assert all(name.startswith(unlike) for name in others), others
    assert {model for family in gpt_classes.FAMILIES.values() for model in family.models} <= set(
        models
    )
