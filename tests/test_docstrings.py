"""Whatever has a name without an underscore says in a docstring what it is, inner functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("workshop_utils", "benchmarks", "data", "notebooks/scripts")
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_have_docstrings(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    bare = []
    for file in files:
        tree = ast.parse(file.read_text("utf-8"))
        named = [node for node in ast.walk(tree) if isinstance(node, NAMED) and not node.name.startswith("_")]
        bare += [f"{file.relative_to(ROOT)}:{node.lineno} {node.name}" for node in named if not ast.get_docstring(node)]
        bare += [f"{file.relative_to(ROOT)}" for _ in range(not ast.get_docstring(tree))]
    assert not bare
