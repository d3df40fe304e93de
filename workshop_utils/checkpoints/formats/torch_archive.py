"""Files that ``torch.save`` wrote (``model_weights.ckpt``, ``common.pt``, ``.bin``, ``.ckpt``),
read without torch.

Such a file is a zip (:mod:`.torch_zip`) of ``NAME/data.pkl``, a pickle, and of ``NAME/data/0``,
``NAME/data/1``...: the bytes of each storage, which the pickle refers to by persistent ids
``("storage", type, key, device, elements)``. A tensor is an offset, a shape and strides in a
storage. Only the pickle is read, and restricted; of the storages only their places are told. Source
of the format: ``torch/serialization.py`` and ``torch/_utils.py`` (torch 2.13).
"""

import dataclasses
import functools
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from workshop_utils.checkpoints.formats import pickled_names, restricted_pickle, torch_zip
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.pickle_machine import Harmful, Inert, StandIn
from workshop_utils.checkpoints.formats.restricted_pickle import (
    MAX_DIMENSIONS,
    OTHER_DTYPE_BYTES,
    layout,
    size,
)
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES
from workshop_utils.core.errors import DamagedCheckpoint
from workshop_utils.core.terminal import plain

MAX_DEPTH = 100
MAX_VALUES = 1_000_000
"""Values of a state dict, those counted twice that it refers to twice: a list of two references to
a list of two... grows so."""

_STORAGES = dict(
    Double="float64", Float="float32", Half="float16", BFloat16="bfloat16", Long="int64",
    Int="int32", Short="int16", Char="int8", Byte="uint8", Bool="bool", Untyped="uint8",
    ComplexFloat="complex64", ComplexDouble="complex128",
)  # fmt: skip

_BYTES = DTYPE_BYTES | OTHER_DTYPE_BYTES

_OLD_FORMAT = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""What files in the format before torch 1.6 begin with, which is still what tensors in a plain
pickle have (``torch/storage.py``)."""

_IN_PICKLE = "bytes in the pickle"
"""Key of a storage that is a pickle within the pickle; those of an archive are the names of its
parts."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in such a file: shape, dtype by name, and its bytes.

    Its elements, row-major and little-endian, are the bytes ``[start, start + length)`` of the
    file. Two tensors may share them: tied weights, or views of one another. Both are None for a
    tensor whose elements do not lie one after the other (strides of a transposed view).
    """

    shape: tuple[int, ...]
    dtype: str
    start: int | None = None
    length: int | None = None

    @property
    def contiguous(self) -> bool:
        """Whether its elements are one range of bytes."""
        return self.start is not None


@dataclass(frozen=True, slots=True)
class _Storage:
    """``start`` is None where the zip lacks it. ``faults`` collects those of its tensors."""

    dtype: str
    key: str
    start: int | None
    length: int
    faults: list["_Faulty"]

    def fault(self, why: str) -> "_Faulty":
        self.faults.append(_Faulty(why))
        return self.faults[-1]


@dataclass(frozen=True, slots=True)
class _Faulty:
    """A tensor that contradicts its storage, and how."""

    why: str


class _State(StandIn, dict):
    """``collections.OrderedDict`` and ``defaultdict``; attributes (``_metadata``) are dropped."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        if any(isinstance(argument, dict | list | tuple) for argument in arguments):
            raise pickle.UnpicklingError("a mapping made from arguments")
        super().__init__()


class _Namespace(StandIn, dict):
    """``argparse.Namespace``: a dictionary of its attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError("a Namespace without attributes")
        self.update(state)
        # Or one long mapping could be copied thousands of times.
        state.clear()


class Named(Inert):
    """A value of a known, harmless class, such as an enumeration: its text is
    ``package.Class(arguments)``."""

    __slots__ = ()


class Class(Named):
    """Such a class itself: called, it gives a :class:`Named`."""

    __slots__ = ()
    is_class = True

    def __call__(self, *arguments: Any) -> Named:
        if self.text.endswith(".type") and len(arguments) != 1:
            raise Harmful(self.text, ["what a new class is made of"])
        short = [argument[:80] if type(argument) is str else argument for argument in arguments[:4]]
        shown = ", ".join(
            repr(argument) for argument in short if isinstance(argument, str | int | float)
        )
        return Named(plain(f"{self.text}({shown})", 200))


class Buffer(Named):
    """``io.BytesIO``, with its bytes (or whatever the file has in their place): Transformer
    Engine's ``_extra_state`` has a pickle in it."""

    __slots__ = ("content",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__("io.BytesIO()")
        self.content: Any = arguments[0] if arguments else b""

    def __setstate__(self, state: Any) -> None:
        # The position is dropped.
        self.content = state[0] if type(state) is tuple and state else state


class LongBytes(Named):
    """Bytes that protocol 2 writes as a ``source`` in Latin-1, not encoded yet: one could be made
    over and over."""

    __slots__ = ("source",)

    def __init__(self, source: str) -> None:
        super().__init__("bytes")
        self.source = source

    def __bytes__(self) -> bytes:
        return self.source.encode("latin-1")


def _encode(text: Any, encoding: Any = None) -> Any:
    """``_codecs.encode(text, "latin1")``: bytes, as protocol 2 writes them."""
    if type(text) is str and encoding == "latin1":
        return text.encode("latin-1") if len(text) <= 256 else LongBytes(text)
    return Named("bytes")


def _items(values: Any = ()) -> Any:
    """``set(list)``: the list."""
    return values if isinstance(values, list | tuple) else []


def _parameter(data: Any, *rest: Any) -> Any:
    """``torch._utils._rebuild_parameter(data, requires_grad, hooks)``, and ``..._with_state``, for
    a parameter with attributes, which Megatron-Core sets."""
    return data


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any
) -> SavedTensor | _Faulty:
    """``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks,
    metadata)``, in elements."""
    if (
        not isinstance(storage, _Storage)
        or not _sizes(shape)
        or not _sizes(stride)
        or not _sizes((offset,))
    ):
        raise pickle.UnpicklingError("a tensor without a storage, an offset, a size and strides")
    item, elements = _BYTES[storage.dtype], math.prod(shape)
    if storage.key == _IN_PICKLE:
        return SavedTensor(shape, storage.dtype)
    if len(stride) != len(shape) or elements >= 2**60:
        return storage.fault(f"has the shape {list(shape)} and {len(stride)} strides")
    last = (
        offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True)) + 1
        if elements
        else offset
    )
    if storage.start is None:
        return storage.fault(f"lies in data/{plain(storage.key, 40)}, which is missing")
    if last * item > storage.length:
        return storage.fault(
            f"ends at byte {last * item:,} of data/{plain(storage.key, 40)}, which has "
            f"{storage.length:,}"
        )
    expected = 1
    for count, step in zip(reversed(shape), reversed(stride), strict=True):
        if count > 1 and step != expected and elements:
            return SavedTensor(shape, storage.dtype)
        expected *= count
    return SavedTensor(shape, storage.dtype, storage.start + offset * item, elements * item)


def _from_type(rebuild: Any, type_: Any, arguments: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2(function, type, arguments, state)``: a tensor of
    another type, or with attributes."""
    # At most eight are written; a long tuple would be copied each time.
    if (
        rebuild not in (_tensor, _typed_tensor, _parameter)
        or type(arguments) is not tuple
        or len(arguments) > MAX_DIMENSIONS
    ):
        raise pickle.UnpicklingError("a tensor that is put together by something else")
    return rebuild(*arguments)


@functools.lru_cache(4096)  # one may be in the pickle over and over; emptied after each
def _calls_within(data: bytes) -> tuple[str, ...]:
    """What ``torch.load`` of ``data`` would call, or its beginning where it is nothing that
    ``torch.save`` wrote for a storage."""
    pickles = 5  # the magic number, the version, the system, the storage, the keys
    if data[:4] == b"PK\x03\x04":
        data, _ = torch_zip.read(io.BytesIO(data), "a storage in a pickle", _INNER)
        pickles = 1
    elif not data.startswith(_OLD_FORMAT):
        return (f"{data[:20]!a}...",)
    calls, whole = restricted_pickle.scan_all(data, _INNER, lambda key: Inert("storage"), pickles)
    return tuple(calls) or (() if whole == pickles else (f"{data[:20]!a}...",))


def _load_from_bytes(content: Any) -> "_Storage":
    """``torch.storage._load_from_bytes(content)``: a storage as a plain pickle holds it, by
    ``torch.load`` of what ``torch.save`` wrote.

    Transformer Engine 2 has tensors so in its ``_extra_state``. Raises
    :class:`.pickle_machine.Harmful` if ``content`` names anything outside the list, or has such a
    thing in it once more, which torch does not write.
    """
    if not isinstance(content, bytes | LongBytes):
        raise pickle.UnpicklingError("a storage that is loaded from no bytes")
    try:
        data = bytes(content)
    except UnicodeEncodeError:
        raise pickle.UnpicklingError("a storage that is loaded from no bytes") from None
    if calls := _calls_within(data):
        raise Harmful("torch.storage._load_from_bytes", calls)
    return _Storage("uint8", _IN_PICKLE, None, 0, [])


def _typed_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> Any:
    """``_rebuild_tensor_v3``: the storage is of bytes and ``dtype`` an argument, as for float8 and
    uint16."""
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    if not isinstance(storage, _Storage) or name not in _BYTES:
        raise pickle.UnpicklingError("a tensor without a storage or a dtype")
    return _tensor(dataclasses.replace(storage, dtype=name), offset, shape, stride)


def _sizes(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= MAX_DIMENSIONS
        and all(type(part) is int and 0 <= part < 2**60 for part in values)
    )


_BUILTINS = ("builtins", "__builtin__")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _State,
    ("collections", "defaultdict"): _State,
    ("argparse", "Namespace"): _Namespace,
    ("types", "SimpleNamespace"): _Namespace,  # Megatron-LM with --yaml-cfg
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.serialization", "_get_layout"): layout,
    ("torch", "Size"): size,
    ("_io", "BytesIO"): Buffer,
    **{("torch", f"{name}Storage"): f"torch.{dtype}" for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): "torch.uint8",
    **{("torch", name): f"torch.{name}" for name in _BYTES},
    **{(module, name): _items for module in _BUILTINS for name in ("set", "frozenset")},
    # As protocol 2 writes empty ones.
    **{(module, "bytes"): lambda: b"" for module in _BUILTINS},
    **{name: Class(".".join(name)) for name in pickled_names.names(pickled_names.STATE)},
    **{name: Named(".".join(name)) for name in pickled_names.names(pickled_names.VALUES)},
    **pickled_names.enumerations(),
}
_INNER = dict(_ALLOWED)
_ALLOWED["torch.storage", "_load_from_bytes"] = _load_from_bytes


def read_tensors(file: IO[bytes], where: str, report: Report = stop) -> dict[str, SavedTensor]:
    """Name -> tensor of the flat state dict in ``file``; ``where`` names it in errors. Entries that
    are no tensors are left out; errors as :func:`read_state`."""
    state = read_state(file, where, report)
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{where} holds a {type(state).__name__}, not tensors by name.")
    return {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, SavedTensor)
    }


def read_state(file: IO[bytes], where: str, report: Report = stop) -> Any:
    """What ``torch.save`` was given, such as Megatron-Core's ``common.pt``: plain values, with
    :class:`SavedTensor` for tensors.

    An ``argparse.Namespace`` is a dictionary, other known classes (enumerations, OmegaConf) are
    :class:`Named`, names outside the list are :class:`.pickle_machine.Foreign`; both print as their
    text. Never deeper than MAX_DEPTH, never endless. Raises :class:`DamagedCheckpoint`,
    :class:`UnsafeCheckpoint` (two readers would see two files, or a program of TorchScript) and
    :class:`UnsupportedCheckpoint` (the format of torch before 1.6, which is no zip). To ``report``
    go: each name that the pickle would call (UnsafeCheckpoint), and each tensor that does not fit
    its storage (DamagedCheckpoint), which is left out.
    """
    data, storages = torch_zip.read(file, where, _ALLOWED)
    faults: list[_Faulty] = []
    calls, state = restricted_pickle.survey(data, where, _ALLOWED, _finder(storages, faults))
    _calls_within.cache_clear()
    for call in calls:
        report(restricted_pickle.unsafe(where, [call]))
    if state is None and calls:
        raise DamagedCheckpoint(f"{where} breaks off after what it would call.")
    _check_extent(state, where)
    return _without_faulty({"": state}, where, "", report).get("") if faults else state


def scan_bare(data: bytes) -> list[str] | None:
    """What pickles one after the other, in no zip, would call; None where that is not known: the
    first is not whole, and Python's own machine may go on where this one stops. A first byte that
    is no opcode stops both.
    """
    calls, whole = restricted_pickle.scan_all(data, _ALLOWED, lambda key: Inert("storage"))
    _calls_within.cache_clear()
    return (
        calls if calls or whole or data[:1].decode("latin-1") not in pickletools.code2op else None
    )


def _without_faulty(value: Any, where: str, path: str, report: Report) -> Any:
    """``value``, once the tensors in it that do not fit their storages are reported and taken
    out."""
    if isinstance(value, _Faulty):
        report(
            DamagedCheckpoint(
                f"{where}: {plain(path, 200)} {value.why}. Copy the file again.", path
            )
        )
        return None
    items = value.items() if isinstance(value, dict) else enumerate(value)
    clean = {
        key: _without_faulty(item, where, f"{path}.{key}" if path else str(key), report)
        for key, item in items
        if item and isinstance(item, _Faulty | dict | list | tuple)
    }
    if isinstance(value, tuple):
        return tuple(clean.get(key, item) for key, item in enumerate(value)) if clean else value
    for key, item in clean.items():
        if isinstance(value, dict) and isinstance(value[key], _Faulty):
            del value[key]
        else:
            value[key] = item
    return value


def _check_extent(state: Any, where: str) -> None:
    """Refuse what a loop over it would not get to the end of: cycles, deep nesting, references to
    references."""
    seen: dict[int, tuple[int, int]] = {}

    def extent(value: Any, depth: int) -> tuple[int, int]:
        # Number of values in ``value``, itself included, and of levels.
        if id(value) not in seen:
            count = levels = 1
            for child in value.values() if isinstance(value, dict) else value:
                more, below = 1, 0
                if child and isinstance(child, dict | list | tuple):
                    more, below = extent(child, depth + 1) if depth < MAX_DEPTH else (0, MAX_DEPTH)
                count, levels = count + more, max(levels, below + 1)
            if count > MAX_VALUES or levels > MAX_DEPTH:
                raise DamagedCheckpoint(
                    f"{where} is nested more than {MAX_DEPTH} deep, contains itself, or holds "
                    f"more than {MAX_VALUES:,} values."
                )
            seen[id(value)] = count, levels
        return seen[id(value)]

    if isinstance(state, dict | list | tuple):
        extent(state, 1)


def _finder(
    storages: dict[str, tuple[int, int]], faults: list[_Faulty]
) -> Callable[[Any], _Storage]:
    def find(reference: Any) -> _Storage:
        # ``elements`` are bytes for an untyped storage.
        if not isinstance(reference, tuple) or len(reference) < 5:
            raise pickle.UnpicklingError("a reference to something that is no storage")
        kind, storage_type, key, _, elements = reference[:5]
        dtype = storage_type.removeprefix("torch.") if isinstance(storage_type, str) else ""
        if (
            kind != "storage"
            or dtype not in _BYTES
            or not isinstance(key, str)
            or not _sizes((elements,))
        ):
            raise pickle.UnpicklingError("a reference to something that is no storage")
        start, length = storages.get(key, (None, 0))
        return _Storage(dtype, key, start, min(length, elements * _BYTES[dtype]), faults)

    return find
