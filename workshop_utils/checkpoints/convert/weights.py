"""The weights of a converted checkpoint: links to the files that hold them, copies of those, or new
files written tensor by tensor."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING

from workshop_utils.checkpoints.convert.source import Source
from workshop_utils.checkpoints.formats import torch_dist_writer, values
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, DTYPES, Chunk, Tensor
from workshop_utils.checkpoints.formats.torch_dist import StoredObject
from workshop_utils.core.paths import shown
from workshop_utils.core.progress import progress_bar

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

FILE = "__0_0.distcp"
"""Name of the one file that is written, as the first process of a save would call it."""


Change = Callable[[Tensor, Chunk, "torch.Tensor"], "torch.Tensor"]


class How(StrEnum):
    """What becomes of the bytes of the weights."""

    LINK = "linked"
    MOVE = "moved"
    COPY = "copied"
    WRITE = "written again"


def how(source: Source, dtype: str | None, to_archive: bool, temporary: bool = False) -> How:
    """Link where nothing changes, copy from or to an archive, write where bytes change."""
    changes = dtype is not None and any(
        tensor.dtype in DTYPES and tensor.dtype != dtype for tensor in source.tensors.values()
    )
    if changes or not source.sharded:
        return How.WRITE
    if source.files.are_members or to_archive:
        return How.COPY
    return How.MOVE if temporary else How.LINK


def origin(source: Source) -> Path:
    """The directory of the weights themselves, where the files of ``source`` may be links."""
    first = next(iter(source.tensors.values())).files[0]
    return Path(os.path.realpath(source.files.place / first)).parent


def place(
    source: Source, what: How, directory: Path, target: Path, prefix: str, dtype: str | None
) -> None:
    """Fill the new ``directory`` (which will be ``target``) with a torch_dist checkpoint of
    ``source``.

    The names begin with ``prefix``. Raises :class:`DamagedCheckpoint` when a file turns out to be
    cut off.
    """
    directory.mkdir(parents=True)
    tensors, objects = list(source.tensors.values()), list(source.objects.values())
    sizes = file_sizes(source)
    if what is How.WRITE:
        with (directory / FILE).open("wb") as written:
            tensors, objects = write(source, written, dtype)
    elif what is How.LINK:
        torch_dist_writer.link(sizes, source.files.place, directory, target)
    elif what is How.MOVE:
        for name in sizes:
            os.replace(source.files.place / name, directory / name)
    else:
        copy(source, "copying", lambda name: (directory / name).open("wb"))
    write_index(source, tensors, objects, directory, prefix)


def copy(
    source: Source, what: str, new: Callable[[str], AbstractContextManager[IO[bytes]]]
) -> None:
    """Copy each file that holds weights to what ``new`` opens for its name; ``what`` is said of the
    progress."""
    from tqdm.utils import CallbackIOWrapper

    sizes = file_sizes(source)
    with progress(sum(sizes.values()), what) as bar:
        for name in sizes:
            with source.files.open(name) as opened, new(name) as written:
                shutil.copyfileobj(CallbackIOWrapper(bar.update, opened, "read"), written)


def file_sizes(source: Source) -> dict[str, int]:
    names = {file for tensor in source.tensors.values() for file in tensor.files}
    names |= {entry.file for entry in source.objects.values()}
    return {name: size for name, size in sorted(source.files.sizes().items()) if name in names}


def write_index(
    source: Source, tensors: list[Tensor], objects: list[StoredObject], directory: Path, prefix: str
) -> None:
    """``tensors`` and ``objects`` have the names of ``source``; written begin with ``prefix``."""
    torch_dist_writer.write_index(
        directory,
        torch_dist_writer.renamed(tensors, source.prefix, prefix),
        torch_dist_writer.renamed(objects, source.prefix, prefix),
    )


def write(
    source: Source, written: IO[bytes], dtype: str | None, change: Change | None = None
) -> tuple[list[Tensor], list[StoredObject]]:
    """Write every chunk to the new file ``written``, called :data:`FILE`, and return the entries of
    the index.

    Never more than one chunk is in memory, twice. ``change`` returns other elements for a chunk, of
    the same shape.
    """
    import torch

    new: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[int, Tensor, Chunk]]] = {}
    for tensor in source.tensors.values():
        for chunk in tensor.chunks:
            pieces.setdefault(chunk.file, []).append((chunk.start, tensor, chunk))
    with progress(source.nbytes, "writing") as bar:
        # File by file, because looking a member up in an archive reads its list each time.
        for file, here in sorted(pieces.items()):
            with source.files.open(file) as opened:
                for _, tensor, chunk in sorted(here, key=lambda piece: piece[0]):
                    kind = dtype if dtype and tensor.dtype in DTYPES else tensor.dtype
                    held = _elements(opened, tensor, chunk, f"{shown(source.path)}: {file}")
                    changed = change(tensor, chunk, held) if change else held
                    changed = changed.to(getattr(torch, kind))
                    stored = torch_dist_writer.append(written, FILE, chunk.offsets, changed)
                    empty = Tensor(tensor.name, tensor.shape, kind, (), packed=True)
                    before = new.get(tensor.name, empty)
                    chunks = (*before.chunks, stored)
                    new[tensor.name] = dataclasses.replace(before, chunks=chunks)
                    bar.update(held.numel() * DTYPE_BYTES[tensor.dtype])
    objects = []
    for entry in source.objects.values():
        with source.files.open(entry.file) as opened:
            opened.seek(entry.start)
            objects.append(dataclasses.replace(entry, file=FILE, start=written.tell()))
            written.write(opened.read(entry.length))
    return [new[name] for name in source.tensors], objects


def _elements(file: IO[bytes], tensor: Tensor, chunk: Chunk, where: str) -> torch.Tensor:
    """Of the shape of ``chunk``; ``where`` names the file in errors."""
    import torch

    content = memoryview(bytearray(chunk.length))
    file.seek(chunk.start)
    length = file.readinto(content)
    # The read may end early; parse_chunk says so.
    elements = values.parse_chunk(content[:length], tensor, chunk, where)
    # By its bytes, because torch does not take numpy's bfloat16; writable, because torch warns
    # otherwise.
    plain = elements.reshape(-1).view("uint8")
    plain = plain if plain.flags.writeable else plain.copy()
    return torch.from_numpy(plain).view(getattr(torch, tensor.dtype)).reshape(chunk.shape)


def progress(total: int, what: str) -> tqdm:
    """A progress bar over ``total`` bytes; only for what takes a while."""
    return progress_bar(total=total, desc=what, unit="B", unit_scale=True, delay=2)
