"""Lightning's ``.ckpt``, written by its Trainer."""

import shutil

import pytest
import torch
import yaml
from export_samples import GQA, config_of, tensors_of

from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.lightning import INSTANTIATORS
from workshop_utils.checkpoints.formats.values import read_tensor
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
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2))
    trainer.save_checkpoint(directory / "a.ckpt")
    return directory / "a.ckpt", module


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def test_what_the_trainer_saved(trained):
    import lightning

    path, module = trained
    found = identify(path)
    assert (found.format, found.version) == (
        "Lightning checkpoint (.ckpt)",
        f"Lightning {lightning.__version__}",
    )
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        k: tuple(v.shape) for k, v in module.state_dict().items()
    }
    for tensor in found.tensors:
        assert torch.equal(
            torch.from_numpy(read_tensor(found, tensor).copy()),
            module.state_dict()[tensor.name].detach(),
        )
    epoch = torch.load(path, weights_only=True)["epoch"]
    assert found.notes[:3] == (
        f"saved in epoch {epoch}, after step 2",
        "6 tensors of optimizer state beside the weights",
        "hyper-parameters, never instantiated here: width, rate",
    )
    assert {reader.answer for reader in loads_in(found)} == {"no"}
    assert "load_from_checkpoint" in loads_in(found)[0].how


def test_one_without_optimizer_state(trained, root):
    state = torch.load(trained[0], weights_only=True)
    state["optimizer_states"] = []
    torch.save(state, root / "a.ckpt")
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
    (root / "checkpoints").mkdir()
    path = root / "checkpoints" / "a--last.ckpt"
    torch.save(nemo_state(), path)
    found = identify(path)
    assert found.format == "Lightning checkpoint (.ckpt) (of NeMo 1)"
    assert (found.adapter.rank, found.adapter.targets, found.architecture) == (
        4,
        ("attention_qkv",),
        None,
    )
    (root / "version_0").mkdir()
    (root / "version_0" / "hparams.yaml").write_text(yaml.safe_dump({"cfg": config_of(GQA)}))
    found = identify(path)
    assert (found.adapter.alpha, found.architecture.layers) == (8, 2)
    assert "version_0/hparams.yaml" in found.notes[-1]
    (root / "version_0" / "hparams.yaml").write_text(
        "cfg: !!python/object/apply:os.system ['true']\n"
    )
    assert identify(path).architecture is None
    reasons = {reader.name: (reader.answer, reader.how) for reader in loads_in(found)}
    assert reasons["script path"][0] == "yes"
    assert "give the .nemo" in reasons["PEFT"][1]


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_hyper_parameters_are_never_run(trained, root):
    state = torch.load(trained[0], weights_only=True)
    torch.save(state | {"hyper_parameters": {"a": Evil()}}, root / "a.ckpt")
    with pytest.raises(UnsafeCheckpoint, match="exec"):
        identify(root / "a.ckpt")
    faults = []
    assert identify(root / "a.ckpt", faults.append).tensors
    assert len(faults) == 1


def test_weights_that_are_no_lightning_checkpoint(trained, root):
    torch.save(trained[1].state_dict(), root / "a.ckpt")
    with pytest.raises(NotACheckpoint, match="has no state_dict"):
        identify(root / "a.ckpt")
    shutil.copy(trained[0], root / "b.ckpt")
    with (root / "b.ckpt").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedCheckpoint, match=r"b\.ckpt"):
        identify(root / "b.ckpt")


def test_an_instantiator_of_somebody_else_is_refused(trained, root):
    """CVE-2026-58659: text alone, so that no pickle gives it away."""
    state = torch.load(trained[0], weights_only=True)
    for name, safe in ((INSTANTIATORS[0], True), (INSTANTIATORS[1], True), ("os.system", False)):
        torch.save(
            state | {"hyper_parameters": {"_instantiator": name, "width": 4}}, root / "a.ckpt"
        )
        if safe:
            identify(root / "a.ckpt")
            continue
        with pytest.raises(UnsafeCheckpoint, match=r"_instantiator is os\.system"):
            identify(root / "a.ckpt")
