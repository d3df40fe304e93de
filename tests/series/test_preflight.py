"""Each check of the preflight on a machine that is not ready."""

import os
import platform
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from workshop_utils.cli import main
from workshop_utils.core import paths
from workshop_utils.series import preflight as checks
from workshop_utils.series.preflight import GIB, Check

Usage = namedtuple("Usage", "total used free")


def test_a_line_has_the_status_as_a_word_and_the_fix_below():
    assert str(Check("OK", "cores", "2")) == "[OK]   cores: 2"
    assert str(Check("FAIL", "cores", "0", "Buy some.")) == "[FAIL] cores: 0\n       Buy some."


def test_all_checks_are_made_and_each_that_is_not_ok_says_what_to_do():
    made = checks.preflight()
    names = "system,Python,cores,memory,disk,home,packages,Jupyter kernel,device"
    assert [check.name for check in made] == names.split(",")
    assert all(check.status == "OK" or check.fix for check in made)


@pytest.mark.parametrize(
    ("name", "machine", "status"),
    [("Darwin", "arm64", "FAIL"), ("Windows", "AMD64", "FAIL"), ("Linux", "aarch64", "WARN")],
)
def test_other_systems(monkeypatch, name, machine, status):
    monkeypatch.setattr(platform, "system", lambda: name)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert checks.system().status == status


def test_another_python_and_one_core(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    assert checks.python().status == "FAIL"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert checks.cores().status == "WARN"


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_limit_of_a_container(tmp_path, file):
    whole = checks.memory_limit(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{GIB}\n")
    assert checks.memory_limit(tmp_path) == GIB
    (tmp_path / file).write_text("max\n")
    assert checks.memory_limit(tmp_path) == whole


def test_little_memory(monkeypatch):
    monkeypatch.setattr(checks, "memory_limit", lambda: 2 * GIB)
    fix = "Training may be killed: it wants 6 GiB. Close other programs."
    assert checks.memory() == Check("WARN", "memory", "2.0 GiB", fix)


@pytest.mark.parametrize(("free", "status"), [(0.5, "FAIL"), (2, "WARN"), (9, "OK")])
def test_little_disk(monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(free * GIB)))
    assert checks.disk().status == status


def test_a_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert checks.disk().status == "FAIL"


@pytest.mark.parametrize(
    ("lock", "status", "found"),
    [
        ("pytest==0.1\n", "WARN", "pinned: 0.1"),
        ("no-such-package==1\npytest==0.1\n", "FAIL", "missing: no-such-package"),
        ("torch==2.13.0\n", "OK", "1 as pinned"),
        ("torch>=2\n", "FAIL", "the lock cannot be read"),
    ],
)
def test_packages_against_the_lock(monkeypatch, tmp_path, lock, status, found):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    (tmp_path / "requirements.txt").write_text(lock)
    check = checks.packages()
    assert check.status == status
    assert found in check.found


def test_the_package_alone_has_no_lock(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "lock_file", lambda: tmp_path / "requirements.txt")
    assert checks.packages().status == "FAIL"
    assert "WORKSHOP_ROOT" in checks.packages().fix


def test_without_a_clone_there_is_no_make(monkeypatch, tmp_path):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    (tmp_path / "requirements.txt").write_text("pytest==0.1\n")
    assert checks.packages().fix.endswith("make clean && make env")
    monkeypatch.setattr(paths, "in_clone", lambda: False)
    assert checks.packages().fix.endswith(f"-m pip install -r {tmp_path / 'requirements.txt'}")


def test_a_device_that_cannot_be(monkeypatch):
    monkeypatch.setenv("WORKSHOP_DEVICE", "tpu")
    assert checks.device().status == "FAIL"


def test_the_command_fails_when_a_check_does(monkeypatch, capsys):
    made = [Check("OK", "a", "1"), Check("WARN", "b", "2", "Mind.")]
    monkeypatch.setattr(checks, "preflight", lambda: made)
    assert main(["preflight"]) == 0
    made[0] = Check("FAIL", "a", "1", "Mend.")
    assert main(["preflight"]) == 1
    assert "[FAIL] a: 1\n       Mend." in capsys.readouterr().out


def test_neither_torch_nor_nemo_is_imported():
    code = (
        "import sys; from workshop_utils.series.preflight import preflight; preflight(); assert "
        "not {'torch', 'nemo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
