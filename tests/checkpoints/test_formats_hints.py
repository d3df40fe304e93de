"""What people give by mistake: each gets a sentence with the right path or the fix."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import export_samples
import pytest
import torch
from tiny_model import make_tiny_model

from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 1234\n"  # noqa: E501
PAGE = b"<!DOCTYPE html><html><head><title>401 Unauthorized</title></head></html>"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture
def root(tiny, originals, tmp_path, monkeypatch):
    """``models`` with a Hugging Face model and a NeMo 2.0 checkpoint of a run."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "models" / "hf")
    shutil.copytree(originals / "plain", tmp_path / "models" / "run" / "checkpoints" / "step=10")
    return tmp_path


def says(path: Path, error: type = NotACheckpoint) -> str:
    with pytest.raises(error) as caught:
        identify(path)
    return str(caught.value)


NEMO2 = "models/run/checkpoints/step=10"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (f"{NEMO2}/weights", f"top directory: {NEMO2}"),
        (f"{NEMO2}/context", f"top directory: {NEMO2}"),
        (f"{NEMO2}/context/nemo_tokenizer", f"top directory: {NEMO2}"),
        (f"{NEMO2}/context/nemo_tokenizer/tokenizer.json", f"top directory: {NEMO2}"),
        (f"{NEMO2}/weights/__0_0.distcp", f"top directory: {NEMO2}"),
        (f"{NEMO2}/weights/common.pt", f"top directory: {NEMO2}"),
        ("models/hf/model.safetensors", "top directory: models/hf"),
        ("models/hf/tokenizer.json", "top directory: models/hf"),
        ("models", f"holds 2. Give one of them: models/hf, {NEMO2}"),
        ("models/run", f"holds 1. Give one of them: {NEMO2}"),
        ("nothing", "nothing does not exist"),
    ],
)
def test_above_and_inside(root, given, wanted):
    assert wanted in says(root / given)


@pytest.mark.parametrize("odd", ["/", "..", ".", "/dev/null", "/dev", "/proc/self"])
def test_odd_paths(root, odd, monkeypatch):
    monkeypatch.chdir(root / "models" / "hf" if odd == ".." else root)
    assert says(Path(odd))


def test_a_pipe_is_not_opened(root):
    os.mkfifo(root / "models" / "pipe.nemo")
    assert "is not a .nemo archive" in says(root / "models" / "pipe.nemo")
    assert "holds 2." in says(root / "models")


def test_a_tokenizer_alone(root):
    (root / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "models" / "hf" / name, root / "tokenizer")
    assert "is a tokenizer, not a model" in says(root / "tokenizer")


def test_weights_alone(root):
    shutil.copy(root / "models" / "hf" / "model.safetensors", root / "model.safetensors")
    assert "put config.json and the tokenizer beside them" in says(root / "model.safetensors")
    (root / "alone").mkdir()
    (root / "model.safetensors").rename(root / "alone" / "model.safetensors")
    assert "no config.json" in says(root / "alone")
    (root / "alone" / "model.safetensors").rename(root / "alone" / "adapter_model.safetensors")
    assert "no adapter_config.json" in says(root / "alone")
    (root / "shards").mkdir()
    shutil.copy(root / NEMO2 / "weights" / "__0_0.distcp", root / "shards")
    assert "no .metadata" in says(root / "shards")
    shutil.copy(root / NEMO2 / "weights" / "__0_0.distcp", root)
    assert "useless without .metadata" in says(root / "__0_0.distcp")


def test_empty_files_and_directories(root):
    (root / "empty").mkdir()
    assert "empty is empty" in says(root / "empty")
    for name in ("a.nemo", "a.gguf", "a.ckpt", "model.safetensors"):
        (root / name).touch()
        assert f"{name} is empty" in says(root / name)
    (root / "models" / "hf" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is empty" in says(root / "models" / "hf", DamagedCheckpoint)


@pytest.mark.parametrize(("content", "words"), [(POINTER, "git lfs pull"), (PAGE, "web page")])
def test_pointers_and_pages(root, content, words):
    for name in ("a.nemo", "a.gguf", "a.ckpt", "model.safetensors", "pytorch_model.bin"):
        (root / name).write_bytes(content)
        message = says(root / name)
        assert words in message
        assert message.startswith(name)
    for place in (
        "models/hf/model.safetensors",
        f"{NEMO2}/weights/.metadata",
        f"{NEMO2}/weights/__0_0.distcp",
    ):
        (root / place).write_bytes(content)
        top = "models/hf" if "hf" in place else NEMO2
        message = says(root / top, DamagedCheckpoint)
        assert words in message
        assert message.startswith(top)


def test_half_written(root):
    marker = root / "models" / "run" / "checkpoints" / "step=10-unfinished"
    marker.touch()
    assert f"marks {NEMO2} as half-written" in says(marker)
    assert "half-written" in says(root / NEMO2, DamagedCheckpoint)
    marker.unlink()
    partial = root / "models" / ".hf.abc.partial"
    shutil.copytree(root / "models" / "hf", partial)
    assert "has not finished" in says(partial)
    assert "holds 2." in says(root / "models")


def test_links(root):
    link = root / "models" / "run" / "checkpoints" / "last"
    link.symlink_to("step=10")
    found = identify(link)
    assert (found.path, found.notes[0]) == (link, f"a link to {NEMO2}")
    (link.parent / "step=10-unfinished").touch()
    assert "half-written" in says(link, DamagedCheckpoint)
    shutil.rmtree(root / NEMO2)
    assert "is a link to step=10, which is gone" in says(link)


def test_what_may_not_be_read():
    """Root may read everything, and becomes another user for it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder) / "closed"
        closed.mkdir(mode=0o000)
        locked = Path(folder) / "a.nemo"
        locked.write_bytes(b"x" * 600)
        locked.chmod(0o000)
        code = (
            "import os, sys\nfrom workshop_utils.checkpoints.formats.identify import "
            "identify\nfrom workshop_utils.core.errors import NotACheckpoint\nif os.geteuid() == "
            "0: os.setgid(65534); os.setuid(65534)\nfor path in sys.argv[1:]:\n    try: "
            "identify(path)\n    except NotACheckpoint as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, closed, locked],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.count("may not be read by you") == 2, done.stderr
    assert "chmod -R a+rX" in done.stdout


def test_nemo1_weights_without_their_configuration(root):
    torch.save(export_samples.tensors_of(export_samples.GQA), root / "model_weights.ckpt")
    assert "model_config.yaml" in says(root / "model_weights.ckpt")
    (root / "text.txt").write_text("hello")
    assert "is not a .nemo archive" in says(root / "text.txt")
