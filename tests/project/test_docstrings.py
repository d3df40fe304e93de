"""Every module and every public class says in a docstring what it is; a function, where its name
and types do not tell it all."""

import ast

import pytest
from places import ROOT

FOLDERS = ("workshop_utils", "benchmarks", "data", "notebooks/scripts")


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_have_docstrings(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    bare = []
    for file in files:
        tree = ast.parse(file.read_text("utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        public = [node for node in classes if not node.name.startswith("_")]
        bare += [
            f"{file.relative_to(ROOT)} {getattr(node, 'name', '')}"
            for node in (tree, *public)
            if not ast.get_docstring(node)
        ]
    assert not bare
