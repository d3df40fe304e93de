"""Lightning checkpoints, ``.ckpt``: one file of ``torch.save`` with the weights and what resuming a
training needs.

Keys: ``state_dict``, ``epoch``, ``global_step``, ``pytorch-lightning_version``,
``optimizer_states``, ``lr_schedulers``, ``callbacks``, ``loops``, ``hyper_parameters``. Source:
``lightning/pytorch/trainer/connectors/checkpoint_connector.py`` (Lightning 2.4). NeMo 1 writes its
configuration as ``hyper_parameters["cfg"]``.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import (
    decoder_config,
    lora_layout,
    nemo1_config,
    saved_tensors,
)
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.safe_text import plain, read_yaml
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.core.errors import CheckpointError, NotACheckpoint, UnsafeCheckpoint
from workshop_utils.core.paths import shown

VERSION = "pytorch-lightning_version"
INSTANTIATORS = (
    "lightning.pytorch.cli.instantiate_module",
    "pytorch_lightning.cli.instantiate_module",
)
"""What LightningCLI of either package writes as ``hyper_parameters._instantiator``."""


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the file ``path``. Nothing that it names is instantiated.

    Raises :class:`NotACheckpoint` (not of Lightning), :class:`UnsafeCheckpoint` and
    :class:`DamagedCheckpoint`.
    """
    with path.open("rb") as file:
        state = saved_tensors.read_state(file, shown(path), report)
    if not isinstance(state.get("state_dict"), Mapping):
        raise NotACheckpoint(
            f"{shown(path)} has no state_dict, and so is no Lightning checkpoint. The weights of "
            "an unpacked .nemo need model_config.yaml beside them: give their directory."
        )
    instantiator = section(state, "hyper_parameters").get("_instantiator")
    if instantiator not in (None, *INSTANTIATORS):
        report(
            UnsafeCheckpoint(
                f"{shown(path)}: hyper_parameters._instantiator is "
                f"{plain(str(instantiator), 200)}, which load_from_checkpoint of Lightning "
                "before 2.6.6 imports and calls (CVE-2026-58659). Only "
                f"{' or '.join(INSTANTIATORS)} is written by Lightning itself. Nothing was "
                "executed."
            )
        )
    tensors = tuple(saved_tensors.tensors(state["state_dict"], path.name))
    version = state.get(VERSION)
    by_nemo = any(
        str(name).startswith("NeMoModelCheckpoint") for name in section(state, "callbacks")
    )
    config, from_beside = configuration(path, state) if by_nemo else (_stated(state), ())
    return Checkpoint(
        path=path,
        kind=Kind.LIGHTNING,
        detail="of NeMo 1" if by_nemo else None,
        architecture=decoder_config.named(nemo1_config.architecture(config), None, config),
        nbytes=path.stat().st_size,
        tensors=tensors,
        tokenizer=nemo1_config.tokenizer(config),
        adapter=_adapter(config, tensors),
        notes=(*notes(state), *from_beside),
        version=f"Lightning {version}" if isinstance(version, str) else None,
    )


def _stated(state: Mapping[str, Any]) -> Mapping[str, Any]:
    return section(section(state, "hyper_parameters"), "cfg")


def configuration(
    path: Path, state: Mapping[str, Any]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """NeMo 1's configuration, and a note where it is from; empty where there is none.

    In the file (``state`` is what it holds) it may be an object of OmegaConf, which is not read.
    ``exp_manager`` puts ``version_N/hparams.yaml`` beside ``checkpoints/``.
    """
    if stated := _stated(state):
        return stated, ()
    for file in sorted(path.resolve().parent.parent.glob("version_*/hparams.yaml"), reverse=True):
        with contextlib.suppress(CheckpointError):
            if config := section(read_yaml(file), "cfg"):
                return config, (f"architecture and LoRA settings from {shown(file)}",)
    return {}, ()


def notes(state: Mapping[str, Any]) -> list[str]:
    """What a state of Lightning holds beside the weights, in words."""
    found = []
    if type(state.get("epoch")) is int or type(state.get("global_step")) is int:
        found.append(f"saved in epoch {state.get('epoch')}, after step {state.get('global_step')}")
    optimizer = saved_tensors.tensors(state.get("optimizer_states"), "")
    if optimizer:
        found.append(f"{len(optimizer)} tensors of optimizer state beside the weights")
    hyper = state.get("hyper_parameters")
    if hyper:
        # OmegaConf's come as their class alone.
        names = (
            ", ".join(str(name) for name in list(hyper)[:20])
            if isinstance(hyper, Mapping)
            else str(hyper)
        )
        found.append(f"hyper-parameters, never instantiated here: {names}")
    if callbacks := section(state, "callbacks"):
        names = sorted({str(name).partition("{")[0] for name in callbacks})
        found.append(f"state of callbacks: {', '.join(names[:10])}")
    return found


def _adapter(config: Mapping[str, Any], tensors: tuple[Tensor, ...]) -> Adapter | None:
    if not tensors or not all(".adapter_layer." in tensor.name for tensor in tensors):
        return None
    lora, stated = lora_layout.find(tensors), nemo1_config.adapter(config)
    if lora is None:
        return stated
    found = stated or Adapter(None, None, (), None, None)
    return dataclasses.replace(
        found, rank=found.rank or lora.rank, targets=found.targets or lora.targets
    )
