"""Write the files of a torch_dist directory: the index over files that are there already, or new
files, one tensor at a time.

``megatron.core.dist_checkpointing.load`` wants ``.metadata`` (a pickle of
``torch.distributed.checkpoint.metadata.Metadata``), ``metadata.json`` (the backend) and
``common.pt`` (state that is not sharded). torch's own classes write them, so that whatever torch
reads the directory finds what it expects; nothing is copied from another checkpoint's pickles.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats.tensor import Chunk, Tensor
from workshop_utils.checkpoints.formats.torch_dist import INDEX, StoredObject

if TYPE_CHECKING:
    import torch

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""``metadata.json``, as Megatron-Core 0.13 writes it."""


def write_index(
    directory: Path,
    tensors: Iterable[Tensor],
    objects: Iterable[StoredObject] = (),
    backend: dict[str, Any] = BACKEND,
) -> None:
    """Write ``.metadata``, ``metadata.json`` and an empty ``common.pt`` for packed ``tensors``
    whose files lie in ``directory``."""
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
    for tensor in tensors:
        chunks = [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
            for chunk in tensor.chunks
        ]
        properties = TensorProperties(getattr(torch, tensor.dtype))
        entries[tensor.name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for index, chunk in enumerate(tensor.chunks):
            places[MetadataIndex(tensor.name, chunk.offsets, index)] = _StorageInfo(
                chunk.file, chunk.start, chunk.length
            )
    for entry in objects:
        entries[entry.name] = BytesStorageMetadata()
        places[MetadataIndex(entry.name)] = _StorageInfo(entry.file, entry.start, entry.length)
    index = Metadata(
        state_dict_metadata=entries,
        planner_data={name: (name,) for name in entries},
        storage_data=places,
    )
    index.mcore_data = {}  # Megatron-Core's own field; it describes flattened optimizer state only
    with (directory / INDEX).open("wb") as file:
        pickle.dump(index, file)
    (directory / "metadata.json").write_text(json.dumps(backend) + "\n", encoding="utf-8")
    torch.save({}, directory / "common.pt")


def renamed(entries: Iterable[Tensor | StoredObject], old: str, new: str) -> list:
    """``entries`` with the prefix ``new`` in place of ``old``."""
    return [
        dataclasses.replace(entry, name=new + entry.name.removeprefix(old)) for entry in entries
    ]


def link(files: Iterable[str], source: Path, directory: Path, target: Path) -> None:
    """Link ``files`` of the directory ``source`` into ``directory``, which will be moved to
    ``target``.

    The links are relative, so that a moved repository still finds them, and lead to the files
    themselves, not to other links.
    """
    for file in sorted(set(files)):
        (directory / file).symlink_to(os.path.relpath(os.path.realpath(source / file), target))


def append(file: IO[bytes], name: str, offsets: tuple[int, ...], elements: torch.Tensor) -> Chunk:
    """Write one chunk at the end of ``file``, called ``name`` in the index; its place."""
    import torch

    start = file.tell()
    if elements.untyped_storage().nbytes() != elements.nbytes or not elements.is_contiguous():
        # torch.save writes the whole storage of what it is given.
        elements = elements.clone(memory_format=torch.contiguous_format)
    torch.save(elements, file)
    return Chunk(offsets, tuple(elements.shape), name, start, file.tell() - start)
