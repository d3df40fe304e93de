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


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, the extras of development and the build system's needs
    included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [
        one for extra in project["project"]["optional-dependencies"].values() for one in extra
    ]
    return [
        Requirement(text)
        for text in project["project"]["dependencies"]
        + extras
        + project["build-system"]["requires"]
    ]


def test_environment_yml_has_the_pins_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pip == [f"{name}=={version}" for name, version in PINS.items()], (
        "they have drifted: run `make lock`"
    )
    assert (ROOT / "environment.yml").read_text() == environment_yaml(PINS)


def test_the_python_of_environment_yml_is_the_one_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = next(
        part for part in environment["dependencies"] if str(part).startswith("python=")
    ).removeprefix("python=")
    assert project["requires-python"] == f"=={version}.*"


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
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                pinned = PINS.get(normalised(needed.name))
                if pinned is None or not needed.specifier.contains(pinned, prereleases=True):
                    missing.add(f"{name} wants {needed}, the lock has {pinned}")
    assert not missing


def test_nothing_but_pins_and_no_package_that_nothing_needs():
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"^\s*-|https?://|file:", text, re.MULTILINE)
    assert PINS["torch"] == "2.13.0"
    wanted = {normalised(one.name): one.extras for one in declared()}
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra) for name, extras in wanted.items() for extra in {"", *extras}]
    while todo:
        name, extra = todo.pop()
        if name not in PINS or (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(normalised(needed.name), one) for one in {"", *needed.extras}]
    assert set(PINS) == {name for name, _ in seen}


@pytest.mark.parametrize("name", PINS)
def test_the_installed_version_is_the_pinned_one(name):
    assert metadata.version(name).split("+")[0] == PINS[name]


@pytest.mark.parametrize(
    "line",
    [
        "numpy>=1",
        "numpy",
        "-r other.txt",
        "--index-url https://example.com",
        "a==1; python_version<'3'",
    ],
)
def test_a_line_that_is_no_pin_is_named(tmp_path, line):
    (tmp_path / "lock.txt").write_text(f"# fine\na-b==1\n{line}\n")
    with pytest.raises(WorkshopError, match=r"lock\.txt, line 3"):
        read_lock(tmp_path / "lock.txt")


def test_a_package_pinned_twice_is_named(tmp_path):
    (tmp_path / "lock.txt").write_text("a-b==1\nA_b==2\n")
    with pytest.raises(WorkshopError, match="a-b is pinned twice"):
        read_lock(tmp_path / "lock.txt")
