"""What the tests of the readers share."""

import os
from pathlib import Path

from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.checkpoints.formats.values import read_tensor


class Evil:
    """Ends the process if it is ever unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def answers(checkpoint) -> dict[str, tuple[str, str]]:
    """Reader -> (answer, how) for what ``identify`` told."""
    return {reader.name: (reader.answer, reader.how) for reader in loads_in(checkpoint)}


def tensor_of(checkpoint, name: str):
    return next(tensor for tensor in checkpoint.tensors if tensor.name == name)


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    """Of the entries of a state dict, or of the tensors that a reader found."""
    named = tensors.items() if hasattr(tensors, "items") else ((t.name, t) for t in tensors)
    return {name: tuple(tensor.shape) for name, tensor in named}


def check_values(checkpoint, state: dict) -> None:
    """Names, shapes and values of ``checkpoint`` are those of the state dict ``state``."""
    import torch

    assert shapes(checkpoint.tensors) == shapes(state)
    for tensor in checkpoint.tensors:
        values = torch.from_numpy(read_tensor(checkpoint, tensor).copy())
        assert torch.equal(values, state[tensor.name].detach()), tensor.name


def contents(directory: Path) -> dict[str, bytes]:
    files = (Path(here, name) for here, _, names in os.walk(directory) for name in names)
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}
