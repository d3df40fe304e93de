"""One source of versions: the lock, and what has to agree with it."""

import re
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from places import ROOT

from workshop_utils.core.errors import WorkshopError
from workshop_utils.series.lock import environment_yaml, normalised, read_lock

PINS = read_lock(ROOT / "requirements.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, the extras of development and the build system's needs
    included."""
    needs = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    needs += PROJECT["project"]["optional-dependencies"]["dev"]
    return [Requirement(text) for text in needs]


def needs_of(name: str, extra: str = "") -> list[Requirement]:
    """What an installed package requires here."""
    needed = map(Requirement, metadata.requires(name) or [])
    return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]


def test_environment_yml_has_the_pins_of_the_lock():
    python, _, pip = ENVIRONMENT["dependencies"]
    pins = [f"{name}=={version}" for name, version in PINS.items()]
    assert pip["pip"] == pins, "they have drifted: run `make lock`"
    assert (ROOT / "environment.yml").read_text() == environment_yaml(PINS)
    assert PROJECT["project"]["requires-python"] == f"={python.removeprefix('python')}.*"


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_lock_satisfies_pyproject(requirement):
    pinned = PINS.get(normalised(requirement.name))
    assert pinned is not None, f"{requirement.name} is not in the lock"
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_the_lock_is_closed():
    """Whatever a pinned package requires here is pinned too; only torch may bring CUDA's libraries
    on top."""
    missing = set()
    for name in set(PINS) - {"torch"}:
        for needed in needs_of(name):
            pinned = PINS.get(normalised(needed.name))
            if pinned is None or not needed.specifier.contains(pinned, prereleases=True):
                missing.add(f"{name} wants {needed}, the lock has {pinned}")
    assert not missing


def test_nothing_but_pins_and_no_package_that_nothing_needs():
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"^\s*-|https?://|file:", text, re.MULTILINE)
    assert PINS["torch"] == "2.13.0"
    seen: set[tuple[str, str]] = set()
    todo = [(normalised(each.name), extra) for each in declared() for extra in ("", *each.extras)]
    while todo:
        name, extra = todo.pop()
        if name not in PINS or (name, extra) in seen:
            continue
        seen.add((name, extra))
        for needed in needs_of(name, extra):
            todo += [(normalised(needed.name), more) for more in ("", *needed.extras)]
    assert set(PINS) == {name for name, _ in seen}


def test_the_installed_versions_are_the_pinned_ones():
    assert {name: metadata.version(name).split("+")[0] for name in PINS} == PINS


@pytest.mark.parametrize(
    "line",
    ["a>=1", "a", "-r b.txt", "--index-url https://example.com", "a==1; python_version<'3'"],
)
def test_a_line_that_is_no_pin_is_named(tmp_path, line):
    (tmp_path / "lock.txt").write_text(f"# fine\na-b==1\n{line}\n")
    with pytest.raises(WorkshopError, match=r"lock\.txt, line 3"):
        read_lock(tmp_path / "lock.txt")


def test_a_package_pinned_twice_is_named(tmp_path):
    (tmp_path / "lock.txt").write_text("a-b==1\nA_b==2\n")
    with pytest.raises(WorkshopError, match="a-b is pinned twice"):
        read_lock(tmp_path / "lock.txt")
