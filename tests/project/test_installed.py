"""The package without its clone: what the sdist and a wheel hold, and where an installed package
reads and writes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

# What a clone makes, of which an unpacked sdist knows nothing.
MADE = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", ".ipynb_checkpoints", "__pycache__"),
    *("*.egg-info", "build", "dist", "workshop.yaml"),
)


def files(folder: Path) -> set[str]:
    return {
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def build(kind: str, source: Path, out: Path) -> Path:
    """Build in ``source``, without a network."""
    code = (
        "import sys; from setuptools import build_meta; "
        f"print(build_meta.build_{kind}(sys.argv[1]))"
    )
    command, how = [sys.executable, "-c", code, str(out)], {"cwd": source, "check": False}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist of this repository."""
    folder = tmp_path_factory.mktemp("sdist")
    clone = folder / "clone"

    def not_of_the_repository(place: str, names: list[str]) -> set[str]:
        left = set(MADE(place, names))
        if Path(place) in (ROOT / "models", ROOT / "data"):
            left |= {name for name in names if Path(place, name).is_dir()}
        return left | ({"runs"} if Path(place) == ROOT else set())

    shutil.copytree(ROOT, clone, ignore=not_of_the_repository)
    shutil.unpack_archive(build("sdist", clone, folder), folder)
    return next(folder.glob("nemo_lora_workshop-*/"))


@pytest.fixture(scope="module")
def site(sdist, tmp_path_factory):
    """The folder into which the wheel, built from the sdist, is unpacked."""
    site = tmp_path_factory.mktemp("site")
    shutil.unpack_archive(build("wheel", sdist, tmp_path_factory.mktemp("wheel")), site, "zip")
    return site


@pytest.fixture
def run(site, tmp_path):
    """Run Python with the installed package in an empty folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WORKSHOP_")}

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        where = {"env": kept | {"PYTHONPATH": str(site)} | variables, "cwd": tmp_path}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, **where)

    return run


def test_the_sdist_is_the_repository(sdist):
    for folder in ("tests", "scripts", "docs", "notebooks", "benchmarks", "workshop_utils"):
        ours = {name for name in files(ROOT / folder) if not name.startswith(".")}
        assert ours <= files(sdist / folder)
    names = "requirements.txt environment.yml postBuild Makefile conftest.py models/manifest.yaml"
    for name in (*names.split(), "data/make_tickets.py"):
        assert (sdist / name).is_file(), name


def test_no_file_of_the_package_is_left_out_of_the_wheel(site):
    assert files(ROOT / "workshop_utils") <= files(site / "workshop_utils")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "models fetch smollm2-135m-instruct --dry-run",
            "models/huggingface/smollm2-135m-instruct",
        ),
        ("recipe --preset cpu --dry-run all", "smollm2-135m-instruct"),
    ],
)
def test_the_catalogue_is_found(run, words, said):
    done = run("-m", "workshop_utils", *words.split())
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_lock_is_found(run):
    checks = run("-m", "workshop_utils", "preflight").stdout.splitlines()
    assert "requirements.txt" not in next(line for line in checks if "packages:" in line)


def test_what_needs_a_clone_names_the_variable(run, tmp_path):
    done = run("-m", "workshop_utils", "run", "--list")
    assert done.returncode == 1
    assert "WORKSHOP_ROOT" in done.stderr
    listed = run("-m", "workshop_utils", "run", "--list", WORKSHOP_ROOT=str(ROOT)).stdout
    assert listed.startswith("00_start_here")


def test_the_current_folder_is_written_to(run, site, tmp_path):
    before = files(site)
    done = run("-c", "from workshop_utils.series.workshop import make_tickets; make_tickets()")
    assert done.returncode == 0, done.stderr
    assert {"data/tickets/train.jsonl", "data/tickets/test.jsonl"} <= files(tmp_path)
    assert files(site) == before


def test_the_commit_of_somebody_elses_repository_is_not_recorded(run, site):
    subprocess.run(["git", "init", "-q", str(site)], check=True)
    commit = "git -c user.name=a -c user.email=a@b commit -qm theirs --allow-empty"
    subprocess.run(commit.split(), cwd=site, check=True)
    code = "from workshop_utils.training.runs import run_record; print(run_record._commit())"
    done = run("-c", code)
    assert done.stdout.strip() == "None", done.stderr
    shutil.rmtree(site / ".git")


def test_a_root_without_files_of_the_repository_gets_them_from_the_clone(monkeypatch, tmp_path):
    from workshop_utils.core import paths

    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    assert paths.repository_file("models/manifest.yaml") == ROOT / "models" / "manifest.yaml"
    (tmp_path / "models").mkdir()
    own = tmp_path / "models" / "manifest.yaml"
    own.touch()
    assert paths.repository_file("models/manifest.yaml") == own


def test_missing_packages_are_named(run, site):
    """The package alone, as after `pip install --no-deps`: a sentence, not the traceback of an
    import."""
    done = run("-S", "-m", "workshop_utils", "models")
    assert done.returncode == 1
    said = "error: No module named 'yaml'. `workshop preflight` says: missing: "
    assert done.stderr.startswith(said)
    assert "-m pip install -r" in done.stderr and "Traceback" not in done.stderr
