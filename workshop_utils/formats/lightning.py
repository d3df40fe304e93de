"""Lightning checkpoints, ``.ckpt``: one file of ``torch.save`` with the weights and what resuming a training needs.

Keys: ``state_dict``, ``epoch``, ``global_step``, ``pytorch-lightning_version``, ``optimizer_states``, ``lr_schedulers``, ``callbacks``,
``loops``, ``hyper_parameters``. Source: ``lightning/pytorch/trainer/connectors/checkpoint_connector.py`` (Lightning 2.4). NeMo 1 writes
its configuration as ``hyper_parameters["cfg"]``.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.errors import NotACheckpoint
from workshop_utils.formats import decoder_config, lora_tensors, nemo1_config, saved_tensors
from workshop_utils.formats.findings import Report, stop
from workshop_utils.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.formats.tensor import Tensor
from workshop_utils.paths import shown

VERSION = "pytorch-lightning_version"


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the file ``path``. Nothing that it names is instantiated.

    Raises :class:`NotACheckpoint` (not of Lightning), :class:`UnsafeCheckpoint` and :class:`DamagedCheckpoint`.
    """
    with path.open("rb") as file:
        state = saved_tensors.read_state(file, shown(path), report)
    if not isinstance(state.get("state_dict"), Mapping):
        raise NotACheckpoint(
            f"{shown(path)} has no state_dict, and so is no Lightning checkpoint. The weights of an unpacked .nemo need model_config.yaml "
            "beside them: give their directory."
        )
    tensors = tuple(saved_tensors.tensors(state["state_dict"], path.name))
    hyper = state.get("hyper_parameters")
    config = hyper.get("cfg") if isinstance(hyper, Mapping) else None
    config = config if isinstance(config, Mapping) else {}
    version = state.get(VERSION)
    sizes = nemo1_config.architecture(config)
    return Checkpoint(
        path=path,
        kind=Kind.LIGHTNING,
        detail="of NeMo 1" if "nemo_version" in config else None,
        architecture=decoder_config.named(sizes, None, config),
        nbytes=path.stat().st_size,
        tensors=tensors,
        tokenizer=nemo1_config.tokenizer(config),
        adapter=_adapter(config, tensors),
        notes=tuple(notes(state)),
        version=", ".join(
            f"{name} {value}"
            for name, value in (("Lightning", version), ("NeMo", config.get("nemo_version")))
            if isinstance(value, str)
        )
        or None,
    )


def notes(state: Mapping[str, Any]) -> list[str]:
    """What a state of Lightning holds beside the weights, in words."""
    found = []
    if type(state.get("epoch")) is int or type(state.get("global_step")) is int:
        found.append(f"saved in epoch {state.get('epoch')}, after step {state.get('global_step')}")
    optimizer = saved_tensors.tensors(state.get("optimizer_states"), "")
    if optimizer:
        found.append(f"{len(optimizer)} tensors of optimizer state beside the weights")
    hyper = state.get("hyper_parameters")
    if isinstance(hyper, Mapping) and hyper:
        found.append(f"hyper-parameters (named here, never instantiated): {', '.join(str(name) for name in list(hyper)[:20])}")
    callbacks = state.get("callbacks")
    if isinstance(callbacks, Mapping) and callbacks:
        names = sorted({str(name).partition("{")[0] for name in callbacks})
        found.append(f"state of callbacks: {', '.join(names[:10])}")
    return found


def _adapter(config: Mapping[str, Any], tensors: tuple[Tensor, ...]) -> Adapter | None:
    if not tensors or not all(".adapter_layer." in tensor.name for tensor in tensors):
        return None
    lora = lora_tensors.find(tensors)
    stated = nemo1_config.adapter(config)
    if stated is None or lora is None:
        return stated
    return dataclasses.replace(stated, rank=stated.rank or lora.rank, targets=stated.targets or lora.targets)
