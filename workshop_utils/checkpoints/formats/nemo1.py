"""NeMo 1 checkpoints: a ``.nemo`` archive, or the directory that it unpacks to.

    model_config.yaml                            architecture, tokenizer, LoRA settings
    model_weights.ckpt                           weights of one process (torch.save)
    mp_rank_XX/model_weights.ckpt                the part of each tensor-parallel rank
    tp_rank_XX_pp_rank_XXX/model_weights.ckpt    the part of each tensor- and pipeline-parallel rank
    model_weights/                               sharded weights (torch_dist, or zarr in old files)

Source: ``NLPSaveRestoreConnector`` (``nemo/collections/nlp/parts/nlp_overrides.py``, NeMo 2.4.1).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import (
    decoder_config,
    foreign_names,
    lora_layout,
    nemo1_config,
    nemo_archive,
    safe_text,
    saved_tensors,
    tokenizer_files,
    torch_dist,
    zarr_directory,
)
from workshop_utils.checkpoints.formats.architecture import Architecture, section, text
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.nemo_archive import CONFIG, WEIGHTS
from workshop_utils.checkpoints.formats.rank_files import rank_files
from workshop_utils.checkpoints.formats.rank_files import sizes as rank_sizes
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.core.errors import CheckpointError, DamagedCheckpoint
from workshop_utils.core.paths import shown

SHARDED = "model_weights"
VIEW = "bridge.json"
"""Lies in a view of a NeMo 2.0 checkpoint and names it (see
:mod:`workshop_utils.checkpoints.convert.bridge`)."""

MAX_RANKS = 10_000

_RANK_FOLDER = re.compile(r"mp_rank_\d+|tp_rank_\d+_pp_rank_\d+")


def looks_like(path: Path) -> bool:
    """Whether the directory ``path`` is laid out as an unpacked ``.nemo``, whole or not."""
    if not (path / CONFIG).is_file() or (path / "context" / "model.yaml").is_file():
        return False
    weights = (path / SHARDED).is_dir() or (path / WEIGHTS).is_file() or (path / VIEW).is_file()
    return weights or any(_RANK_FOLDER.fullmatch(child.name) for child in path.iterdir())


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the archive or directory ``path``. A fault of one tensor, or of one rank's part,
    goes to ``report``.

    Raises :class:`NotACheckpoint` (no archive), :class:`UnsafeCheckpoint` and
    :class:`DamagedCheckpoint`.
    """
    files = Files(path)
    sizes, config = files.sizes(), read_config(files)
    ranks = rank_files(sizes)
    tensors, parallel, notes = _tensors(files, sizes, ranks, config, report)
    view = _view(path) if path.is_dir() and (path / VIEW).is_file() else None
    adapter = None if view else _adapter(config, tensors, parallel)
    ours = section(config, "workshop")
    made_for = ours.get("reader")
    if made_for:
        notes += (
            f"q, k, v rows: {ours.get('qkv_order')}; alpha baked in: {ours.get('alpha_baked_in')}",
        )
    notes += foreign_names.note(config, files.where(CONFIG))
    version = config.get("nemo_version")
    return Checkpoint(
        path=path,
        kind=Kind.BRIDGED_VIEW if view else _kind(files, adapter),
        detail=None,
        architecture=_architecture(config, tensors, parallel[0], ours.get("family")),
        nbytes=sum(
            size
            for name, size in sizes.items()
            if name.startswith(f"{SHARDED}/") or name in ranks.values()
        ),
        tensors=tensors,
        tokenizer=_tokenizer(config),
        adapter=adapter,
        notes=((view,) if view else ()) + notes,
        version=f"NeMo {version}" if isinstance(version, str) else None,
        folder="" if files.are_members or ranks else SHARDED,
        parallel=parallel,
        made_for=str(made_for) if made_for else None,
    )


def read_config(files: Files) -> dict[str, Any]:
    """``model_config.yaml``. Errors as :func:`.nemo_archive.read_config` and
    :func:`.safe_text.read_yaml`."""
    return (
        nemo_archive.read_config(files.place)
        if files.are_members
        else safe_text.read_yaml(files.place / CONFIG)
    )


def _kind(files: Files, adapter: Adapter | None) -> Kind:
    if not files.are_members:
        return Kind.NEMO1_DIRECTORY
    return Kind.NEMO1_ARCHIVE_ADAPTER if adapter else Kind.NEMO1_ARCHIVE


def _tensors(
    files: Files,
    sizes: Mapping[str, int],
    ranks: Mapping[tuple[int, int], str],
    config: Mapping[str, Any],
    report: Report,
) -> tuple[tuple[Tensor, ...], tuple[int, int], tuple[str, ...]]:
    """The tensors, the tensor- and pipeline-parallel sizes of parts that were not merged, and
    notes."""
    if WEIGHTS in sizes:
        with files.open(WEIGHTS) as file:
            return (
                tuple(saved_tensors.read(file, files.where(WEIGHTS), WEIGHTS, report)),
                (1, 1),
                (),
            )
    sharded = files.below(SHARDED)
    if f"{SHARDED}/{torch_dist.INDEX}" in sizes:
        found = sharded.read_index(report).tensors.values()
        return (
            tuple(
                _moved(tensor, files) for tensor in found if not tensor.name.startswith("optimizer")
            ),
            (1, 1),
            (),
        )
    if any(name.startswith(f"{SHARDED}/") and name.endswith("/.zarray") for name in sizes):
        found = zarr_directory.read(sharded.sizes(), sharded.read, sharded.where(), report).values()
        return tuple(_moved(tensor, files) for tensor in found), (1, 1), (zarr_directory.WAY_OUT,)
    if not ranks:
        raise DamagedCheckpoint(
            f"{shown(files.place)} has no weights: neither {WEIGHTS} nor {SHARDED}/ nor "
            "mp_rank_00/."
        )
    return _ranks(files, ranks, config, report)


def _moved(tensor: Tensor, files: Files) -> Tensor:
    """``tensor`` with the files of its chunks as members of the archive; in a directory they are
    relative to ``folder``."""
    if not files.are_members:
        return tensor
    chunks = tuple(
        dataclasses.replace(chunk, file=f"{SHARDED}/{chunk.file}") for chunk in tensor.chunks
    )
    return dataclasses.replace(tensor, chunks=chunks)


def _ranks(
    files: Files, ranks: Mapping[tuple[int, int], str], config: Mapping[str, Any], report: Report
) -> tuple[tuple[Tensor, ...], tuple[int, int], tuple[str, ...]]:
    """The pieces that each rank holds; names come once for each rank, and the file tells which."""
    sizes = tuple(
        max(found, nemo1_config.size(config, f"{name}_model_parallel_size", 1))
        for found, name in zip(rank_sizes(ranks), ("tensor", "pipeline"), strict=True)
    )
    if sizes[0] * sizes[1] > MAX_RANKS:
        raise DamagedCheckpoint(
            f"{shown(files.place)} claims parallel sizes {sizes[0]:,} and {sizes[1]:,}; no model "
            "has so many parts."
        )
    for rank in ((tensor, pipeline) for tensor in range(sizes[0]) for pipeline in range(sizes[1])):
        if rank not in ranks:
            report(
                DamagedCheckpoint(
                    f"{shown(files.place)} lacks the part of tensor-parallel rank {rank[0]}, "
                    f"pipeline-parallel rank {rank[1]}."
                )
            )
    found: list[Tensor] = []
    for name in sorted(ranks.values()):
        try:
            with files.open(name) as file:
                found += saved_tensors.read(file, files.where(name), name, report)
        except CheckpointError as fault:
            report(fault)
    note = (
        f"written by {len(ranks)} model-parallel ranks (tensor-parallel size {sizes[0]}, "
        f"pipeline-parallel size {sizes[1]}) whose parts are not merged: shapes are those of the "
        "parts, and what every rank holds is listed and counted for each"
    )
    return tuple(found), sizes, (note,)


def _architecture(
    config: Mapping[str, Any], tensors: tuple[Tensor, ...], ranks: int, family: Any
) -> Architecture | None:
    """``ranks`` is the tensor-parallel size of parts: each has its share of the vocabulary."""
    sizes = decoder_config.named(
        nemo1_config.architecture(config), decoder_config.FAMILIES.get(str(family)), config
    )
    if sizes is None or sizes.vocabulary:
        return sizes
    embedding = next(
        (tensor for tensor in tensors if tensor.name.endswith("embedding.word_embeddings.weight")),
        None,
    )
    return (
        dataclasses.replace(sizes, vocabulary=ranks * embedding.shape[0])
        if embedding and embedding.shape
        else sizes
    )


def _adapter(
    config: Mapping[str, Any], tensors: tuple[Tensor, ...], parallel: tuple[int, int]
) -> Adapter | None:
    """The LoRA settings, completed from the tensors; None for a whole model, which may have been
    trained with the same settings."""
    if not tensors or not all(".adapter_layer." in tensor.name for tensor in tensors):
        return None
    lora, stated = lora_layout.find(tensors), nemo1_config.adapter(config)
    base = text(config, "restore_from_path")
    found = stated or Adapter(
        None, None, (), base, Path(base).exists() if base else None, variant="not LoRA"
    )
    if lora is None:
        return found
    # Tensor parallelism may split the rank of the adapter, too.
    rank = found.rank or (lora.rank if parallel[0] == 1 else None)
    return dataclasses.replace(
        found, rank=rank, targets=found.targets or lora.targets, variant="LoRA"
    )


def _view(path: Path) -> str:
    return (
        "a view of the NeMo 2.0 checkpoint "
        f"{shown(path / str(read_json(path / VIEW).get('view_of')))}"
    )


def _tokenizer(config: Mapping[str, Any]) -> str | None:
    described = nemo1_config.tokenizer(config)
    folder = text(section(config, "tokenizer"), "type")
    count = tokenizer_files.vocabulary(Path(folder)) if folder and Path(folder).is_dir() else None
    return f"{described}, {count:,} tokens" if count else described
