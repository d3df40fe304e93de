"""Read the pickles of checkpoints without running anything they name.

``torch.distributed.checkpoint`` writes its index, ``.metadata``, as a pickle, and loads it with a
bare ``pickle.load``: whoever wrote the file chooses which functions run. Here only the names that
such a file really needs are accepted (:mod:`.pickled_names`), and each stands for an inert object,
so that neither torch nor anything else is imported. Every other name is reported, with the call.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import pickled_names
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.pickle_machine import Machine, Record, StandIn
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.core.paths import shown
from workshop_utils.core.terminal import plain

MAX_BYTES = 256 * 1024**2
"""Larger files are not read. 100,000 chunks take about 22 MB."""

MAX_DIMENSIONS = 64

_WIDTHS = {
    1: "float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bits8 bits1x8 bits2x4 "
    "bits4x2 qint8 quint8 quint4x2 quint2x4 "
    + " ".join(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)),
    2: "uint16 bits16",
    4: "complex32 bcomplex32 uint32 qint32",
    8: "complex64 uint64",
    16: "complex128",
}
OTHER_DTYPE_BYTES = {name: width for width, names in _WIDTHS.items() for name in names.split()}
"""Bytes of one element of the dtypes that are harmless but that no checkpoint of this workshop's
formats holds."""


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


class TensorProperties(StandIn):
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
INDEX: Allowed = {
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
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


def survey(
    data: bytes,
    where: str,
    allowed: Allowed = INDEX,
    storage: Callable[[Any], Any] | None = None,
) -> tuple[list[str], Any]:
    """What the pickle ``data`` would do besides describing a checkpoint, and what it describes;
    nothing is done.

    The first are the calls of names outside ``allowed``, in their order, such as
    ``posix.system('touch x')``, or ``argparse.Namespace`` for a name that is looked up and not
    called. What stands after a break in the pickle is not among them: it would not be reached
    either. In the second a :class:`.pickle_machine.Foreign` stands for each such name and result;
    it is None for a broken pickle. ``storage`` answers persistent ids, as torch's archives use
    them. Raises :class:`DamagedCheckpoint` if the pickle breaks before any call; ``where`` names
    it.
    """
    machine = Machine(data, allowed, storage)
    value = broken = None
    try:
        value = machine.load()
    except _BROKEN as error:
        broken = error
    broken = machine.failure or broken
    if broken and not machine.seen:
        raise DamagedCheckpoint(
            f"{where} cannot be read as a pickle of a checkpoint: "
            f"{plain(str(broken), 200) or type(broken).__name__}"
        ) from broken
    return list(machine.seen), None if broken else value


def scan_all(
    data: bytes, allowed: Allowed, storage: Callable[[Any], Any] | None = None, most: int = 8
) -> tuple[list[str], int]:
    """The calls of up to ``most`` pickles one after the other, as torch wrote them before 1.6, and
    how many of them are whole.

    What breaks here may go on in Python's own machine: a pickle that is not whole is not known to
    be harmless.
    """
    seen: dict[str, None] = {}
    at = 0
    for whole in range(most):
        machine = Machine(data, allowed, storage, at)
        try:
            machine.load()
        except _BROKEN as error:
            machine.failure = error
        seen |= machine.seen
        if machine.failure:
            return list(seen), whole
        at = machine.at
    return list(seen), most


_WRITERS = frozenset(
    [
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
    ]
)


def unsafe(where: str, calls: list[str]) -> UnsafeCheckpoint:
    """The error for the pickle ``where`` that would do ``calls``."""
    name = calls[0].partition("(")[0]
    more = f"; and {len(calls) - 3} more" if len(calls) > 3 else ""
    if name.partition(".")[0] in _WRITERS:
        advice = (
            "It is not among the names that checkpoints are known to need; whether it does harm "
            "is not known. Nothing was executed. Load this file only if you trust its source."
        )
    else:
        advice = (
            "A checkpoint needs no such name. Nothing was executed. Do not load this file; get "
            "it again from a source you trust."
        )
    return UnsafeCheckpoint(
        f"{where} is a pickle that would call {plain(name, 200)} when it is loaded "
        f"({'; '.join(calls[:3])}{more}). {advice}"
    )


def load_index(data: bytes, where: str, report: Report = stop) -> Metadata:
    """The index of a torch_dist checkpoint (the bytes of ``.metadata``) as inert objects; errors as
    :func:`survey`.

    If it names anything outside the list, ``report`` is told (:class:`UnsafeCheckpoint`), and the
    rest of it is read where ``report`` returns.
    """
    calls, metadata = survey(data, where)
    if calls:
        report(unsafe(where, calls))
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
