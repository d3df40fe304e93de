"""What a checkpoint holds, whatever its format: one description that every target can be written
from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import megatron_layout
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.gpt_classes import Family
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.formats.torch_dist import StoredObject
from workshop_utils.core.paths import shown


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: ``kind`` is ``huggingface`` (a directory of files) or ``sentencepiece`` (one
    file).

    ``path`` is where it lies, or ``archive`` and ``members`` (name in the archive -> file name)
    where it lies in a ``.nemo``. ``hub`` is the name of a repository on the Hub, for one that is
    nowhere here. ``legacy`` is SentencePiece's old way with special tokens.
    """

    kind: str
    path: Path | None = None
    archive: Path | None = None
    members: Mapping[str, str] = field(default_factory=dict)
    hub: str | None = None
    use_fast: bool = True
    legacy: bool = False


@dataclass(frozen=True)
class Source:
    """A model to convert.

    ``fields`` and ``family`` are its architecture
    (:mod:`workshop_utils.checkpoints.formats.gpt_config`), ``rows`` and ``dtype`` those of its
    embedding. ``tensors`` and ``objects`` have the names of the stacked form, with ``prefix`` in
    front; their chunks lie in ``files``. ``sharded``: the weights are those of a torch_dist
    directory, so that their files can be used as they are.
    """

    path: Path
    format: str
    fields: dict[str, Any]
    family: Family
    rows: int
    dtype: str
    tensors: dict[str, Tensor]
    objects: dict[str, StoredObject]
    prefix: str
    files: Files
    tokenizer: Tokenizer | None

    @classmethod
    def checked(
        cls,
        path: Path,
        format: str,
        fields: dict[str, Any],
        family: Family,
        entries: tuple[Mapping[str, Tensor], Mapping[str, StoredObject]],
        prefix: str,
        files: Files,
        tokenizer: Tokenizer | None,
        config: str,
    ) -> "Source":
        """The model of those ``entries`` (tensors, and other objects) that begin with ``prefix``,
        once they are exactly those of ``fields``, which ``config`` states. Errors as
        :func:`.megatron_layout.check`."""
        tensors, objects = (
            {name: entry for name, entry in each.items() if name.startswith(prefix)}
            for each in entries
        )
        rows, dtype = megatron_layout.check(tensors, prefix, fields, shown(path), config)
        weights = tensors, objects, prefix, files
        return cls(path, format, fields, family, rows, dtype, *weights, tokenizer)

    @property
    def sharded(self) -> bool:
        return all(tensor.packed for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
