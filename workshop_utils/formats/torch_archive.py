"""Files that ``torch.save`` wrote (``model_weights.ckpt``, ``.bin``): names, shapes and dtypes of their tensors, without torch.

Such a file is a zip of ``NAME/data.pkl``, a pickle, and of ``NAME/data/0``, ``NAME/data/1``...: the bytes of each storage, which
the pickle refers to by persistent ids ``("storage", type, key, device, elements)``. Only the pickle is read, and restricted.
Source of the format: ``torch/serialization.py`` and ``torch/_utils.py`` (torch 2.13).
"""

import pickle
import zipfile
from dataclasses import dataclass
from typing import IO, Any

from workshop_utils.errors import DamagedCheckpoint, UnsupportedCheckpoint
from workshop_utils.formats import restricted_pickle
from workshop_utils.formats.restricted_pickle import Ignored, Sealed
from workshop_utils.formats.tensor import DTYPE_BYTES

MAX_PICKLE = 64 * 1024**2

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in such a file: shape, dtype by name, and the key of its storage (``data/<key>`` in the zip)."""

    shape: tuple[int, ...]
    dtype: str
    storage: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str


class _State(dict, metaclass=Sealed):
    """``collections.OrderedDict``, whose attributes (``_metadata``) are dropped."""

    def __init__(self, *arguments: Any) -> None:
        if arguments:
            raise pickle.UnpicklingError("an OrderedDict made from arguments")
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


class _Tensor(metaclass=Sealed):
    """``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata)``."""

    def __new__(cls, storage: Any, offset: Any, size: Any, *rest: Any) -> SavedTensor:
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not all(type(part) is int and part >= 0 for part in size):
            raise pickle.UnpicklingError("a tensor without a storage and a size")
        return SavedTensor(size, storage.dtype, storage.key)


class _Parameter(metaclass=Sealed):
    """``torch._utils._rebuild_parameter(data, requires_grad, hooks)``."""

    def __new__(cls, data: Any, *rest: Any) -> Any:
        return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _State,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch.serialization", "_get_layout"): Ignored,
    # Transformer Engine's _extra_state.
    ("_io", "BytesIO"): Ignored,
    **{("torch", name): f"torch.{dtype}" for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): "torch.uint8",
    **{("torch", name): f"torch.{name}" for name in DTYPE_BYTES},
}


def read_tensors(file: IO[bytes], where: str) -> dict[str, SavedTensor]:
    """Name -> tensor of the flat state dict in ``file``; ``where`` names it in errors. Entries that are no tensors are left out.

    Raises :class:`UnsafeCheckpoint` (the pickle would run code), :class:`DamagedCheckpoint` and :class:`UnsupportedCheckpoint`
    (the format of torch before 1.6, which is no zip).
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [entry for entry in archive.infolist() if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise DamagedCheckpoint(f"{where} has {len(pickles)} files data.pkl; torch.save writes one.")
            if pickles[0].file_size > MAX_PICKLE:
                raise DamagedCheckpoint(f"{where}: data.pkl has {pickles[0].file_size:,} bytes; at most {MAX_PICKLE:,} are read.")
            if pickles[0].compress_type != zipfile.ZIP_STORED:
                raise DamagedCheckpoint(f"{where}: data.pkl is compressed, which torch.save never does.")
            data = archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        file.seek(0)
        if file.read(2) == b"\x80\x02":
            raise UnsupportedCheckpoint(
                f"{where} is in the format of torch before 1.6. Load and save it once: torch.save(torch.load(file, weights_only=True), new)"
            ) from error
        raise DamagedCheckpoint(f"{where} is no file that torch.save wrote, or it is cut off: {error}") from error
    except (NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise DamagedCheckpoint(f"{where} cannot be read: {error}") from error
    state = restricted_pickle.load(data, where, _ALLOWED, _storage)
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{where} holds a {type(state).__name__}, not tensors by name.")
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, SavedTensor)}


def _storage(reference: Any) -> _Storage:
    """The storage that a persistent id names."""
    kind, storage_type, key = reference[:3] if isinstance(reference, tuple) and len(reference) >= 3 else (None, None, None)
    dtype = str(storage_type).removeprefix("torch.")
    if kind != "storage" or dtype not in DTYPE_BYTES or not isinstance(key, str):
        raise pickle.UnpicklingError("a reference to something that is no storage")
    return _Storage(dtype, key)
