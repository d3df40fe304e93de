"""The directory that the script path loads: links to the weights, and an index with the names it
asks for.

NeMo 1 reads it with ``megatron.core.dist_checkpointing.load``;
:mod:`workshop_utils.checkpoints.formats.torch_dist_writer` says what that wants. Optimizer state is
left out.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.checkpoints.formats import torch_dist_writer
from workshop_utils.checkpoints.formats.nemo1 import SHARDED as WEIGHTS
from workshop_utils.checkpoints.formats.nemo2 import Nemo2Checkpoint
from workshop_utils.core.paths import shown

NAME_NEMO2, NAME_SCRIPT_PATH = "module.", "model."


def fingerprint(checkpoint: Nemo2Checkpoint, config: dict[str, Any]) -> str:
    """Changes whenever the view has to be made again: with the index of the weights or with
    anything in ``config``."""
    digest = hashlib.sha256((checkpoint.path / "weights" / ".metadata").read_bytes())
    for part in (checkpoint.backend, config):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def read_marker(path: Path) -> dict[str, str] | None:
    """The marker file of a view, or None where there is no sound one."""
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        return (
            marker
            if isinstance(marker["view_of"], str) and isinstance(marker["fingerprint"], str)
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_whole(view: Path) -> bool:
    """Whether every file of the view is there and no link is broken."""
    weights = view / WEIGHTS
    needed = [
        view / "model_config.yaml",
        weights / ".metadata",
        weights / "metadata.json",
        weights / "common.pt",
    ]
    return all(
        path.exists() for path in [*needed, *(weights.iterdir() if weights.is_dir() else [])]
    )


def write(checkpoint: Nemo2Checkpoint, config: dict[str, Any], made: Path, target: Path) -> None:
    """Fill the empty directory ``made``, which will be moved to ``target`` beside it."""
    text = f"# Translated from {shown(checkpoint.path)}/context/model.yaml by `workshop bridge`.\n"
    (made / "model_config.yaml").write_text(
        text + yaml.safe_dump(config, sort_keys=False), encoding="utf-8"
    )
    weights = made / WEIGHTS
    weights.mkdir()
    tensors, objects = checkpoint.model_tensors().values(), _model_objects(checkpoint)
    files = {file for tensor in tensors for file in tensor.files} | {
        entry.file for entry in objects
    }
    torch_dist_writer.link(files, checkpoint.path / "weights", weights, target / WEIGHTS)
    torch_dist_writer.write_index(
        weights,
        torch_dist_writer.renamed(tensors, NAME_NEMO2, NAME_SCRIPT_PATH),
        torch_dist_writer.renamed(objects, NAME_NEMO2, NAME_SCRIPT_PATH),
        checkpoint.backend,
    )


def _model_objects(checkpoint: Nemo2Checkpoint) -> list:
    # Entries such as _extra_state are kept: with Transformer Engine the script path asks for them
    # under the same names.
    return [entry for entry in checkpoint.objects.values() if entry.name.startswith(NAME_NEMO2)]
