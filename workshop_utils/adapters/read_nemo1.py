"""Read the LoRA adapter of NeMo's script path: a ``.nemo``, or the Lightning ``.ckpt`` that a
training leaves beside it.

Formats and names: ``PEFT_MODULE_MAP``, ``LoraPEFTConfig``
(``nemo/collections/nlp/parts/peft_config.py``) and ``AdapterName``
(``.../megatron/adapters/parallel_adapters.py``) of nemo-toolkit 2.4.1. The update of a layer is
``alpha / adapter_dim * linear_out @ linear_in`` (``ParallelLinearAdapter.forward``).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters.adapter import LoraAdapter, as_tensor, fingerprint
from workshop_utils.adapters.rank_parts import merge
from workshop_utils.checkpoints.formats import lightning, nemo_archive, saved_tensors, values
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.lora_layout import (
    architecture_of,
    number_of,
    read_layout,
    stated_lora,
)
from workshop_utils.checkpoints.formats.qkv import ORDERS
from workshop_utils.checkpoints.formats.rank_files import WEIGHTS, rank_files, sizes
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor


def read_nemo(source: Path) -> LoraAdapter:
    """The adapter in the ``.nemo`` ``source``; errors as
    :func:`workshop_utils.adapters.read.read_adapter`."""
    config = nemo_archive.read_config(source)
    stated_lora(source, config)
    return _adapter(source, config, read_state(source, config))


def read_ckpt(source: Path) -> LoraAdapter:
    """The adapter in the Lightning checkpoint ``source``, with the configuration in it or in
    ``version_N/hparams.yaml`` beside it.

    Nothing of the file is unpickled by torch: it holds the optimizer's state and objects of
    Lightning's. Errors as :func:`read_nemo`.
    """
    checkpoint = lightning.describe(source)
    with source.open("rb") as file:
        config, _ = lightning.configuration(source, saved_tensors.read_state(file, shown(source)))
    if not config:
        raise DamagedCheckpoint(
            f"{shown(source)} has no configuration that can be read, and no "
            "version_N/hparams.yaml lies beside checkpoints/: rank, alpha and heads are not "
            "known. Give the .nemo of the same run, or put hparams.yaml back."
        )
    stated_lora(source, config)
    state = {
        tensor.name: as_tensor(values.read_tensor(checkpoint, tensor))
        for tensor in checkpoint.tensors
    }
    return _adapter(source, dict(config), state)


def _adapter(source: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> LoraAdapter:
    layout = read_layout(source, config, state)
    ours = section(config, "workshop")
    order = ours.get("qkv_order", "interleaved")
    if order not in ORDERS:
        raise DamagedCheckpoint(
            f"{shown(source)}: workshop.qkv_order is {order!r}; it must be one of "
            f"{', '.join(ORDERS)}."
        )
    # What an earlier export recorded, else the last part of the path that it was restored from.
    base = ours.get("base") or Path(str(config.get("restore_from_path") or "")).name
    base = str(base).removesuffix(".nemo")
    file = fingerprint(source)
    return LoraAdapter(source, file, config, *layout[:4], order, base, layout.weights)


def read_state(source: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the archive by name; the parts of several model-parallel ranks are put
    together. Errors as :func:`read_adapter`."""
    where = shown(source)
    files = rank_files(member.name for member in nemo_archive.members(source))
    if not files:
        raise DamagedCheckpoint(f"{where} has no {WEIGHTS}.")
    stated = tuple(
        number_of(source, config, f"{kind}_model_parallel_size", default=1)
        for kind in ("tensor", "pipeline")
    )
    if stated != sizes(files) or len(files) != stated[0] * stated[1]:
        raise DamagedCheckpoint(
            f"{where}: model_config.yaml names {stated[0]} tensor-parallel ranks x {stated[1]} "
            f"pipeline stages, the archive holds {', '.join(files.values())}."
        )
    parts = {rank: _load_tensors(source, file) for rank, file in files.items()}
    if len(parts) == 1:
        return parts[0, 0]
    architecture = architecture_of(source, config)
    return merge(source, parts, architecture.layers, architecture.gated)


def _load_tensors(source: Path, member: str) -> dict[str, Tensor]:
    import torch

    where = shown(source)
    try:
        # From the archive itself: the bytes are never in memory beside the tensors.
        with nemo_archive.open_member(source, member) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (str(error) or "it is not a tensor file").splitlines()[0]
        raise UnsafeCheckpoint(
            f"{where}: {member} holds something else than tensors: {reason}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(
            f"{where}: {member} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict) or not state:
        raise NotACheckpoint(f"{where}: {member} holds no tensors by name.")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise NotACheckpoint(
                f"{where}: {key!r} in {member} is a {type(value).__name__}, not a tensor."
            )
    return state
