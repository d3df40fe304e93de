"""The pickles inside a distributed checkpoint that Megatron-Core loads without any restriction:
``common.pt`` and the objects.

An object, such as Transformer Engine's ``_extra_state``, is a range of bytes in a ``.distcp`` file
that ``torch.save`` wrote (``torch/distributed/checkpoint/default_planner.py``, ``load_bytes``:
``weights_only=False``). Its value is often a buffer, or a tensor of bytes, with one more pickle in
it, which Transformer Engine loads (``transformer_engine/pytorch/module/base.py``).
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from workshop_utils.checkpoints.formats import (
    nemo1,
    restricted_pickle,
    torch_archive,
    torch_dist,
    values,
)
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core.errors import CheckpointError, UnsafeCheckpoint
from workshop_utils.core.paths import shown

SHARDED = f"{nemo1.SHARDED}/"


def archived_index(checkpoint: Checkpoint) -> torch_dist.Index | None:
    """The index inside the ``.nemo`` archive of ``checkpoint``, or None where it is not sharded.
    Faults were told by its reader."""
    files = Files(checkpoint.path, SHARDED)
    return files.read_index(lambda fault: None) if torch_dist.INDEX in files.sizes() else None


def check_common(report: Report, checkpoint: Checkpoint, prefix: str = "") -> None:
    """The state that is not sharded is there and can be read without running anything that it
    names.

    It is ``common.pt``, or an object of the index, which :func:`check_objects` reads. ``prefix`` is
    that of members of an archive.
    """
    name = f"{prefix}{torch_dist.COMMON}"
    where = (
        f"{shown(checkpoint.path)}:{name}"
        if prefix
        else shown(checkpoint.path / checkpoint.folder / name)
    )
    try:
        with values.open_part(checkpoint, name) as file:
            content = file.read(restricted_pickle.MAX_BYTES + 1)
    except (CheckpointError, FileNotFoundError, IsADirectoryError):
        if torch_dist.COMMON_STATE in report.objects:
            report.checked.append(
                "the state that is not sharded is in the index, as Megatron-Core 0.19 writes it"
            )
            return
        report.damaged(
            f"{where} is missing; Megatron-Core loads no checkpoint without it, or, from 0.19 "
            f"on, without a sound {torch_dist.COMMON_STATE} in the index. Copy the checkpoint "
            "again."
        )
        return
    _check(report, where, content)
    report.checked.append("common.pt is there and holds only plain values")


def check_objects(report: Report, checkpoint: Checkpoint, prefix: str = "") -> None:
    """No object of the index names anything that would run; each is read, weights are not."""
    entries = sorted(report.objects.values(), key=attrgetter("file", "start"))
    for file, held in itertools.groupby(entries, key=attrgetter("file")):
        with values.open_part(checkpoint, prefix + file) as part:
            for item in held:
                part.seek(item.start)
                content = part.read(min(item.length, restricted_pickle.MAX_BYTES + 1))
                _check(
                    report,
                    f"{shown(checkpoint.path)}: {item.name} in {file}",
                    content,
                    "_extra_state" in item.name,
                )
    if entries:
        report.checked.append(
            f"{len(entries):,} objects that are no tensors hold only plain values"
        )


def _check(report: Report, where: str, content: bytes, extra_state: bool = False) -> None:
    """``extra_state``: Transformer Engine loads the bytes in it, so that what cannot be read of
    them is a finding."""
    if len(content) > restricted_pickle.MAX_BYTES:
        report.damaged(
            f"{where} has more than {restricted_pickle.MAX_BYTES:,} bytes, and is no tensor."
        )
        return
    try:
        state = torch_archive.read_state(io.BytesIO(content), where, report.add)
        for inner in _inner(state, content):
            if inner != b"":
                _check_inner(report, where, inner, extra_state)
    except CheckpointError as error:
        report.add(error)


def _inner(value: Any, content: bytes) -> Iterator[bytes | None]:
    """What the value of an object holds as bytes; None for what would be loaded and cannot be
    told."""
    if isinstance(value, bytes | torch_archive.LongBytes):
        # What is no Latin-1 the loader fails on, too.
        with contextlib.suppress(UnicodeEncodeError):
            yield bytes(value)
    elif isinstance(value, torch_archive.Buffer):
        plain = isinstance(value.content, bytes | torch_archive.LongBytes)
        yield from _inner(value.content, content) if plain else [None]
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inner(item, content)
    elif isinstance(value, torch_archive.SavedTensor) and 0 not in value.shape:
        known = value.dtype == "uint8" and value.contiguous
        yield content[value.start : value.start + value.length] if known else None


def _check_inner(report: Report, where: str, content: bytes | None, extra_state: bool) -> None:
    if content is not None and content[:4] == b"PK\x03\x04":
        torch_archive.read_state(io.BytesIO(content), where, report.add)
        return
    calls = None if content is None else torch_archive.scan_bare(content)
    if calls:
        report.add(restricted_pickle.unsafe(where, calls))
    elif calls is None and extra_state:
        report.add(
            UnsafeCheckpoint(
                f"{where} holds bytes that cannot be read here, and that Transformer Engine "
                "would load as a pickle: what they would run is not known. Nothing was "
                "executed. Load this file only if you trust its source."
            )
        )
