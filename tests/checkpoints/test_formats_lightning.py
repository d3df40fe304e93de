"""Lightning's ``.ckpt``, written by its Trainer."""

import shutil

import pytest
import torch
import yaml
from export_samples import GQA, config_of, tensors_of
from reading import Evil, answers, check_values

from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.lightning import INSTANTIATORS
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A training of two steps and the module."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self, width: int, rate: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 2)
            self.tied = self.layer

        def training_step(self, batch, index):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams.rate)

    directory = tmp_path_factory.mktemp("lightning")
    module = Module(4, 0.1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", default_root_dir=directory, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2))
    trainer.save_checkpoint(directory / "a.ckpt")
    return directory / "a.ckpt", module


@pytest.fixture
def state(trained):
    return torch.load(trained[0], weights_only=True)


def test_what_the_trainer_saved(trained, state, root):
    import lightning

    path, module = trained
    checkpoint = identify(path)
    assert checkpoint.format == "Lightning checkpoint (.ckpt)"
    assert checkpoint.version == f"Lightning {lightning.__version__}"
    check_values(checkpoint, module.state_dict())
    assert checkpoint.notes[:3] == (
        f"saved in epoch {state['epoch']}, after step 2",
        "6 tensors of optimizer state beside the weights",
        "hyper-parameters, never instantiated here: width, rate",
    )
    told = answers(checkpoint)
    assert {answer for answer, _ in told.values()} == {"no"}
    assert "load_from_checkpoint" in next(iter(told.values()))[1]
    torch.save(state | {"optimizer_states": []}, root / "a.ckpt")
    assert not any("optimizer" in note for note in identify(root / "a.ckpt").notes)


def nemo_state() -> dict:
    """What NeMo 1 saves while it trains a LoRA: its configuration is an object of OmegaConf."""
    from omegaconf import OmegaConf

    return {
        "epoch": 0,
        "global_step": 5,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": tensors_of(GQA),
        "callbacks": {"NeMoModelCheckpoint{'monitor': 'validation_loss'}": {}},
        "optimizer_states": [],
        "hyper_parameters": OmegaConf.create({"cfg": config_of(GQA)}),
    }


def test_nemo1(root):
    path, beside = root / "checkpoints" / "a--last.ckpt", root / "version_0" / "hparams.yaml"
    for file in (path, beside):
        file.parent.mkdir()
    torch.save(nemo_state(), path)
    checkpoint = identify(path)
    assert checkpoint.format == "Lightning checkpoint (.ckpt) (of NeMo 1)"
    assert checkpoint.architecture is None
    assert (checkpoint.adapter.rank, checkpoint.adapter.targets) == (4, ("attention_qkv",))
    beside.write_text(yaml.safe_dump({"cfg": config_of(GQA)}))
    checkpoint = identify(path)
    assert (checkpoint.adapter.alpha, checkpoint.architecture.layers) == (8, 2)
    assert "version_0/hparams.yaml" in checkpoint.notes[-1]
    assert answers(checkpoint)["script path"][0] == "yes"
    assert "give the .nemo" in answers(checkpoint)["PEFT"][1]
    beside.write_text("cfg: !!python/object/apply:os.system ['true']\n")
    assert identify(path).architecture is None


def test_hyper_parameters_are_never_run(state, root):
    path = root / "a.ckpt"
    torch.save(state | {"hyper_parameters": {"a": Evil()}}, path)
    with pytest.raises(UnsafeCheckpoint, match="exec"):
        identify(path)
    faults = []
    assert identify(path, faults.append).tensors
    assert len(faults) == 1
    # CVE-2026-58659: text alone, so that no pickle gives it away.
    for name in (*INSTANTIATORS, "os.system"):
        torch.save(state | {"hyper_parameters": {"_instantiator": name, "width": 4}}, path)
        if name in INSTANTIATORS:
            identify(path)
    with pytest.raises(UnsafeCheckpoint, match=r"_instantiator is os\.system"):
        identify(path)


def test_weights_that_are_no_lightning_checkpoint(trained, root):
    torch.save(trained[1].state_dict(), root / "a.ckpt")
    with pytest.raises(NotACheckpoint, match="has no state_dict"):
        identify(root / "a.ckpt")
    shutil.copy(trained[0], root / "b.ckpt")
    with (root / "b.ckpt").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedCheckpoint, match=r"b\.ckpt"):
        identify(root / "b.ckpt")
