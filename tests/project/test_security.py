"""SECURITY.md speaks of the versions that are pinned, and of every pin that pyproject.toml holds
back."""

import re
import tomllib

from packaging.requirements import Requirement
from places import ROOT

from workshop_utils.series.lock import normalised, read_lock

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Known vulnerabilities")[2]
PINS = read_lock(ROOT / "requirements.txt")


def test_the_versions_are_the_pinned_ones():
    rows = re.findall(r"^\| ([\w-]+) ([\d.]+) \|", PAGE, re.MULTILINE)
    held = PAGE.partition("Held back too")[2].partition("pytorch-lightning")[0]
    others = re.findall(r"([a-z][\w-]+) (\d[\d.]*\d)(?= ?[,.(]| and)", held)
    assert len(rows) > 10 and len(others) > 10
    assert {name: version for name, version in rows + others if PINS.get(name) != version} == {}


def test_every_bound_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    held = {
        normalised(requirement.name)
        for requirement in map(Requirement, declared)
        if any(part.operator in ("<", "<=", "==") for part in requirement.specifier)
    }
    assert {name for name in held if f"{name} {PINS[name]}" not in PAGE} == set()
