"""NeMo 1 checkpoints: a ``.nemo`` archive, or the directory that it unpacks to.

    model_config.yaml                            architecture, tokenizer, LoRA settings
    model_weights.ckpt                           weights of one process (torch.save)
    mp_rank_XX/model_weights.ckpt                the part of each tensor-parallel rank
    tp_rank_XX_pp_rank_XXX/model_weights.ckpt    the part of each tensor- and pipeline-parallel rank
    model_weights/                               sharded weights (torch_dist, or zarr in old files)

Source: ``NLPSaveRestoreConnector`` (``nemo/collections/nlp/parts/nlp_overrides.py``, NeMo 2.4.1).
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import (
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
from workshop_utils.checkpoints.formats.architecture import (
    Architecture,
    number,
    section,
    size,
    text,
)
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.gpt_classes import TITLES
from workshop_utils.checkpoints.formats.megatron_layout import EMBEDDING
from workshop_utils.checkpoints.formats.nemo_archive import CONFIG, WEIGHTS
from workshop_utils.checkpoints.formats.rank_files import parts_note, rank_files
from workshop_utils.checkpoints.formats.rank_files import sizes as rank_sizes
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.core.errors import CheckpointError, DamagedCheckpoint
from workshop_utils.core.paths import shown

SHARDED = "model_weights"
_FOLDER = f"{SHARDED}/"
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
    is_view = not files.are_members and (path / VIEW).is_file()
    view = shown(path / str(read_json(path / VIEW).get("view_of"))) if is_view else None
    adapter = None if is_view else adapter_of(config, tensors, parallel[0])
    if files.are_members:
        kind = Kind.NEMO1_ARCHIVE_ADAPTER if adapter else Kind.NEMO1_ARCHIVE
    else:
        kind = Kind.BRIDGED_VIEW if is_view else Kind.NEMO1_DIRECTORY
    if view:
        notes = (f"a view of the NeMo 2.0 checkpoint {view}", *notes)
    ours = section(config, "workshop")
    if made_for := ours.get("reader"):
        order, baked = ours.get("qkv_order"), ours.get("alpha_baked_in")
        notes += (f"q, k, v rows: {order}; alpha baked in: {baked}",)
    version, weights = text(config, "nemo_version"), {*ranks.values()}
    family = TITLES.get(str(ours.get("family")))
    return Checkpoint(
        path=path,
        kind=kind,
        detail=None,
        architecture=_architecture(config, tensors, parallel[0], family),
        nbytes=sum(sizes[name] for name in sizes if name in weights or name.startswith(_FOLDER)),
        tensors=tensors,
        tokenizer=_tokenizer(config),
        adapter=adapter,
        notes=notes + foreign_names.note(config, files.where(CONFIG)),
        version=f"NeMo {version}" if version is not None else None,
        folder="" if files.are_members or ranks else SHARDED,
        parallel=parallel,
        made_for=str(made_for) if made_for else None,
        storage="torch_dist" if _FOLDER + torch_dist.INDEX in sizes else "torch",
        view_of=view,
    )


def read_config(files: Files) -> dict[str, Any]:
    if files.are_members:
        return nemo_archive.read_config(files.place)
    return safe_text.read_yaml(files.place / CONFIG)


def adapter_of(
    config: Mapping[str, Any], tensors: Sequence[Tensor], width: int = 1
) -> Adapter | None:
    """The LoRA settings, completed from the tensors; None for a whole model, which may have been
    trained with the same settings. ``width`` is the tensor-parallel size of parts."""
    if not tensors or not all(".adapter_layer." in tensor.name for tensor in tensors):
        return None
    lora, base = lora_layout.find(tensors), text(config, "restore_from_path")
    peft = section(config, "peft")
    stated = section(peft, "lora_tuning") if peft.get("peft_scheme") == "lora" else {}
    targets = stated.get("target_modules")
    named = tuple(map(str, targets)) if isinstance(targets, list) else ()
    # Tensor parallelism may split the rank of the adapter, too.
    rank = lora.rank if lora and width == 1 else None
    return Adapter(
        rank=size(stated, "adapter_dim", rank),
        alpha=number(stated, "alpha"),
        targets=named or (lora.targets if lora else ()),
        base=base,
        base_is_here=os.path.exists(base) if base else None,
        variant="LoRA" if lora or stated else "not LoRA",
    )


def _tensors(
    files: Files,
    sizes: Mapping[str, int],
    ranks: Mapping[tuple[int, int], str],
    config: Mapping[str, Any],
    report: Report,
) -> tuple[tuple[Tensor, ...], tuple[int, int], tuple[str, ...]]:
    """The tensors, the sizes of model parallelism of parts that were not merged, and notes."""
    sharded = files.below(SHARDED)
    if WEIGHTS in sizes:
        with files.open(WEIGHTS) as file:
            tensors = saved_tensors.read(file, files.where(WEIGHTS), WEIGHTS, report)
        return tuple(tensors), (1, 1), ()
    if _FOLDER + torch_dist.INDEX in sizes:
        stored = sharded.read_index(report).tensors.values()
        stored = [tensor for tensor in stored if not tensor.name.startswith("optimizer")]
    elif any(name.startswith(_FOLDER) and name.endswith("/.zarray") for name in sizes):
        raise zarr_directory.unsupported(sharded.where())
    elif ranks:
        return _ranks(files, ranks, config, report)
    else:
        raise DamagedCheckpoint(
            f"{shown(files.place)} has no weights: neither {WEIGHTS} nor {SHARDED}/ nor "
            "mp_rank_00/."
        )
    return tuple(_moved(tensor, files) for tensor in stored), (1, 1), ()


def _moved(tensor: Tensor, files: Files) -> Tensor:
    """The files of its chunks as members of the archive; in a directory they are in ``folder``."""
    if not files.are_members:
        return tensor
    chunks = (dataclasses.replace(chunk, file=_FOLDER + chunk.file) for chunk in tensor.chunks)
    return dataclasses.replace(tensor, chunks=tuple(chunks))


def _ranks(
    files: Files, ranks: Mapping[tuple[int, int], str], config: Mapping[str, Any], report: Report
) -> tuple[tuple[Tensor, ...], tuple[int, int], tuple[str, ...]]:
    """The pieces that each rank holds; names come once for each rank, and the file tells which."""
    width, stages = (
        max(there, size(config, f"{name}_model_parallel_size", 1))
        for there, name in zip(rank_sizes(ranks), ("tensor", "pipeline"), strict=True)
    )
    where = shown(files.place)
    if width * stages > MAX_RANKS:
        raise DamagedCheckpoint(
            f"{where} claims parallel sizes {width:,} and {stages:,}; no model has so many parts."
        )
    for rank in itertools.product(range(width), range(stages)):
        if rank not in ranks:
            missing = f"tensor-parallel rank {rank[0]}, pipeline-parallel rank {rank[1]}"
            report(DamagedCheckpoint(f"{where} lacks the part of {missing}."))
    tensors: list[Tensor] = []
    for name in sorted(ranks.values()):
        try:
            with files.open(name) as file:
                tensors += saved_tensors.read(file, files.where(name), name, report)
        except CheckpointError as fault:
            report(fault)
    sizes = width, stages
    return tuple(tensors), sizes, (f"written by {parts_note(len(ranks), sizes)}",)


def _architecture(
    config: Mapping[str, Any], tensors: tuple[Tensor, ...], ranks: int, family: str | None
) -> Architecture | None:
    """``ranks`` is the tensor-parallel size of parts: each has its share of the vocabulary."""
    sizes = nemo1_config.architecture(config, family)
    if sizes is None or sizes.vocabulary:
        return sizes
    tables = (tensor.shape for tensor in tensors if tensor.name.endswith(EMBEDDING))
    rows = next(tables, ())[:1]
    return dataclasses.replace(sizes, vocabulary=ranks * rows[0]) if rows else sizes


def _tokenizer(config: Mapping[str, Any]) -> str | None:
    described = nemo1_config.tokenizer(config)
    folder = text(section(config, "tokenizer"), "type")
    count = tokenizer_files.vocabulary(Path(folder)) if folder and Path(folder).is_dir() else None
    return f"{described}, {count:,} tokens" if count else described
