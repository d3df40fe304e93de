"""Commands that are told to stop half-way: nothing half-written is left, visible or hidden."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from export_samples import GQA, config_of, tensors_of, write_adapter
from tiny_model import make_tiny_model

from workshop_utils.adapters.export import export

#: The command, with a stop in the middle: all is written and has no name yet.
DRIVER = """
import os, sys, time
from workshop_utils.cli import main

real = os.replace

def half(*words):
    os.replace = real
    print("half", flush=True)
    time.sleep(60)

os.replace = half
sys.exit(main())
"""


def python(*words, **options) -> subprocess.Popen:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], **output | options)


def interrupted(root, number, *words):
    """Exit status of ``workshop WORDS``, sent the signal ``number`` when half of the work is done;
    and all files before and after."""
    before = contents(root)
    with python("-c", DRIVER, *map(str, words)) as process:
        assert process.stdout.readline() == "half\n", process.communicate()
        # Else there was nothing to clean up.
        assert any(".partial" in str(path) for path in root.rglob("*"))
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
    assert contents(root) == before
    return process.returncode


def contents(root):
    return {
        path.relative_to(root): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    write_adapter(tmp_path / "a.nemo", config_of(GQA), tensors_of(GQA))
    (tmp_path / "out").mkdir()
    return tmp_path


def test_an_export(root):
    words = "export", root / "a.nemo", "--to", "nemo", "--out", root / "out" / "new.nemo"
    assert interrupted(root, signal.SIGINT, *words) == 130


def test_an_export_that_replaces_one(root):
    out = export(root / "a.nemo", "hf-peft", root / "out" / "old")
    other = write_adapter(root / "b.nemo", config_of(GQA, alpha=16), tensors_of(GQA))
    words = "export", other, "--to", "hf-peft", "--out", out, "--overwrite"
    assert interrupted(root, signal.SIGTERM, *words) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_bridge_and_a_conversion(root, number, originals):
    source = shutil.copytree(originals / "plain", root / "plain")
    out = root / "out" / "new"
    assert interrupted(root, number, "bridge", source, "--out", out) == 130
    assert interrupted(root, number, "convert", source, out, "--to", "nemo1") == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_staging(root, number):
    made = export(root / "a.nemo", "hf-peft", root / "made")
    (root / "store").mkdir()
    words = "nim", "stage", made, "--name", "a", "--store", root / "store"
    assert interrupted(root, number, *words) == 130


#: A library that catches whatever comes, and goes on with what it has not finished; and one that
#: fails of that.
CARELESS = """
import sys, time
from workshop_utils.core import paths
from workshop_utils.cli import main, models

def run(args):
    with paths.new_directory("out/new") as part, paths.new_file("out/file") as file:
        (part / "weights").touch()
        try:
            print("half", flush=True)
            time.sleep(60)
        except:
            {then}

models.run = run
sys.argv[1:] = ["models"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    "then", ["time.sleep(60)", "raise AttributeError('half imported')", "pass"]
)
def test_a_library_that_swallows_the_interrupt(tmp_path, then):
    with python("-c", CARELESS.format(then=then), cwd=tmp_path) as process:
        assert process.stdout.readline() == "half\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert time.monotonic() - began < 10  # of the 60 seconds
    assert not any(path.name != "out" for path in tmp_path.rglob("*")) or then == "pass"


def test_the_second_ctrl_c_does_not_stop_the_cleaning_up(tmp_path):
    then = "print('cleaning', flush=True); time.sleep(0.5)"
    with python("-c", CARELESS.format(then=then), cwd=tmp_path) as process:
        for said in ("half\n", "cleaning\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_import_in_a_process_of_its_own(root, number):
    """The process is NeMo's, and is asked to stop, too."""
    model = make_tiny_model(root / "model")
    before = contents(root)
    words = "convert", str(model), str(root / "new"), "--to", "nemo2"
    with python("-m", "workshop_utils", *words) as process:
        while process.poll() is None and not any(root.rglob("*.partial")):
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.splitlines()[-1] == "interrupted", errors
    assert contents(root) == before


def test_ctrl_c_takes_along_what_a_library_has_started(tmp_path):
    """Processes that are no daemons, as Megatron-Core's writers and their manager, and a fork with
    the same handlers."""
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, os, subprocess, sys, time\n"
        "from workshop_utils.runtime import interrupt\n"
        "def wait(): time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    interrupt.watch()\n"
        "    manager = multiprocessing.get_context('spawn').Manager()\n"
        "    forked = multiprocessing.get_context('fork').Process(target=wait); forked.start()\n"
        "    try: print('ready', flush=True); time.sleep(60)\n"
        "    finally: interrupt.end()\n"
    )
    command = python(str(program), start_new_session=True)
    assert command.stdout.readline() == "ready\n"
    children = psutil.Process(command.pid).children(recursive=True)
    os.killpg(command.pid, signal.SIGINT)
    _, said = command.communicate(timeout=20)  # whoever holds the pipe would keep it open
    assert (command.returncode, said) == (130, "interrupted\n") and len(children) >= 2
    psutil.wait_procs(children, timeout=5)
    assert not [
        child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]
