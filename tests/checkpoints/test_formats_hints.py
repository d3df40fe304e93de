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

from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 1\n"
PAGE = b"<!DOCTYPE html><html><head><title>401 Unauthorized</title></head></html>"
NEMO2 = "models/run/checkpoints/step=10"


@pytest.fixture
def root(tiny, originals, root):
    """``models`` with a Hugging Face model and a NeMo 2.0 checkpoint of a run."""
    shutil.copytree(tiny, root / "models" / "hf")
    shutil.copytree(originals / "plain", root / NEMO2)
    return root


def says(path: Path, error: type = NotACheckpoint) -> str:
    with pytest.raises(error) as caught:
        identify(path)
    return str(caught.value)


INSIDE = ("weights", "context", "context/nemo_tokenizer", "context/nemo_tokenizer/tokenizer.json")
INSIDE += ("weights/__0_0.distcp", "weights/common.pt")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *((f"{NEMO2}/{part}", f"top directory: {NEMO2}") for part in INSIDE),
        ("models/hf/model.safetensors", "top directory: models/hf"),
        ("models/hf/tokenizer.json", "top directory: models/hf"),
        ("models", f"holds 2. Give one of them: models/hf, {NEMO2}"),
        ("models/run", f"holds 1. Give one of them: {NEMO2}"),
        ("nothing", "nothing does not exist"),
    ],
)
def test_above_and_inside(root, given, said):
    assert said in says(root / given)


@pytest.mark.parametrize("odd", ["/", "..", ".", "/dev/null", "/dev", "/proc/self"])
def test_odd_paths(root, odd, monkeypatch):
    monkeypatch.chdir(root / "models" / "hf" if odd == ".." else root)
    assert says(Path(odd))


def test_a_pipe_is_not_opened(root):
    os.mkfifo(root / "models" / "pipe.nemo")
    assert "is not a .nemo archive" in says(root / "models" / "pipe.nemo")
    assert "holds 2." in says(root / "models")


def test_a_part_alone(root):
    (root / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "models" / "hf" / name, root / "tokenizer")
    assert "is a tokenizer, not a model" in says(root / "tokenizer")
    (root / "alone").mkdir()
    for part, name, words in (
        ("models/hf/model.safetensors", "model.safetensors", "no config.json"),
        ("models/hf/model.safetensors", "adapter_model.safetensors", "no adapter_config.json"),
        (f"{NEMO2}/weights/__0_0.distcp", "__0_0.distcp", "no .metadata"),
    ):
        shutil.copy(root / part, root / "alone" / name)
        assert words in says(root / "alone")
        (root / "alone" / name).rename(root / name)
    assert "put config.json and the tokenizer beside them" in says(root / "model.safetensors")
    assert "useless without .metadata" in says(root / "__0_0.distcp")
    torch.save(export_samples.tensors_of(export_samples.GQA), root / "model_weights.ckpt")
    assert "model_config.yaml" in says(root / "model_weights.ckpt")
    (root / "text.txt").write_text("hello")
    assert "is not a .nemo archive" in says(root / "text.txt")


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
        assert words in message and message.startswith(name)
    for top, name in (
        ("models/hf", "model.safetensors"),
        (NEMO2, "weights/.metadata"),
        (NEMO2, "weights/__0_0.distcp"),
    ):
        (root / top / name).write_bytes(content)
        message = says(root / top, DamagedCheckpoint)
        assert words in message and message.startswith(top)


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
    checkpoint = identify(link)
    assert (checkpoint.path, checkpoint.notes[0]) == (link, f"a link to {NEMO2}")
    (link.parent / "step=10-unfinished").touch()
    assert "half-written" in says(link, DamagedCheckpoint)
    shutil.rmtree(root / NEMO2)
    assert "is a link to step=10, which is gone" in says(link)


CLOSED = """
import os, sys
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import NotACheckpoint
if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    try: identify(path)
    except NotACheckpoint as error: print(error)
"""


def test_what_may_not_be_read():
    """Root may read everything, and becomes another user for it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed, locked = Path(folder) / "closed", Path(folder) / "a.nemo"
        closed.mkdir(mode=0o000)
        locked.write_bytes(b"x" * 600)
        locked.chmod(0o000)
        command = [sys.executable, "-c", CLOSED, closed, locked]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.count("may not be read by you") == 2, done.stderr
    assert "chmod -R a+rX" in done.stdout
