"""The choice of device, its reason, and the settings file."""

import os
import stat

import pytest

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.settings import Settings, load_settings, save_settings
from workshop_utils.runtime import device


@pytest.fixture
def gpu_machine(tmp_path, monkeypatch):
    """A machine whose driver lists a GPU: a fake nvidia-smi is first on the path."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Test 9000'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("WORKSHOP_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    "variables, torch_has_cuda, chosen",
    [
        ({}, True, ("gpu", "bf16-mixed", "NVIDIA Test 9000 found")),
        (
            {},
            False,
            ("cpu", "32", "NVIDIA Test 9000 found, but the installed torch is a CPU build"),
        ),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, ("cpu", "32", "no NVIDIA GPU found")),
        ({"WORKSHOP_DEVICE": "cpu"}, True, ("cpu", "32", "WORKSHOP_DEVICE=cpu")),
        ({"WORKSHOP_DEVICE": "gpu"}, False, ("gpu", "bf16-mixed", "WORKSHOP_DEVICE=gpu")),
    ],
)
def test_the_choice_and_its_reason(gpu_machine, monkeypatch, variables, torch_has_cuda, chosen):
    monkeypatch.setattr(device, "torch_has_cuda", lambda: torch_has_cuda)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    made = device.choose_device()
    assert (made.kind, made.precision, made.reason) == chosen


def test_the_choice_of_the_settings_file(gpu_machine, monkeypatch, tmp_path):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    (tmp_path / "workshop.yaml").write_text("device: cpu\n")
    assert (device.choose_device().kind, device.choose_device().reason) == (
        "cpu",
        "workshop.yaml: device=cpu",
    )
    (tmp_path / "workshop.yaml").write_text("device: tpu\n")
    with pytest.raises(WorkshopError, match="workshop.yaml: device is 'tpu'; set it to cpu or gpu"):
        device.choose_device()


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv("WORKSHOP_DEVICE", "tpu")
    with pytest.raises(WorkshopError, match="'tpu'; set it to cpu or gpu"):
        device.choose_device()


def test_cuda_build_is_read_without_importing_torch():
    import torch

    assert device.torch_has_cuda() == (torch.version.cuda is not None)


@pytest.fixture
def empty_root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    for name in ("MODEL", "DEVICE", "DATA"):
        monkeypatch.delenv(f"WORKSHOP_{name}", raising=False)
    return tmp_path


def test_settings_file_and_environment(empty_root, monkeypatch):
    assert load_settings() == Settings()
    save_settings(Settings(model="llama-3.2-1b-instruct", device="gpu"))
    assert load_settings().model == "llama-3.2-1b-instruct"
    monkeypatch.setenv("WORKSHOP_MODEL", "other")
    assert load_settings() == Settings(model="other", device="gpu")


def test_saving_the_defaults_removes_the_file(empty_root):
    save_settings(Settings(device="cpu"))
    save_settings(Settings())
    assert not (empty_root / "workshop.yaml").exists()


@pytest.mark.parametrize(
    "text, said",
    [("model: [", "not YAML"), ("modle: x", "may hold model, device, data"), ("- a", "may hold")],
)
def test_a_wrong_settings_file_is_named(empty_root, text, said):
    (empty_root / "workshop.yaml").write_text(text)
    with pytest.raises(WorkshopError, match=said):
        load_settings()


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "made"
    with paths.new_directory(target) as part:
        (part / "file").write_text("first")
    with pytest.raises(ValueError), paths.new_directory(target) as part:
        (part / "file").write_text("second")
        raise ValueError
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
