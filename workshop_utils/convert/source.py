"""What a checkpoint holds, whatever its format: one description that every target can be written from."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from workshop_utils.formats import nemo_archive, torch_dist
from workshop_utils.formats.gpt_classes import Family
from workshop_utils.formats.tensor import Tensor
from workshop_utils.formats.torch_dist import StoredObject


@dataclass(frozen=True)
class Files:
    """The files that hold the weights: those of the directory ``place``, or the members below ``inside`` of the archive ``place``."""

    place: Path
    inside: str = ""

    @property
    def are_members(self) -> bool:
        """Whether they lie in an archive."""
        return self.place.is_file()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by name."""
        if not self.are_members:
            return torch_dist.file_sizes(self.place)
        return {
            member.name.removeprefix(self.inside): member.size
            for member in nemo_archive.members(self.place)
            if member.name.startswith(self.inside)
        }

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """The file ``name``, open for reading where it lies."""
        if not self.are_members:
            with (self.place / name).open("rb") as file:
                yield file
            return
        with nemo_archive.open_member(self.place, self.inside + name) as file:
            yield file


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: ``kind`` is ``huggingface`` (a directory of files) or ``sentencepiece`` (one file).

    ``path`` is where it lies, or ``archive`` and ``members`` (name in the archive -> file name) where it lies in a ``.nemo``.
    ``hub`` is the name of a repository on the Hub, for one that is nowhere here. ``legacy`` is SentencePiece's old way with special tokens.
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

    ``fields`` and ``family`` are its architecture (:mod:`workshop_utils.formats.gpt_config`), ``rows`` and ``dtype`` those of its
    embedding. ``tensors`` and ``objects`` have the names of the stacked form, with ``prefix`` in front; their chunks lie in ``files``.
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

    @property
    def sharded(self) -> bool:
        """Whether the weights are those of a torch_dist directory, so that their files can be used as they are."""
        return all(tensor.packed for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
