"""Homes that cannot be written to. A file where a directory should be stands for one: it stops
root, too."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from workshop_utils.cli import main
from workshop_utils.core import home
from workshop_utils.series import preflight

PLACES_OF_LIBRARIES = """\
import json
from workshop_utils.core import home
home.use_writable_places()
import IPython.paths, huggingface_hub.constants, jupyter_core.paths, matplotlib
print(json.dumps([matplotlib.get_cachedir(), matplotlib.get_configdir(), huggingface_hub.constants.HF_HOME, IPython.paths.get_ipython_dir(),
                  jupyter_core.paths.jupyter_config_dir(), jupyter_core.paths.jupyter_runtime_dir()]))
"""  # noqa: E501


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A workshop in a folder of its own, and an environment that names no place."""
    named = {"HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", *home.places()}
    named |= {name for name in os.environ if name.startswith("JUPYTER")}
    kept = {name: value for name, value in os.environ.items() if name not in named}
    root = tmp_path / "clone"
    root.mkdir()
    monkeypatch.setattr(os, "environ", kept | {"WORKSHOP_ROOT": str(root)})
    return root


def python(*words: str, **variables: str) -> str:
    """What Python prints in the environment of the test."""
    command, environment = [sys.executable, *words], os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def shut(tmp_path: Path, *names: str) -> Path:
    """A home where each of ``names`` cannot be a directory."""
    made = tmp_path / "shut"
    for name in names:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).touch()
    return made


def test_nothing_is_set_where_the_home_can_be_written_to(root, tmp_path):
    os.environ["HOME"] = str(tmp_path)
    before = dict(os.environ)
    home.use_writable_places()
    assert os.environ == before
    assert not home.stand_in().exists()
    assert str(preflight.home()) == "[OK]   home: can be written to"


@pytest.mark.parametrize("named", ["/nonexistent", f"{os.devnull}/home", None])
def test_a_home_that_is_none(root, monkeypatch, named):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if named:
        os.environ["HOME"] = named
    home.use_writable_places()
    assert Path.home() == root / ".home"
    for place in home.places().values():
        assert place.is_relative_to(root / ".home") and home.can_be_written(place)
    check = preflight.home()
    assert check.status == "WARN"
    assert ".home takes its place for HOME" in check.found
    assert "set HOME to a folder that is yours" in check.fix


def test_only_what_cannot_be_written_to_is_moved(root, tmp_path):
    os.environ["HOME"] = str(shut(tmp_path, ".cache", ".jupyter"))
    home.use_writable_places()
    moved = {name for name, value in os.environ.items() if value.startswith(str(root / ".home"))}
    assert moved == {"XDG_CACHE_HOME", "HF_HOME", "NEMO_HOME", "JUPYTER_CONFIG_DIR", home.MOVED}
    assert Path.home() == tmp_path / "shut"


def test_what_a_person_has_set_stays(root, tmp_path):
    os.environ |= {"HOME": "/nonexistent", "HF_HOME": str(tmp_path / "hub")}
    os.environ["XDG_CACHE_HOME"] = f"{os.devnull}/cache"
    home.use_writable_places()
    assert os.environ["HF_HOME"] == str(tmp_path / "hub")
    assert os.environ["XDG_CACHE_HOME"] == f"{os.devnull}/cache"
    check = preflight.home()
    assert check.status == "FAIL"
    assert check.found == f"cannot be written to: XDG_CACHE_HOME ({os.devnull}/cache)"


def test_the_libraries_take_the_places(root, tmp_path):
    names = ".cache", ".config", ".local", ".jupyter", ".ipython"
    printed = python("-W", "error", "-c", PLACES_OF_LIBRARIES, HOME=str(shut(tmp_path, *names)))
    assert all(place.startswith(str(root / ".home")) for place in json.loads(printed)), printed


def test_neither_the_home_nor_the_workshop_can_be_written_to(root):
    """Commands that only read go on; what they need for themselves goes with them."""
    os.environ |= {"HOME": "/nonexistent", "WORKSHOP_ROOT": f"{os.devnull}/clone"}
    code = (
        "import os, workshop_utils.core.home as home; home.use_writable_places(); assert "
        "os.path.isdir(os.environ['HOME']); print(os.environ['HOME'])"
    )
    assert not os.path.exists(python("-c", code).strip())


def test_a_program_of_others_gets_the_places(root):
    words = sys.executable, "-c", "import os; print(os.environ['HOME'])"
    home = python("-m", "workshop_utils.core.home", *words, HOME="/nonexistent")
    assert home == f"{root / '.home'}\n"


def test_the_command_starts_for_a_user_that_the_system_does_not_know(root, monkeypatch, capsys):
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(SystemExit, match="0"):
        main(["nim", "run", "--help"])
    assert "~/.cache/nim" in capsys.readouterr().out


@pytest.mark.parametrize(
    "number, words", [(13, "Permission denied"), (30, "Read-only file system")]
)
def test_a_folder_that_belongs_to_somebody_else(root, monkeypatch, capsys, number, words):
    def refuse():
        raise OSError(number, words, "/locked/models")

    monkeypatch.setattr(preflight, "preflight", refuse)
    assert main(["preflight"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: /locked/models: {words}. ")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_nemo_is_imported_without_a_home(root):
    apply = "from workshop_utils.runtime import nemo_cpu; nemo_cpu.apply()"
    python("-c", f"{apply}; from nemo.collections import llm", HOME="/nonexistent")
