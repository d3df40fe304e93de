"""The index of a torch_dist checkpoint: which tensor lies in which bytes of which file.

``.metadata`` is a pickle (see :mod:`.restricted_pickle`); the ``.distcp`` files beside it hold the
bytes. NeMo 2.0 has them in ``weights/``, NeMo 1 in ``model_weights/``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from workshop_utils.checkpoints.formats import restricted_pickle
from workshop_utils.checkpoints.formats.findings import Code, Report, stop
from workshop_utils.checkpoints.formats.pickle_machine import without_collector
from workshop_utils.checkpoints.formats.restricted_pickle import MAX_DIMENSIONS
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Chunk, Tensor
from workshop_utils.core.errors import (
    CheckpointError,
    DamagedCheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)
from workshop_utils.core.paths import shown

INDEX = ".metadata"

COMMON = "common.pt"
"""State that is not sharded; Megatron-Core loads no checkpoint without it."""

COMMON_STATE = "common_state/shard_0_1"
"""The entry of the index that has it from Megatron-Core 0.19 on, as a list of one dictionary; there
is no :data:`COMMON` beside it.
Source: ``save`` and ``load_common_state_dict`` in
``megatron/core/dist_checkpointing/serialization.py``."""

SHOWN = 8
"""Names in a message about a whole file."""

MAX_NAME = 1000
"""Characters of a tensor's name."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An entry that is not a tensor, such as Transformer Engine's ``_extra_state``; a pickle that
    is never opened here."""

    name: str
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Index:
    """Every entry of a checkpoint by name: tensors, and other objects."""

    tensors: dict[str, Tensor]
    objects: dict[str, StoredObject]


def read_directory(weights: Path, report: Report = stop) -> Index:
    """As :func:`read_index`, also for a missing or too large file."""
    path = weights / INDEX
    if not path.is_file():
        raise DamagedCheckpoint(f"{shown(path)} is missing.")
    data = restricted_pickle.read_bytes(path)
    return read_index(data, shown(weights), file_sizes(weights), report)


def file_sizes(weights: Path) -> dict[str, int]:
    """Bytes of each file by name; a link counts as the file that it leads to."""
    return {file.name: file.stat().st_size for file in sorted(weights.iterdir()) if file.is_file()}


def read_index(data: bytes, where: str, files: Mapping[str, int], report: Report = stop) -> Index:
    """The entries that the pickle ``data`` lists. ``where`` names the directory in errors,
    ``files`` are its files and sizes.

    Each entry's byte range is checked to lie inside a file that is there. Raises
    :class:`DamagedCheckpoint` when the index as a whole cannot be read. To ``report`` go names that
    the pickle would call (UnsafeCheckpoint), and each fault of one entry, which is left
    out: UnsafeCheckpoint (a range leaves the directory), DamagedCheckpoint, UnsupportedCheckpoint
    (compressed).
    """
    with without_collector():
        return _read_index(data, where, files, report)


def _read_index(data: bytes, where: str, files: Mapping[str, int], report: Report) -> Index:
    place = f"{where}/{INDEX}"
    index = restricted_pickle.load_index(data, place, report)
    entries, stored = index.get("state_dict_metadata"), index.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise DamagedCheckpoint(f"{place} has no list of tensors or no list of their places.")
    places = _places(stored, where, files, report)
    del index, stored
    tensors, objects = {}, {}
    for name, entry in entries.items():
        try:
            if not isinstance(name, str) or len(name) > MAX_NAME:
                raise DamagedCheckpoint(f"{place} lists something without a sound name.")
            is_object = isinstance(entry, restricted_pickle.BytesStorageMetadata)
            if isinstance(entry, restricted_pickle.TensorStorageMetadata):
                tensors[name] = _tensor(place, name, entry, places)
            elif is_object and (name, None) in places:
                if held := places[name, None]:
                    objects[name] = StoredObject(name, *held)
            else:
                raise DamagedCheckpoint(
                    f"{place}: {name!r} is of an unknown kind or has no place in any file.", name
                )
        except CheckpointError as fault:
            report(fault)
    return Index(tensors, objects)


def _places(
    stored: dict, where: str, files: Mapping[str, int], report: Report
) -> dict[tuple, tuple[str, int, int] | None]:
    """(name, offset in the tensor) -> (file, start, length), or None for one that was reported."""
    places = {}
    broken: dict[str, dict[str, int]] = {}
    while stored:
        # Taken out one by one, so that there are never two full lists of 100,000 places.
        key, place = stored.popitem()
        name, offset = item = getattr(key, "fqn", None), getattr(key, "offset", None)
        sound = isinstance(name, str) and len(name) <= MAX_NAME
        if not sound or not (offset is None or _is_shape(offset)):
            report(DamagedCheckpoint(f"{where}/{INDEX} lists a place without a sound name."))
            continue
        if item in places:
            twice = f"{where}/{INDEX} lists two places for {name} at {offset}."
            report(DamagedCheckpoint(twice, name))
            continue
        try:
            file, start, length = places[item] = _place(where, name, place, files)
        except CheckpointError as fault:
            places[item] = None
            report(fault)
            continue
        if start + length > files.get(file, -1):
            places[item] = None
            ends = broken.setdefault(file, {})
            ends[name] = max(ends.get(name, 0), start + length)
    for file, ends in sorted(broken.items()):
        report(_broken_file(f"{where}/{file}", files.get(file), ends))
    return places


def _broken_file(path: str, size: int | None, ends: Mapping[str, int]) -> DamagedCheckpoint:
    names = sorted(ends)
    only = names[0] if len(names) == 1 else None
    held = ", ".join(names[:SHOWN])
    held += f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    if size is None:
        why = f"is missing; it holds {held}. Copy the checkpoint again, all of it."
        return DamagedCheckpoint(f"{path} {why}", only, Code.MISSING_FILE)
    return DamagedCheckpoint(
        f"{path} has {size:,} bytes but {held} end{'s' if only else ''} at byte "
        f"{max(ends.values()):,}: the file is cut off. Copy the checkpoint again.",
        only,
        Code.CUT_OFF,
    )


def _place(where: str, name: str, place: Any, files: Mapping[str, int]) -> tuple[str, int, int]:
    here = f"{where}/{INDEX}: {name}"
    file, start = getattr(place, "relative_path", None), getattr(place, "offset", None)
    length = getattr(place, "length", None)
    named = isinstance(file, str) and len(file) <= MAX_NAME
    if not named or not (_is_size(start) and _is_size(length)):
        raise DamagedCheckpoint(f"{here} has no sound file, offset and length.", name)
    if getattr(place, "transform_descriptors", None):
        raise UnsupportedCheckpoint(f"{here} is stored compressed, which NeMo never writes.", name)
    if file not in files:
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file:
            raise UnsafeCheckpoint(
                f"{here} lies in {file!r}, outside the checkpoint. It was not read.", name
            )
    return file, start, length


def _tensor(
    where: str, name: str, entry: restricted_pickle.TensorStorageMetadata, places: dict
) -> Tensor:
    """The tensor, without the chunks whose place was reported."""
    here = f"{where}: {name}"
    shape, properties, chunks = entry.get("size"), entry.get("properties"), entry.get("chunks")
    is_known = isinstance(properties, restricted_pickle.TensorProperties)
    dtype = str(getattr(properties, "dtype", None) if is_known else None).removeprefix("torch.")
    if dtype in restricted_pickle.OTHER_DTYPE_BYTES:
        raise UnsupportedCheckpoint(f"{here} is of {dtype}, which NeMo never writes.", name)
    if not _is_shape(shape) or dtype not in DTYPE_BYTES or not isinstance(chunks, list):
        raise DamagedCheckpoint(f"{here} has no sound shape, dtype and list of chunks.", name)
    found, shapes = [], {}
    for chunk in chunks:
        is_record = isinstance(chunk, restricted_pickle.Record)
        offsets, sizes = (chunk.get("offsets"), chunk.get("sizes")) if is_record else (None, None)
        sound = _is_shape(offsets) and _is_shape(sizes)
        if not sound or not len(offsets) == len(sizes) == len(shape):
            raise DamagedCheckpoint(f"{here}: a chunk has no sound offset and shape.", name)
        # Each place serves one chunk: a list that names one chunk over and over would take for
        # ever.
        place = places.pop((name, offsets), ())
        if place == ():
            lost = f"its chunk at {offsets} has no place in any file of its own."
            raise DamagedCheckpoint(f"{here}: {lost}", name)
        if place:
            file, start, length = place
            found.append(Chunk(offsets, shapes.setdefault(sizes, sizes), file, start, length))
    return Tensor(name, shape, dtype, tuple(found), packed=True)


def _is_shape(value: Any) -> bool:
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS:
        return False
    for item in value:  # noqa: SIM110 (a call for each item takes three times as long)
        if type(item) is not int or not 0 <= item < 2**63:
            return False
    return True


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
