"""Modes of what is written."""

import os
import stat
import subprocess
import sys

import pytest

from workshop_utils.core import paths

MASKS = [0o022, 0o002, 0o077]


@pytest.fixture(params=MASKS, ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_decides_whatever_a_library_writes(tmp_path, umask):
    with paths.new_directory(tmp_path / "made") as part:
        for name, bits in (("secret", 0o600), ("public", 0o666)):
            (part / name).touch()
            (part / name).chmod(bits)
        (part / "folder").mkdir(mode=0o700)
        (part / "folder" / "inside").touch(mode=0o600)
    made = tmp_path / "made"
    assert {mode(made), mode(made / "folder")} == {0o777 & ~umask}
    assert {mode(file) for file in made.rglob("*") if file.is_file()} == {0o666 & ~umask}


def test_files_of_others_keep_their_modes(tmp_path, umask):
    for name in ("linked", "pointed-to"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o640)
    with paths.new_directory(tmp_path / "made") as part:
        os.link(tmp_path / "linked", part / "hard")
        (part / "symbolic").symlink_to(tmp_path / "pointed-to")
    assert {mode(tmp_path / name) for name in ("linked", "pointed-to")} == {0o640}


def test_the_group_of_a_shared_folder_is_inherited(tmp_path, umask):
    tmp_path.chmod(0o2775)
    with paths.new_directory(tmp_path / "made") as part:
        (part / "folder").mkdir()
    assert (tmp_path / "made" / "folder").stat().st_mode & stat.S_ISGID


def test_the_data_set_too(tmp_path, umask):
    command = [sys.executable, paths.data_dir() / "make_tickets.py", "--out", tmp_path / "tickets"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {mode(file) for file in (tmp_path / "tickets").iterdir()} == {0o666 & ~umask}
