"""The house: nine rooms, imports that only go down, and no circle of files. Lazy imports count as
others do."""

import ast
import graphlib
from functools import cache
from pathlib import Path

from places import ROOT

PACKAGE = ROOT / "workshop_utils"
ROOMS = [
    "core",
    "runtime",
    "checkpoints",
    "adapters",
    "inference",
    "serving",
    "training",
    "series",
    "cli",
]
"""From the ground up. A file may import from its own room and from those before it."""
OWN = ("checkpoints/formats", "checkpoints/verify", "checkpoints/sources", "core", "runtime")
"""What stands on ``core`` alone, if on anything: a reader of checkpoints starts no process and
knows no device."""


def module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def files() -> dict[str, Path]:
    return {module(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def imported(file: Path) -> set[tuple[int, str]]:
    """(line, module) of every import of this package in ``file``, also inside functions and under
    TYPE_CHECKING."""
    modules = set()
    package = module(file) if file.name == "__init__.py" else module(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {(node.lineno, alias.name) for alias in node.names if alias.name in files()}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                name = whole if whole in files() else base
                if name in files():
                    modules.add((node.lineno, name))
                else:
                    gone = f"{file}:{node.lineno} imports {whole}, which is not there"
                    assert not base.startswith("workshop_utils"), gone
    return modules


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else None


def test_the_top_level_is_the_nine_rooms():
    there = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "shipped")}
    assert there == {*ROOMS, "__init__.py", "__main__.py"}


def test_every_import_goes_down():
    up = []
    for name, file in files().items():
        for line, other in imported(file):
            here, there = room(name), room(other)
            if here and there and ROOMS.index(there) > ROOMS.index(here):
                up.append(f"{file.relative_to(ROOT)}:{line} -> {other}")
    assert not up, "\n".join(up)


def test_the_readers_stand_on_core_alone():
    out = []
    for name, file in files().items():
        if file.relative_to(PACKAGE).as_posix().startswith(OWN[:3]):
            out += [f"{name} -> {other}" for _, other in imported(file) if room(other) == "runtime"]
    assert not out, "\n".join(out)


def test_there_is_no_circle_of_files():
    graph = {}
    for name, file in files().items():
        others = {other for _, other in imported(file)}
        # Importing a module runs the package that it lies in first.
        parents = {other.rpartition(".")[0] for other in others} & files().keys()
        outside = {parent for parent in parents if not name.startswith(f"{parent}.")}
        graph[name] = (others | outside) - {name}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    others = {"samples", "project", "browser", "fuzz", "data"}
    assert folders - {"__pycache__"} == {*ROOMS, *others}
