"""Read the pickles of checkpoints without running anything they name.

``torch.distributed.checkpoint`` writes its index, ``.metadata``, as a pickle, and loads it with a bare ``pickle.load``: whoever
wrote the file chooses which functions run. Here only the names that such a file really needs are accepted, and each stands for
an inert object, so that neither torch nor anything else is imported. Every other name is refused and reported.

Source of the list for ``.metadata``: ``torch/distributed/checkpoint/{metadata,filesystem}.py`` (torch 2.13) and
``megatron/core/dist_checkpointing/strategies/torch.py`` (Megatron-Core 0.13 to 0.15).
"""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from workshop_utils.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.formats.tensor import DTYPE_BYTES
from workshop_utils.paths import shown

MAX_BYTES = 256 * 1024**2
"""Larger files are not read. 100,000 chunks take about 15 MB."""

MAX_DIMENSIONS = 64


class Sealed(type):
    """Metaclass of the stand-ins: a pickle that tries to change a stand-in class (opcode BUILD) fails."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"tries to change {cls.__name__}.{name}")


class Record(metaclass=Sealed):
    """Stand-in for a class whose pickled state is a mapping of attributes; unknown attributes are kept out."""

    __slots__ = ()

    def __new__(cls, *arguments: Any) -> Self:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        """Arguments of a reduce call carry nothing that is used."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"{type(self).__name__} has no mapping as its state")
        for name in self.__slots__:
            if name in state:
                setattr(self, name, state[name])

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute ``name``, or ``default`` where the file did not set it."""
        return getattr(self, name, default)


class Metadata(Record):
    """``torch.distributed.checkpoint.metadata.Metadata`` and Megatron-Core's ``MCoreMetadata``."""

    __slots__ = ("state_dict_metadata", "storage_data", "version")


class MetadataIndex(Record):
    """Names one stored item: the tensor's name and the chunk's offset in it. Equal only to itself."""

    __slots__ = ("fqn", "index", "offset")


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
    """dtype and layout of one tensor; pickled as a tuple (dtype, layout, requires_grad, memory format, pin_memory)."""

    __slots__ = ("dtype", "layout")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2:
            raise pickle.UnpicklingError("TensorProperties has no tuple as its state")
        self.dtype, self.layout = state[:2]


class Ignored(Record):
    """Anything that is allowed in the file and never looked at."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


class _Size(metaclass=Sealed):
    """``torch.Size``: becomes a plain tuple. Takes only tuples, which are shared and not copied."""

    def __new__(cls, values: Any = ()) -> tuple:
        if not isinstance(values, tuple) or len(values) > MAX_DIMENSIONS:
            raise pickle.UnpicklingError("torch.Size of something that is not a short tuple")
        return values


class _Layout(metaclass=Sealed):
    """``torch.serialization._get_layout("torch.strided")``: becomes its argument."""

    def __new__(cls, name: Any) -> Any:
        return name


_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Layout,
    (f"{_DCP}.metadata", "Metadata"): Metadata,
    (f"{_DCP}.metadata", "MetadataIndex"): MetadataIndex,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): BytesStorageMetadata,
    (f"{_DCP}.metadata", "TensorProperties"): TensorProperties,
    (f"{_DCP}.filesystem", "_StorageInfo"): StorageInfo,
    (_MCORE, "MCoreMetadata"): Metadata,
    **{("torch", name): f"torch.{name}" for name in DTYPE_BYTES},
    **{("pathlib", name): Ignored for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")},
    **{(f"{_DCP}.metadata", name): Ignored for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")},
    **{(f"{_DCP}.planner", name): Ignored for name in ("TensorWriteData", "WriteItem", "WriteItemType")},
    (_MCORE, "MCoreSavePlan"): Ignored,
}


class _Refused(pickle.UnpicklingError):
    """The pickle names something outside the list."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed, self._storage = allowed, storage

    def find_class(self, module: str, name: str) -> Any:
        found = self._allowed.get((module, name))
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, key: Any) -> Any:
        if self._storage is None:
            raise pickle.UnpicklingError("it refers to things outside the pickle")
        return self._storage(key)


def load(
    data: bytes, where: str, allowed: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any] | None = None
) -> Any:
    """What the pickle ``data`` describes, built only of plain values and of what ``allowed`` maps (module, name) to.

    ``storage`` answers persistent ids, as torch's archives use them. Raises :class:`UnsafeCheckpoint` when the pickle names
    anything else and :class:`DamagedCheckpoint` when it is broken; ``where`` names it.
    """
    try:
        return _Unpickler(data, allowed, storage).load()
    except _Refused as error:
        raise UnsafeCheckpoint(
            f"{where} is a pickle that would call {error} when it is loaded. A checkpoint needs no such name. Nothing was "
            "executed. Do not load this file; get it again from a source you trust."
        ) from None
    # A pickle is a program: a broken one may fail in any of these ways.
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
            MemoryError, RecursionError, ImportError) as error:  # fmt: skip
        raise DamagedCheckpoint(f"{where} cannot be read as a pickle of a checkpoint: {error}") from error


def load_index(data: bytes, where: str) -> Metadata:
    """The index of a torch_dist checkpoint (the bytes of ``.metadata``) as inert objects; errors as :func:`load`."""
    metadata = load(data, where, _ALLOWED)
    if not isinstance(metadata, Metadata):
        raise DamagedCheckpoint(f"{where} holds a {type(metadata).__name__}, not the index of a torch_dist checkpoint.")
    return metadata


def read_bytes(path: Path) -> bytes:
    """The bytes of a pickle. Raises :class:`DamagedCheckpoint` when it is larger than MAX_BYTES."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DamagedCheckpoint(f"{shown(path)} has {size:,} bytes; at most {MAX_BYTES:,} are read.")
    return path.read_bytes()
