"""The directory that the script path loads: links to the weights, and an index with the names it asks for.

NeMo 1 reads it with ``megatron.core.dist_checkpointing.load``, which wants ``.metadata`` (a pickle of
``torch.distributed.checkpoint.metadata.Metadata``), ``metadata.json`` (the backend) and ``common.pt`` (state that is not sharded).
"""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.formats.nemo2 import Nemo2Checkpoint
from workshop_utils.paths import shown

NAME_NEMO2, NAME_SCRIPT_PATH = "module.", "model."
WEIGHTS = "model_weights"


def fingerprint(checkpoint: Nemo2Checkpoint, config: dict[str, Any]) -> str:
    """Changes whenever the view has to be made again: with the index of the weights or with anything in ``config``."""
    digest = hashlib.sha256((checkpoint.path / "weights" / ".metadata").read_bytes())
    for part in (checkpoint.backend, config):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def read_marker(path: Path) -> dict[str, str] | None:
    """The marker file of a view, or None where there is no sound one."""
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        return marker if isinstance(marker["view_of"], str) and isinstance(marker["fingerprint"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_whole(view: Path) -> bool:
    """Whether every file of the view is there and no link is broken."""
    weights = view / WEIGHTS
    needed = [view / "model_config.yaml", weights / ".metadata", weights / "metadata.json", weights / "common.pt"]
    return all(path.exists() for path in [*needed, *(weights.iterdir() if weights.is_dir() else [])])


def write(checkpoint: Nemo2Checkpoint, config: dict[str, Any], made: Path, target: Path) -> None:
    """Fill the empty directory ``made``, which will be moved to ``target`` beside it."""
    text = f"# Translated from {shown(checkpoint.path)}/context/model.yaml by `workshop bridge`.\n"
    (made / "model_config.yaml").write_text(text + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    weights = made / WEIGHTS
    weights.mkdir()
    to_source = os.path.relpath(checkpoint.path / "weights", target / WEIGHTS)
    for file in sorted({chunk.file for tensor in checkpoint.model_tensors().values() for chunk in tensor.chunks}
                       | {entry.file for entry in _model_objects(checkpoint)}):  # fmt: skip
        (weights / file).symlink_to(os.path.join(to_source, file))
    (weights / "metadata.json").write_text(json.dumps(checkpoint.backend) + "\n", encoding="utf-8")
    _write_index(checkpoint, weights)


def _model_objects(checkpoint: Nemo2Checkpoint) -> list:
    # Entries such as _extra_state are kept: with Transformer Engine the script path asks for them under the same names.
    return [entry for entry in checkpoint.objects.values() if entry.name.startswith(NAME_NEMO2)]


def _write_index(checkpoint: Nemo2Checkpoint, weights: Path) -> None:
    """Write ``.metadata`` and an empty ``common.pt``, from what was read and checked; nothing is copied from the source's pickles.

    torch's own classes write them, so that whatever torch reads the view finds what it expects. Optimizer state is left out.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for tensor in checkpoint.model_tensors().values():
        name = NAME_SCRIPT_PATH + tensor.name.removeprefix(NAME_NEMO2)
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)) for chunk in tensor.chunks]
        entries[name] = TensorStorageMetadata(TensorProperties(getattr(torch, tensor.dtype)), torch.Size(tensor.shape), chunks)
        for index, chunk in enumerate(tensor.chunks):
            places[MetadataIndex(name, chunk.offsets, index)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    for entry in _model_objects(checkpoint):
        name = NAME_SCRIPT_PATH + entry.name.removeprefix(NAME_NEMO2)
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _StorageInfo(entry.file, entry.start, entry.length)
    index = Metadata(state_dict_metadata=entries, planner_data={name: (name,) for name in entries}, storage_data=places)
    index.mcore_data = {}  # Megatron-Core's own field; it describes flattened optimizer state only
    with (weights / ".metadata").open("wb") as file:
        pickle.dump(index, file)
    torch.save({}, weights / "common.pt")
