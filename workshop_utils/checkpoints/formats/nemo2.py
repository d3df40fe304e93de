"""NeMo 2.0 checkpoint directories (torch_dist), read without torch.

    NAME/context/model.yaml       architecture and tokenizer, as a tree of ``_target_`` (class) and
    arguments NAME/context/nemo_tokenizer/  the tokenizer
    NAME/weights/metadata.json    which backend wrote the weights
    NAME/weights/.metadata        index: tensor -> chunks -> file, first byte, length (a pickle; see
    restricted_pickle)
    NAME/weights/__0_0.distcp     the bytes; one or more files for each process that wrote
    NAME/weights/common.pt        state that is not sharded (a pickle; never opened here)

An adapter checkpoint has ``weights/adapter_metadata.json`` beside them, which names its base model.
Layers are stacked: ``module.decoder.layers.mlp.linear_fc1.weight`` has the shape (layers, rows,
columns).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import (
    decoder_config,
    foreign_names,
    gpt_config,
    lora_layout,
    tokenizer_files,
    torch_dist,
    zarr_directory,
)
from workshop_utils.checkpoints.formats.architecture import Architecture, number, section, text
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.safe_text import read_json, read_yaml
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.formats.torch_dist import StoredObject
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)
from workshop_utils.core.hashing import of_contents
from workshop_utils.core.paths import shown


@dataclass(frozen=True)
class Nemo2Checkpoint:
    """What a NeMo 2.0 directory says about itself.

    ``model`` is ``context/model.yaml``, ``backend`` is ``weights/metadata.json``, ``adapter`` is
    ``weights/adapter_metadata.json`` (None for a full model), ``files`` maps each file of
    ``weights/`` to its bytes.
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
        """The tensors of the model itself, without those of the optimizer (their names lack the
        ``module.`` prefix)."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith("module.")}


def looks_like(path: Path) -> bool:
    """Whether ``path`` is laid out as a NeMo 2.0 checkpoint, whole or not."""
    return (path / "weights" / ".metadata").is_file() or (path / "context" / "model.yaml").is_file()


def locate(path: Path) -> Path:
    """``path`` if it is the top of a NeMo 2.0 checkpoint.

    Raises :class:`NotACheckpoint` otherwise, naming the right path where ``path`` is above or
    inside such a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise NotACheckpoint(f"{shown(path)} does not exist.")
    if looks_like(path):
        return path
    here = path.resolve()
    for above in list(here.parents)[:3]:
        if looks_like(above) and here.relative_to(above).parts[0] in ("weights", "context"):
            raise NotACheckpoint(
                f"{shown(path)} is a part of a NeMo 2.0 checkpoint. Give its top directory: "
                f"{shown(above)}"
            )
    below = (
        sorted(child for child in path.iterdir() if child.is_dir() and looks_like(child))
        if path.is_dir()
        else []
    )
    if below:
        names = ", ".join(shown(child) for child in below[:5])
        raise NotACheckpoint(
            f"{shown(path)} is not a checkpoint but holds {len(below)}. Give one of them: {names}"
        )
    raise NotACheckpoint(
        f"{shown(path)} is not a NeMo 2.0 checkpoint: it has neither context/model.yaml nor "
        "weights/.metadata."
    )


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the NeMo 2.0 directory ``path``, also one of zarr; errors and faults as
    :func:`read`."""
    found = _read(path, report, ("torch_dist", "zarr"))
    tensors = found.model_tensors()
    architecture, notes = _architecture(found, tensors, report)
    backend = found.backend["sharded_backend"]
    notes += (zarr_directory.WAY_OUT,) if backend == "zarr" else ()
    if optimizer := len(found.tensors) - len(tensors):
        notes += (f"{optimizer} tensors of optimizer state beside the weights",)
    notes += foreign_names.note(found.model, path / "context" / "model.yaml")
    return Checkpoint(
        path=path,
        kind=Kind.NEMO2_ADAPTER if found.is_adapter else Kind.NEMO2,
        detail=backend,
        architecture=architecture,
        nbytes=found.nbytes,
        tensors=tuple(tensors.values()),
        tokenizer=_tokenizer(path / "context", found.model),
        adapter=_adapter(found, tensors) if found.is_adapter else None,
        notes=notes,
        version=f"{backend} {found.backend.get('sharded_backend_version')}",
        folder="weights",
    )


def _architecture(
    found: Nemo2Checkpoint, tensors: Mapping[str, Tensor], report: Report
) -> tuple[Architecture | None, tuple[str, ...]]:
    """The sizes of a family that can be converted, with the defaults of its class; of any other as
    ``model.yaml`` states them."""
    embedding = tensors.get("module.embedding.word_embeddings.weight")
    rows = embedding.shape[0] if embedding and embedding.shape else None
    config, notes = section(found.model, "config"), ()
    try:
        fields = gpt_config.read_fields(found.model, shown(found.path / "context" / "model.yaml"))
        sizes = gpt_config.architecture(fields, rows)
    except UnsupportedCheckpoint as error:
        fields, sizes, notes = (
            config,
            decoder_config.megatron_core(config, tensors, rows),
            (str(error),),
        )
    except (DamagedCheckpoint, UnsafeCheckpoint) as fault:
        report(fault)
        return None, ()
    target = found.model.get("_target_")
    family = decoder_config.family_of_target(target) or str(target).rpartition(".")[2]
    return decoder_config.named(sizes, family, fields), notes


def tokenizer_name(model: Mapping[str, Any]) -> str | None:
    """The directory or file below ``context/``, or the repository on the Hub, that ``model`` (a
    ``model.yaml``) names as its tokenizer."""
    described = section(model, "tokenizer")
    name = described.get("pretrained_model_name") or described.get("model_path")
    # NeMo's wrapper around a string that was no path when the checkpoint was written.
    name = name.get("attr") if isinstance(name, Mapping) else name
    return name if isinstance(name, str) and name else None


def _tokenizer(context: Path, model: Mapping[str, Any]) -> str | None:
    described, name = section(model, "tokenizer"), tokenizer_name(model)
    if not described:
        return None
    kind = f"{str(described.get('_target_')).rpartition('.')[2]}: {name}"
    folder = context / str(name)
    # The name may also be one on the Hub, or lead out of the checkpoint.
    inside = name and folder.is_dir() and folder.resolve().is_relative_to(context.resolve())
    count = tokenizer_files.vocabulary(folder) if inside else None
    return f"{kind}, {count:,} tokens" if count else kind


def _adapter(found: Nemo2Checkpoint, tensors: Mapping[str, Tensor]) -> Adapter:
    """Rank and targets as the tensors have them; alpha and kind as ``model_transform`` has them."""
    lora = lora_layout.find(tensors.values())
    transform, base = (
        section(found.model, "model_transform"),
        text(found.adapter, "model_ckpt_path"),
    )
    variant = str(transform.get("_target_", "LoRA")).rpartition(".")[2] or "LoRA"
    return Adapter(
        rank=lora.rank if lora else None,
        alpha=number(transform, "alpha"),
        targets=lora.targets if lora else (),
        base=base,
        base_is_here=Path(base).exists() if base else None,
        variant="DoRA" if lora and lora.is_dora else variant,
    )


def read(path: Path, report: Report = stop) -> Nemo2Checkpoint:
    """Read the NeMo 2.0 checkpoint directory ``path``; of the weights only the index is read. A
    fault of one tensor goes to ``report``.

    Raises :class:`NotACheckpoint` (something else), :class:`DamagedCheckpoint` (files missing, cut
    off or contradictory), :class:`UnsafeCheckpoint` (the index would run code or leaves the
    directory) and :class:`UnsupportedCheckpoint` (zarr).
    """
    return _read(locate(path), report, ("torch_dist",))


def _read(path: Path, report: Report, backends: tuple[str, ...]) -> Nemo2Checkpoint:
    """As :func:`read`, for a directory that one of ``backends`` wrote."""
    weights = path / "weights"
    _refuse_half_written(path)
    backend = read_json(weights / "metadata.json")
    if backend.get("sharded_backend") not in backends:
        raise UnsupportedCheckpoint(
            f"{shown(weights / 'metadata.json')}: sharded_backend is "
            f"{backend.get('sharded_backend')!r}; only torch_dist can be read. "
            f"{zarr_directory.WAY_OUT}."
        )
    adapter_file = weights / "adapter_metadata.json"
    if backend["sharded_backend"] == "zarr":
        tensors, files = zarr_directory.read_directory(weights, report)
        objects = {}
    else:
        index = torch_dist.read_directory(weights, report)
        tensors, objects, files = index.tensors, index.objects, torch_dist.file_sizes(weights)
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
    # NeMo's ModelCheckpoint puts this marker beside a checkpoint while it writes it; NAME-last may
    # be a link to that.
    real = path.resolve()
    marker = real.parent / f"{real.name}-unfinished"
    if marker.exists():
        raise DamagedCheckpoint(
            f"{shown(path)} is half-written: {marker.name} lies beside it. Use an earlier "
            "checkpoint."
        )
    needed = ("context/model.yaml", "weights/metadata.json")
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        raise DamagedCheckpoint(
            f"{shown(path)} lacks {', '.join(missing)}. Copy or make the checkpoint again."
        )


def contents_of(checkpoint: Path) -> dict[str, dict[str, str]]:
    """Digests of what the NeMo 2.0 directory ``checkpoint`` is loaded from, wherever it lies: part
    -> file in it -> digest."""
    return {part: of_contents(checkpoint / part) for part in ("context", "weights")}
