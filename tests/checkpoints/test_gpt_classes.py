"""The table of NeMo's configuration classes against the installed NeMo."""

import json
import subprocess
import sys

import pytest

from workshop_utils.checkpoints.formats.gpt_classes import FAMILIES

PROGRAM = """
import dataclasses, importlib, inspect, json, sys
from workshop_utils.runtime import nemo_cpu
nemo_cpu.apply()
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
configs, names = {}, []
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    names += [f"{name}.{other}" for other in vars(module)]
    for kind in list(vars(module).values()):
        if not inspect.isclass(kind) or kind.__module__ != name or not issubclass(kind, GPTConfig):
            continue
        fields = {}
        for field in dataclasses.fields(kind):
            default = field.default
            if default is dataclasses.MISSING and callable(field.default_factory):
                default = field.default_factory()
            if isinstance(default, (int, float, str, list, type(None))) or callable(default):
                fields[field.name] = getattr(default, "__name__", default)
        configs[f"{name}.{kind.__name__}"] = fields
print("READ", json.dumps([configs, names], default=str))
"""


@pytest.mark.slow
def test_the_defaults_are_those_of_the_installed_nemo():
    """Compares every class of the table, and that no plain class of these modules is missing from
    it."""
    known = {
        kind: fields for family in FAMILIES.values() for kind, fields in family.configs.items()
    }
    models = {model for family in FAMILIES.values() for model in family.models}
    importers = {".".join(family.importer) for family in FAMILIES.values()}
    modules = sorted({name.rpartition(".")[0] for name in known.keys() | models})
    command = [sys.executable, "-c", PROGRAM, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("READ ")), None)
    assert line, done.stderr[-3000:]
    installed, names = json.loads(line.removeprefix("READ "))
    assert models | importers <= set(names)
    for kind, defaults in known.items():
        # Classes of other families than Megatron-Core's plain GPT lack some fields altogether.
        assert {name: installed[kind].get(name) for name in defaults} == defaults, kind
        assert ("scale_factor" in installed[kind]) == ("scale_factor" in defaults), kind
    others = {kind.rpartition(".")[2] for kind in set(installed) - set(known)}
    unlike = ("Llama4", "Llama33NemotronSuper", "Llama31NemotronUltra", "Qwen3MoE")
    unlike += ("Qwen3Config30B_A3B", "Qwen3Config235B_A22B")
    assert all(name.startswith(unlike) for name in others), others
