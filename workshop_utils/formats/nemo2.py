"""NeMo 2.0 checkpoint directories (torch_dist), read without torch.

    NAME/context/model.yaml       architecture and tokenizer, as a tree of ``_target_`` (class) and arguments
    NAME/context/nemo_tokenizer/  the tokenizer
    NAME/weights/metadata.json    which backend wrote the weights
    NAME/weights/.metadata        index: tensor -> chunks -> file, first byte, length (a pickle; see restricted_pickle)
    NAME/weights/__0_0.distcp     the bytes; one or more files for each process that wrote
    NAME/weights/common.pt        state that is not sharded (a pickle; never opened here)

An adapter checkpoint has ``weights/adapter_metadata.json`` beside them, which names its base model.
Layers are stacked: ``module.decoder.layers.mlp.linear_fc1.weight`` has the shape (layers, rows, columns).
"""

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from workshop_utils.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.formats import restricted_pickle
from workshop_utils.formats.safe_text import read_json, read_yaml
from workshop_utils.paths import shown


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored piece of a tensor: where it begins in the tensor, its shape, and its bytes ``[start, start + length)`` of a file.

    The byte range holds a small ``torch.save`` archive, so ``length`` is more than the bytes of its elements.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the checkpoint; ``dtype`` is a name such as ``bfloat16``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements alone."""
        return self.elements * restricted_pickle.DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An entry that is not a tensor, such as Transformer Engine's ``_extra_state``; a pickle that is never opened here."""

    name: str
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Nemo2Checkpoint:
    """What a NeMo 2.0 directory says about itself.

    ``model`` is ``context/model.yaml``, ``backend`` is ``weights/metadata.json``, ``adapter`` is
    ``weights/adapter_metadata.json`` (None for a full model), ``files`` maps each file of ``weights/`` to its bytes.
    """

    path: Path
    model: dict[str, Any]
    backend: dict[str, Any]
    adapter: dict[str, Any] | None
    tensors: dict[str, Tensor]
    objects: dict[str, StoredObject]
    files: dict[str, int]

    @property
    def is_adapter(self) -> bool:
        """Whether these are only the weights of an adapter."""
        return self.adapter is not None

    @property
    def nbytes(self) -> int:
        """Bytes of ``weights/``."""
        return sum(self.files.values())

    def model_tensors(self) -> dict[str, Tensor]:
        """The tensors of the model itself, without those of the optimizer (their names lack the ``module.`` prefix)."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith("module.")}


def looks_like(path: Path) -> bool:
    """Whether ``path`` is laid out as a NeMo 2.0 checkpoint, whole or not."""
    return (path / "weights" / ".metadata").is_file() or (path / "context" / "model.yaml").is_file()


def locate(path: Path) -> Path:
    """``path`` if it is the top of a NeMo 2.0 checkpoint.

    Raises :class:`NotACheckpoint` otherwise, naming the right path where ``path`` is above or inside such a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise NotACheckpoint(f"{shown(path)} does not exist.")
    if looks_like(path):
        return path
    here = path.resolve()
    for above in list(here.parents)[:3]:
        if looks_like(above) and here.relative_to(above).parts[0] in ("weights", "context"):
            raise NotACheckpoint(f"{shown(path)} is a part of a NeMo 2.0 checkpoint. Give its top directory: {shown(above)}")
    below = sorted(child for child in path.iterdir() if child.is_dir() and looks_like(child)) if path.is_dir() else []
    if below:
        names = ", ".join(shown(child) for child in below[:5])
        raise NotACheckpoint(f"{shown(path)} is not a checkpoint but holds {len(below)}. Give one of them: {names}")
    raise NotACheckpoint(f"{shown(path)} is not a NeMo 2.0 checkpoint: it has neither context/model.yaml nor weights/.metadata.")


def read(path: Path) -> Nemo2Checkpoint:
    """Read the NeMo 2.0 checkpoint directory ``path``; of the weights only the index is read.

    Raises :class:`NotACheckpoint` (something else), :class:`DamagedCheckpoint` (files missing, cut off or contradictory),
    :class:`UnsafeCheckpoint` (the index would run code or leaves the directory) and :class:`UnsupportedCheckpoint` (zarr).
    """
    path = locate(path)
    weights = path / "weights"
    _refuse_half_written(path)
    backend = read_json(weights / "metadata.json")
    if backend.get("sharded_backend") != "torch_dist":
        raise UnsupportedCheckpoint(
            f"{shown(weights / 'metadata.json')}: sharded_backend is {backend.get('sharded_backend')!r}; only torch_dist can be "
            "read. zarr is deprecated: load and save the checkpoint once with NeMo 2.0 to turn it into torch_dist."
        )
    adapter_file = weights / "adapter_metadata.json"
    files = {file.name: file.stat().st_size for file in sorted(weights.iterdir()) if file.is_file()}
    tensors, objects = _read_index(weights, files)
    return Nemo2Checkpoint(
        path=path,
        model=read_yaml(path / "context" / "model.yaml"),
        backend=backend,
        adapter=read_json(adapter_file) if adapter_file.exists() else None,
        tensors=tensors,
        objects=objects,
        files=files,
    )


def _refuse_half_written(path: Path) -> None:
    # NeMo's ModelCheckpoint puts this marker beside a checkpoint while it writes it.
    marker = path.with_name(f"{path.name}-unfinished")
    if marker.exists():
        raise DamagedCheckpoint(f"{shown(path)} is half-written: {marker.name} lies beside it. Use an earlier checkpoint.")
    needed = ("context/model.yaml", "weights/metadata.json", "weights/.metadata")
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        raise DamagedCheckpoint(f"{shown(path)} lacks {', '.join(missing)}. Copy or make the checkpoint again.")


def _read_index(weights: Path, files: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, StoredObject]]:
    index_file = weights / ".metadata"
    index = restricted_pickle.read_metadata(index_file)
    entries, stored = index.get("state_dict_metadata"), index.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise DamagedCheckpoint(f"{shown(index_file)} has no list of tensors or no list of their places.")
    places = {}
    for key, place in stored.items():
        if not isinstance(key, restricted_pickle.MetadataIndex) or not isinstance(place, restricted_pickle.StorageInfo):
            raise DamagedCheckpoint(f"{shown(index_file)} lists a place of an unknown kind.")
        name, offset = key.get("fqn"), key.get("offset")
        if not isinstance(name, str) or not (offset is None or _is_shape(offset)):
            raise DamagedCheckpoint(f"{shown(index_file)} lists a place without a sound name.")
        if (name, offset) in places:
            raise DamagedCheckpoint(f"{shown(index_file)} lists two places for {name} at {offset}.")
        places[name, offset] = _place(weights, name, place, files)
    tensors, objects = {}, {}
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise DamagedCheckpoint(f"{shown(index_file)} lists an entry without a name.")
        if isinstance(entry, restricted_pickle.TensorStorageMetadata):
            tensors[name] = _tensor(index_file, name, entry, places)
        elif isinstance(entry, restricted_pickle.BytesStorageMetadata) and (name, None) in places:
            objects[name] = StoredObject(name, *places[name, None])
        else:
            raise DamagedCheckpoint(f"{shown(index_file)}: {name} has no place in any file.")
    return tensors, objects


def _place(weights: Path, name: str, place: restricted_pickle.StorageInfo, files: dict[str, int]) -> tuple[str, int, int]:
    """(file, start, length) of one stored item, once the file is known to hold that range."""
    file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
    if not isinstance(file, str) or not _is_shape((start, length)):
        raise DamagedCheckpoint(f"{shown(weights / '.metadata')}: {name} has no sound file, offset and length.")
    if place.get("transform_descriptors"):
        raise UnsupportedCheckpoint(f"{shown(weights / '.metadata')}: {name} is stored compressed, which NeMo never writes.")
    if file not in files:
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file:
            raise UnsafeCheckpoint(f"{shown(weights / '.metadata')}: {name} lies in {file!r}, outside the checkpoint. It was not read.")
        raise DamagedCheckpoint(f"{shown(weights / file)} is missing; it holds {name}. Copy the checkpoint again, all of it.")
    if start + length > files[file]:
        raise DamagedCheckpoint(
            f"{shown(weights / file)} has {files[file]:,} bytes but {name} ends at byte {start + length:,}: the file is cut off. "
            "Copy the checkpoint again."
        )
    return file, start, length


def _tensor(index_file: Path, name: str, entry: restricted_pickle.TensorStorageMetadata, places: dict) -> Tensor:
    shape, properties, chunks = entry.get("size"), entry.get("properties"), entry.get("chunks")
    dtype = properties.get("dtype") if isinstance(properties, restricted_pickle.TensorProperties) else None
    dtype = str(dtype).removeprefix("torch.")
    if not _is_shape(shape) or dtype not in restricted_pickle.DTYPE_BYTES or not isinstance(chunks, list):
        raise DamagedCheckpoint(f"{shown(index_file)}: {name} has no sound shape, dtype and list of chunks.")
    found = []
    for chunk in chunks:
        offsets, sizes = (chunk.get("offsets"), chunk.get("sizes")) if isinstance(chunk, restricted_pickle.Record) else (None, None)
        if not _is_shape(offsets) or not _is_shape(sizes) or not len(offsets) == len(sizes) == len(shape):
            raise DamagedCheckpoint(f"{shown(index_file)}: a chunk of {name} has no sound offset and shape.")
        if (name, offsets) not in places:
            raise DamagedCheckpoint(f"{shown(index_file)}: the chunk of {name} at {offsets} has no place in any file.")
        found.append(Chunk(offsets, sizes, *places[name, offsets]))
    return Tensor(name, shape, dtype, tuple(found))


def _is_shape(value: Any) -> bool:
    """Whether ``value`` is a tuple of sizes that fit in 64 bits."""
    return isinstance(value, tuple) and all(type(item) is int and 0 <= item < 2**63 for item in value)
