"""What ``torch.save`` wrote, as the tensors of a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import IO, Any

from workshop_utils.checkpoints.formats import torch_archive
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.tensor import Tensor, whole
from workshop_utils.checkpoints.formats.torch_archive import SavedTensor
from workshop_utils.core.errors import DamagedCheckpoint

MAX_DEPTH = 50


def read(file: IO[bytes], where: str, part: str, report: Report = stop) -> list[Tensor]:
    """The tensors of the flat state dict in ``file``; ``part`` is the name that their chunks get.
    Errors and faults as torch_archive's."""
    return [
        tensor(name, saved, part)
        for name, saved in torch_archive.read_tensors(file, where, report).items()
    ]


def read_state(file: IO[bytes], where: str, report: Report = stop) -> dict[str, Any]:
    """The state in ``file`` as plain values, with :class:`SavedTensor` for tensors. Errors and
    faults as torch_archive's."""
    state = torch_archive.read_state(file, where, report)
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{where} holds a {type(state).__name__}, not values by name.")
    return state


def tensors(state: Any, part: str, prefix: str = "", depth: int = 0) -> list[Tensor]:
    """Every tensor in ``state``, however deep, under its dotted name."""
    if isinstance(state, SavedTensor):
        return [tensor(prefix, state, part)]
    if depth == MAX_DEPTH:
        return []
    if isinstance(state, Mapping):
        items = state.items()
    elif isinstance(state, Sequence) and not isinstance(state, str | bytes):
        items = enumerate(state)
    else:
        return []
    return [
        saved
        for key, value in items
        for saved in tensors(value, part, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    ]


def tensor(name: str, saved: SavedTensor, part: str) -> Tensor:
    """``saved`` as a tensor of the file ``part``."""
    # One that is not contiguous lies in that file, but not in one range.
    return whole(name, saved.shape, saved.dtype, part, saved.start or 0, saved.length or 0)
