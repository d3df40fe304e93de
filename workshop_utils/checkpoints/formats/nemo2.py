"""NeMo 2.0 checkpoint directories (torch_dist), read without torch.

    NAME/context/model.yaml       architecture and tokenizer, as a tree of ``_target_`` (class) and
                                  arguments
    NAME/context/nemo_tokenizer/  the tokenizer
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
from workshop_utils.checkpoints.formats.megatron_layout import EMBEDDING
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

PREFIX = "module."
"""Of the names of the model's own tensors."""


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
        return self.adapter is not None

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    @property
    def config(self) -> Path:
        return self.path / "context" / "model.yaml"

    def model_tensors(self) -> dict[str, Tensor]:
        """Without those of the optimizer, whose names lack :data:`PREFIX`."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(PREFIX)}


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
    for above in here.parents[:3]:
        if looks_like(above) and here.relative_to(above).parts[0] in ("weights", "context"):
            raise NotACheckpoint(a_part_of(path, above, "NeMo 2.0 checkpoint"))
    if below := sorted(filter(looks_like, path.iterdir())) if path.is_dir() else []:
        raise NotACheckpoint(holds(path, below))
    raise NotACheckpoint(
        f"{shown(path)} is not a NeMo 2.0 checkpoint: it has neither context/model.yaml nor "
        "weights/.metadata."
    )


def a_part_of(path: Path, top: Path, kind: str = "checkpoint") -> str:
    return f"{shown(path)} is a part of a {kind}. Give its top directory: {shown(top)}"


def holds(path: Path, below: list[Path]) -> str:
    names = ", ".join(map(shown, below[:5]))
    return f"{shown(path)} is not a checkpoint but holds {len(below)}. Give one of them: {names}"


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the directory ``path``; errors and faults as :func:`read`."""
    held = read(path, report)
    tensors = held.model_tensors()
    architecture, notes = _architecture(held, tensors, report)
    backend = held.backend["sharded_backend"]
    if optimizer := len(held.tensors) - len(tensors):
        notes += (f"{optimizer} tensors of optimizer state beside the weights",)
    return Checkpoint(
        path=path,
        kind=Kind.NEMO2_ADAPTER if held.is_adapter else Kind.NEMO2,
        detail=backend,
        architecture=architecture,
        nbytes=held.nbytes,
        tensors=tuple(tensors.values()),
        tokenizer=_tokenizer(path / "context", held.model),
        adapter=_adapter(held, tensors) if held.is_adapter else None,
        notes=notes + foreign_names.note(held.model, held.config),
        version=f"{backend} {held.backend.get('sharded_backend_version')}",
        folder="weights",
        storage=backend,
    )


def _architecture(
    held: Nemo2Checkpoint, tensors: Mapping[str, Tensor], report: Report
) -> tuple[Architecture | None, tuple[str, ...]]:
    """With the defaults of its class where that is known, else as ``model.yaml`` states it."""
    notes, target = (), held.model.get("_target_")
    try:
        fields = gpt_config.read_fields(held.model, shown(held.config))
    except UnsupportedCheckpoint as error:
        fields, notes = section(held.model, "config"), (str(error),)
    except (DamagedCheckpoint, UnsafeCheckpoint) as fault:
        report(fault)
        return None, ()
    embedding = tensors.get(PREFIX + EMBEDDING)
    rows = embedding.shape[0] if embedding and embedding.shape else None
    family = decoder_config.family_of_target(target) or str(target).rpartition(".")[2]
    return decoder_config.megatron_core(fields, tensors, rows, family), notes


def tokenizer_name(model: Mapping[str, Any]) -> str | None:
    """What ``model.yaml`` names: a place below ``context/``, or a repository on the Hub."""
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


def _adapter(held: Nemo2Checkpoint, tensors: Mapping[str, Tensor]) -> Adapter:
    """Rank and targets as the tensors have them; alpha and kind as ``model_transform`` has them."""
    lora, transform = lora_layout.find(tensors.values()), section(held.model, "model_transform")
    base = text(held.adapter, "model_ckpt_path")
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
    path = locate(path)
    weights, real = path / "weights", path.resolve()
    # NeMo's ModelCheckpoint puts this marker beside a checkpoint while it writes it; NAME-last may
    # be a link to that.
    if (real.parent / f"{real.name}-unfinished").exists():
        raise DamagedCheckpoint(
            f"{shown(path)} is half-written: {real.name}-unfinished lies beside it. Use an earlier "
            "checkpoint."
        )
    needed = ("context/model.yaml", "weights/metadata.json")
    if missing := ", ".join(name for name in needed if not (path / name).is_file()):
        raise DamagedCheckpoint(
            f"{shown(path)} lacks {missing}. Copy or make the checkpoint again."
        )
    backend = read_json(weights / "metadata.json")
    if (kind := backend.get("sharded_backend")) != "torch_dist":
        raise UnsupportedCheckpoint(
            f"{shown(weights / 'metadata.json')}: sharded_backend is {kind!r}; only torch_dist can "
            f"be read. {zarr_directory.WAY_OUT}."
        )
    index, files = torch_dist.read_directory(weights, report), torch_dist.file_sizes(weights)
    adapter, model = weights / "adapter_metadata.json", read_yaml(path / "context" / "model.yaml")
    stated = read_json(adapter) if adapter.exists() else None
    return Nemo2Checkpoint(path, model, backend, stated, index.tensors, index.objects, files)


def contents_of(checkpoint: Path) -> dict[str, dict[str, str]]:
    """Digests of what ``checkpoint`` is loaded from, wherever it lies: part -> file -> digest."""
    return {part: of_contents(checkpoint / part) for part in ("context", "weights")}
