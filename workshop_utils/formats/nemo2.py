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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workshop_utils.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedCheckpoint
from workshop_utils.formats import torch_dist
from workshop_utils.formats.safe_text import read_json, read_yaml
from workshop_utils.formats.tensor import Tensor
from workshop_utils.formats.torch_dist import StoredObject
from workshop_utils.paths import shown


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
    index = torch_dist.read_directory(weights)
    return Nemo2Checkpoint(
        path=path,
        model=read_yaml(path / "context" / "model.yaml"),
        backend=backend,
        adapter=read_json(adapter_file) if adapter_file.exists() else None,
        tensors=index.tensors,
        objects=index.objects,
        files=torch_dist.file_sizes(weights),
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
