"""What a checkpoint of any format comes down to."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.formats.architecture import Architecture
from workshop_utils.formats.restricted_pickle import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``dtype`` by name, ``nbytes`` of its elements, and the file (or files) that hold it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements; 0 where the dtype is not known."""
        return self.elements * DTYPE_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: rank, alpha, adapted modules, and its base model with whether that is here (None: not a path)."""

    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    base: str | None
    base_is_here: bool | None


@dataclass(frozen=True)
class Checkpoint:
    """The answer of :func:`workshop_utils.formats.identify.identify`. What could not be told is None.

    ``nbytes`` are the files of the weights, ``loads_in`` what can load it, with the command or call, ``notes`` what to know.
    """

    path: Path
    format: str
    architecture: Architecture | None
    nbytes: int
    tensors: tuple[TensorInfo, ...]
    tokenizer: str | None
    adapter: Adapter | None
    loads_in: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int | None:
        """Number of weights; tied embeddings count once, as they are stored."""
        return sum(tensor.elements for tensor in self.tensors) if self.tensors else None

    @property
    def dtype(self) -> str | None:
        """dtype of the weights, or all of them where they differ."""
        return ", ".join(dtypes(self.tensors)) or None


def dtypes(tensors: Iterable[TensorInfo]) -> list[str]:
    """The different dtypes of ``tensors``, the one with most elements first."""
    elements: dict[str, int] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    return sorted(elements, key=elements.get, reverse=True)
