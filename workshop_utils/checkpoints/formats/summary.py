"""What a checkpoint of any format comes down to."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.tensor import Tensor


class Kind(StrEnum):
    """The formats that are told apart."""

    NEMO2 = "NeMo 2.0 directory"
    NEMO2_ADAPTER = "NeMo 2.0 adapter directory"
    NEMO1_ARCHIVE = "NeMo 1 archive (.nemo)"
    NEMO1_ARCHIVE_ADAPTER = "NeMo 1 archive (.nemo), LoRA adapter"
    NEMO1_DIRECTORY = "NeMo 1 directory"
    BRIDGED_VIEW = "bridged view of a NeMo 2.0 directory"
    LIGHTNING = "Lightning checkpoint (.ckpt)"
    MEGATRON = "Megatron checkpoint (iter_*)"
    HUGGINGFACE = "Hugging Face model directory"
    PEFT = "Hugging Face PEFT adapter directory"
    GGUF = "GGUF file"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: rank, alpha, adapted modules, its base model with whether that is here (None:
    not a path), and its kind."""

    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    base: str | None
    base_is_here: bool | None
    variant: str = "LoRA"


@dataclass(frozen=True)
class Checkpoint:
    """The answer of :func:`workshop_utils.checkpoints.formats.identify.identify`. What could not be
    told is None.

    ``detail`` is the backend or family inside the ``kind``, ``version`` that of the format or of
    its writer. ``nbytes`` are the files of the weights, which lie in ``path / folder``.
    ``parallel`` are the tensor- and pipeline-parallel sizes of parts that were not
    merged: ``tensors`` then lists each part's own. ``made_for`` is the reader that an export names,
    ``variant`` the program (Megatron-LM, Megatron-Bridge) or, of GGUF, llama.cpp's name of the
    architecture, ``storage`` how Megatron-Core stores the weights (torch_dist or torch),
    ``view_of`` the checkpoint whose weights a view shows. ``notes`` are sentences on what else to
    know.
    """

    path: Path
    kind: Kind
    detail: str | None
    architecture: Architecture | None
    nbytes: int
    tensors: tuple[Tensor, ...]
    tokenizer: str | None
    adapter: Adapter | None
    notes: tuple[str, ...] = ()
    version: str | None = None
    folder: str = ""
    parallel: tuple[int, int] = (1, 1)
    made_for: str | None = None
    variant: str | None = None
    storage: str | None = None
    view_of: str | None = None

    @property
    def format(self) -> str:
        """Kind and detail, for people."""
        return f"{self.kind.value} ({self.detail})" if self.detail else self.kind.value

    @property
    def parameters(self) -> int | None:
        """Tied embeddings count once, as they are stored."""
        return sum(tensor.elements for tensor in self.tensors) if self.tensors else None

    @property
    def dtype(self) -> str | None:
        """dtype of the weights, or all of them where they differ."""
        return ", ".join(dtypes(self.tensors)) or None


def dtypes(tensors: Iterable[Tensor]) -> list[str]:
    """The different dtypes of ``tensors``, the one with most elements first."""
    elements: dict[str, int] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    return sorted(elements, key=elements.get, reverse=True)
