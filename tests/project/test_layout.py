"""The house: nine rooms, imports that only go down, and no circle of files. Lazy imports count as
others do."""

import ast
import graphlib
from functools import cache
from pathlib import Path

from places import ROOT

PACKAGE = ROOT / "workshop_utils"
ROOMS = (
    "core",
    "runtime",
    "checkpoints",
    "adapters",
    "inference",
    "serving",
    "training",
    "series",
    "cli",
)
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


def imported(file: Path) -> set[tuple[int, str]]:
    """(line, module) of every import of this package in ``file``, also inside functions and under
    TYPE_CHECKING."""
    found = set()
    package = module(file) if file.name == "__init__.py" else module(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names if alias.name in files()}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                name = next(
                    (name for name in (f"{base}.{alias.name}", base) if name in files()), None
                )
                if name:
                    found.add((node.lineno, name))
                else:
                    assert not base.startswith("workshop_utils"), (
                        f"{file}:{node.lineno} imports {base}.{alias.name}, which is not there"
                    )
    return found


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
            if (
                (here := room(name))
                and (there := room(other))
                and ROOMS.index(there) > ROOMS.index(here)
            ):
                up.append(f"{file.relative_to(ROOT)}:{line} -> {other}")
    assert not up, "\n".join(up)


def test_the_readers_stand_on_core_alone():
    out = []
    for name, file in files().items():
        if file.relative_to(PACKAGE).as_posix().startswith(OWN[:3]):
            out += [f"{name} -> {other}" for _, other in imported(file) if room(other) == "runtime"]
    assert not out, "\n".join(out)


def test_there_is_no_circle_of_files():
    graph = {
        name: {other for _, other in imported(file)} - {name} for name, file in files().items()
    }
    # Importing a module runs the package that it lies in first.
    for name, others in graph.items():
        others |= {
            parent
            for other in tuple(others)
            if (parent := other.rpartition(".")[0]) in files() and not name.startswith(parent + ".")
        } - {name}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_tests_mirror_the_rooms():
    assert {
        path.name
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    } == {
        *ROOMS,
        "samples",
        "project",
        "browser",
        "fuzz",
        "data",
    }
