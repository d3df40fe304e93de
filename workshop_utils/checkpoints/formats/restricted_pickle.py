"""Read the pickles of checkpoints without running anything they name.

``torch.distributed.checkpoint`` writes its index, ``.metadata``, as a pickle, and loads it with a
bare ``pickle.load``: whoever wrote the file chooses which functions run. Here only the names that
such a file really needs are accepted, and each stands for an inert object, so that neither torch
nor anything else is imported. Every other name is refused and reported, with the call. The list,
with its sources, is :mod:`.pickled_names`.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import pickled_names
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.pickle_machine import (
    GETATTR,
    Foreign,
    Inert,
    Machine,
    Record,
)
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.core.paths import shown
from workshop_utils.core.terminal import plain

MAX_BYTES = 256 * 1024**2
"""Larger files are not read. 100,000 chunks take about 15 MB."""

MAX_DIMENSIONS = 64

OTHER_DTYPE_BYTES = {
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "bcomplex32": 4,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
    **{f"{kind}{bits}": 1 for kind in ("int", "uint") for bits in range(1, 8)},
}
"""Bytes of one element of the dtypes that are harmless but that no checkpoint of this workshop's
formats holds."""

MAX_CALLS = 100
"""So many calls of one pickle are reported."""


class Metadata(Record):
    """``torch.distributed.checkpoint.metadata.Metadata`` and Megatron-Core's ``MCoreMetadata``."""

    __slots__ = ("state_dict_metadata", "storage_data", "version")


class MetadataIndex(Record):
    """Names one stored item: the tensor's name and the chunk's offset in it."""

    __slots__ = ("fqn", "offset")


class TensorStorageMetadata(Record):
    """Shape and chunks of one tensor."""

    __slots__ = ("chunks", "properties", "size")


class ChunkStorageMetadata(Record):
    """Offset and shape of one chunk of a tensor."""

    __slots__ = ("offsets", "sizes")


class StorageInfo(Record):
    """Where a stored item lies: file, first byte, number of bytes."""

    __slots__ = ("length", "offset", "relative_path", "transform_descriptors")


class BytesStorageMetadata(Record):
    """An item that is not a tensor, such as the ``_extra_state`` of Transformer Engine."""

    __slots__ = ()


class TensorProperties(Record):
    """dtype and layout of one tensor; pickled as a tuple (dtype, layout, requires_grad, memory
    format, pin_memory)."""

    __slots__ = ("dtype", "layout")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2:
            raise pickle.UnpicklingError("TensorProperties has no tuple as its state")
        self.dtype, self.layout = state[:2]


class Ignored(Record):
    """Anything that is allowed in the file and never looked at."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        """Drop the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


def size(values: Any = ()) -> tuple:
    """``torch.Size``: becomes a plain tuple. Takes only tuples, which are shared and not copied."""
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("torch.Size of something that is not a short tuple")
    return values


def layout(name: Any) -> Any:
    """``torch.serialization._get_layout("torch.strided")``: becomes its argument."""
    return name


Allowed = Mapping[tuple[str, str], Any]
"""(module, name) -> a plain value, or what to call in its place."""

_DCP = "torch.distributed.checkpoint"
_STAND_INS: Allowed = {
    ("torch", "Size"): size,
    ("torch.serialization", "_get_layout"): layout,
    (f"{_DCP}.metadata", "Metadata"): Metadata,
    (f"{_DCP}.metadata", "MetadataIndex"): MetadataIndex,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): BytesStorageMetadata,
    (f"{_DCP}.metadata", "TensorProperties"): TensorProperties,
    (f"{_DCP}.filesystem", "_StorageInfo"): StorageInfo,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
}
_INDEX: Allowed = {
    **{name: _STAND_INS.get(name, Ignored) for name in pickled_names.names(pickled_names.INDEX)},
    **{("torch", name): f"torch.{name}" for name in DTYPE_BYTES | OTHER_DTYPE_BYTES},
    **pickled_names.enumerations(),
}

# A pickle is a program: a broken one may fail in any of these ways.
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


class _Refused(pickle.UnpicklingError):
    """The pickle names something outside the list."""


def load(
    data: bytes, where: str, allowed: Allowed, storage: Callable[[Any], Any] | None = None
) -> Any:
    """What the pickle ``data`` describes, built only of plain values and of what ``allowed`` maps
    (module, name) to.

    ``storage`` answers persistent ids, as torch's archives use them. Raises
    :class:`UnsafeCheckpoint` when the pickle names anything else (see :func:`unsafe`) and
    :class:`DamagedCheckpoint` when it is broken; ``where`` names it.
    """

    def find(module: str, name: str) -> Any:
        """What ``allowed`` has for the name. Raises :class:`_Refused` where that is nothing."""
        found = allowed.get((module, name))
        if found is None:
            raise _Refused(f"{module}.{name}")
        if found is GETATTR:
            looked_up.append(found)
        return found

    looked_up: list[Foreign] = []
    machine = Machine(data, find, storage)
    try:
        value = machine.run()
        if looked_up and not machine.members:
            raise _Refused(GETATTR.text)
        return value
    except _BROKEN as error:
        # Raises DamagedCheckpoint unless there is something to call.
        calls = scan(data, where, allowed, storage)
        raise unsafe(
            where, str(error) if isinstance(error, _Refused) else calls[0].partition("(")[0], calls
        ) from None


def scan(
    data: bytes, where: str, allowed: Allowed = _INDEX, storage: Callable[[Any], Any] | None = None
) -> list[str]:
    """What the pickle ``data`` would do besides describing a checkpoint: the calls of names outside
    ``allowed``, in their order.

    Such as ``posix.system('touch x')``, or ``argparse.Namespace`` for a name that is looked up and
    not called. Nothing of it is done. At most MAX_CALLS. What stands after a break in the pickle is
    not seen: it would not be reached either. Raises :class:`DamagedCheckpoint` if the pickle breaks
    before any of them.
    """
    return survey(data, where, allowed, storage)[0]


def scan_all(
    data: bytes,
    where: str,
    allowed: Allowed,
    storage: Callable[[Any], Any] | None = None,
    most: int = 8,
) -> tuple[list[str], int]:
    """As :func:`scan`, for up to ``most`` pickles one after the other, as torch wrote them before
    1.6, and how many of them are whole.

    What breaks here may go on in Python's own machine: a pickle that is not whole is not known to
    be harmless.
    """
    seen: dict[str, bool] = {}
    for whole in range(most):
        machine = _surveyor(data, allowed, storage, seen)
        try:
            machine.run()
        except _BROKEN:
            return list(seen), whole
        finally:
            _without_members(machine, seen)
        if machine.failure:
            return list(seen), whole
        data = data[machine.at :]
    return list(seen), most


def survey(
    data: bytes, where: str, allowed: Allowed, storage: Callable[[Any], Any] | None = None
) -> tuple[list[str], Any]:
    """As :func:`scan`, with what the pickle describes; a :class:`Foreign` stands for each name and
    result outside ``allowed``.

    The second is None for a broken pickle.
    """
    seen: dict[str, bool] = {}
    machine = _surveyor(data, allowed, storage, seen)
    value, broken = None, None
    try:
        value = machine.run()
    except _BROKEN as error:
        broken = error
    broken = machine.failure or broken
    _without_members(machine, seen)
    if broken and not seen:
        raise _broken(where, broken) from broken
    return list(seen), None if broken else value


def _surveyor(
    data: bytes, allowed: Allowed, storage: Callable[[Any], Any] | None, seen: dict[str, bool]
) -> Machine:
    """A machine that goes on after a name outside ``allowed`` and puts down in ``seen`` what is
    called."""

    def find(module: str, name: str) -> Any:
        """What ``allowed`` has for the name, or a :class:`Foreign`, whose name is put down."""
        found = allowed.get((module, name))
        if found is None:
            found = Foreign(plain(f"{module}.{name}", 200))
        if isinstance(found, Foreign) and len(seen) < MAX_CALLS:
            seen.setdefault(found.text, False)
        return found

    def called(what: str, arguments: Any) -> None:
        """Put down the call of ``what`` in place of its bare name."""
        text = f"{what}({', '.join(_text(argument) for argument in arguments[:4]) if type(arguments) is tuple else '...'})"  # noqa: E501
        if len(seen) < MAX_CALLS:
            # The call takes the place of the bare name.
            seen.pop(what, None)
            seen[text] = True

    return Machine(data, find, storage, called)


def _without_members(machine: Machine, seen: dict[str, bool]) -> None:
    """Take the bare name of ``getattr`` out of ``seen`` where it named members of enumerations."""
    if machine.members:
        seen.pop(GETATTR.text, None)


_WRITERS = (
    "torch",
    "megatron",
    "nemo",
    "transformer_engine",
    "lightning",
    "pytorch_lightning",
    "omegaconf",
    "numpy",
    "transformers",
    "peft",
)


def unsafe(where: str, name: str, calls: list[str]) -> UnsafeCheckpoint:
    """The error for the pickle ``where`` that names ``name``, with the first of its ``calls``."""
    what = (
        f" ({'; '.join(calls[:3])}{f'; and {len(calls) - 3} more' if len(calls) > 3 else ''})"
        if calls
        else ""
    )
    if name.partition(".")[0] in _WRITERS:
        judged = (
            "It is not among the names that checkpoints are known to need; whether it does harm "
            "is not known. Nothing was executed. Load this file only if you trust its source."
        )
    else:
        judged = (
            "A checkpoint needs no such name. Nothing was executed. Do not load this file; get "
            "it again from a source you trust."
        )
    return UnsafeCheckpoint(
        f"{where} is a pickle that would call {plain(name, 200)} when it is loaded{what}. {judged}"
    )


def _broken(where: str, error: BaseException) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"{where} cannot be read as a pickle of a checkpoint: "
        f"{plain(str(error), 200) or type(error).__name__}"
    )


def _text(value: Any, depth: int = 0) -> str:
    """An argument of a call, shortened."""
    if isinstance(value, Inert):
        return value.text[:80]
    if isinstance(value, str | bytes):
        return ascii(value[:80]) + ("..." if len(value) > 80 else "")
    if isinstance(value, int | float | None):
        return str(value)
    if isinstance(value, tuple | list) and depth < 3:
        inside = ", ".join(_text(item, depth + 1) for item in value[:4])
        return f"[{inside}{', ...' if len(value) > 4 else ''}]"
    return "{...}" if isinstance(value, dict) else "..."


def load_index(data: bytes, where: str, report: Report = stop) -> Metadata:
    """The index of a torch_dist checkpoint (the bytes of ``.metadata``) as inert objects; errors as
    :func:`load`.

    If it names anything outside the list, ``report`` is told, and the rest of it is read where
    ``report`` returns.
    """
    try:
        metadata = load(data, where, _INDEX)
    except UnsafeCheckpoint as error:
        report(error)
        metadata = survey(data, where, _INDEX)[1]
    if metadata is None:
        raise DamagedCheckpoint(f"{where} breaks off after what it would call.")
    if not isinstance(metadata, Metadata):
        raise DamagedCheckpoint(
            f"{where} holds a {type(metadata).__name__}, not the index of a torch_dist checkpoint."
        )
    return metadata


def read_bytes(path: Path) -> bytes:
    """The bytes of a pickle. Raises :class:`DamagedCheckpoint` when it is larger than MAX_BYTES."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DamagedCheckpoint(
            f"{shown(path)} has {size:,} bytes; at most {MAX_BYTES:,} are read."
        )
    return path.read_bytes()
