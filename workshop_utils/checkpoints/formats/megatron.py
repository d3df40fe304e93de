"""Checkpoints of Megatron-LM and Megatron-Bridge: one directory ``iter_XXXXXXX`` for each save.

    .metadata, metadata.json, __0_0.distcp...  sharded weights (torch_dist), as NeMo has them,
    without a prefix to the names
    common.pt                                  state that is not sharded; of Megatron-LM with
    ``args``, an argparse.Namespace (from
                                               Megatron-Core 0.19 on an entry of the index instead)
    run_config.yaml, train_state.pt            of Megatron-Bridge: the configuration, as a tree of
    ``_target_`` and arguments
    mp_rank_XX[_XXX]/model_optim_rng.pt        the old form: one file for each tensor-parallel (and
    pipeline-parallel) rank

The directory above has ``latest_checkpointed_iteration.txt`` (Megatron-Bridge also
``latest_train_state.pt``).
Sources: ``megatron/training/checkpointing.py`` (Megatron-LM) and
``megatron/bridge/training/checkpointing.py`` (Megatron-Bridge 0.5).
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import (
    decoder_config,
    foreign_names,
    lightning,
    lora_layout,
    saved_tensors,
    torch_archive,
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
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.rank_files import MEGATRON_STATE, megatron_rank_files
from workshop_utils.checkpoints.formats.rank_files import sizes as rank_sizes
from workshop_utils.checkpoints.formats.restricted_pickle import MAX_BYTES
from workshop_utils.checkpoints.formats.safe_text import read_json, read_yaml
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.formats.torch_dist import StoredObject
from workshop_utils.core.errors import CheckpointError, DamagedCheckpoint
from workshop_utils.core.paths import shown

RUN_CONFIG = "run_config.yaml"
TRACKER = "latest_checkpointed_iteration.txt"


def looks_like(path: Path) -> bool:
    """Whether the directory ``path`` is one save of Megatron's, whole or not."""
    return any(
        (path / name).is_file() for name in (torch_dist.INDEX, "metadata.json", RUN_CONFIG)
    ) or bool(_rank_files(path))


def latest(path: Path) -> Path | None:
    """The latest save in the directory ``path`` of a run: the one that its tracker names, else the
    one with the highest number."""
    saves = sorted(
        child
        for child in path.iterdir()
        if re.fullmatch(r"iter_\d+|release", child.name) and child.is_dir()
    )
    tracker = path / TRACKER
    if tracker.is_file() and tracker.stat().st_size < 100:
        word = tracker.read_text(encoding="utf-8", errors="replace").strip()
        named = path / (f"iter_{int(word):07d}" if word.isdecimal() else "release")
        if named in saves:
            return named
    return saves[-1] if saves else None


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the directory ``path``. A fault of one tensor, or of one rank's file, goes to
    ``report``.

    Raises :class:`DamagedCheckpoint` (a part is missing or broken) and :class:`UnsafeCheckpoint`.
    """
    if ranks := _rank_files(path):
        return _describe_ranks(path, ranks, report)
    backend = read_json(path / "metadata.json") if (path / "metadata.json").is_file() else {}
    name = str(backend.get("sharded_backend", "torch_dist"))
    notes: tuple[str, ...] = ()
    if name == "zarr":
        (stored, files), objects = zarr_directory.read_directory(path, report), {}
        notes += (zarr_directory.WAY_OUT,)
    else:
        index = torch_dist.read_directory(path, report)
        stored, objects, files = index.tensors, index.objects, torch_dist.file_sizes(path)
    tensors = {name: tensor for name, tensor in stored.items() if not _is_optimizer(name)}
    if tensors and all(name.startswith("module.") for name in tensors):
        raise DamagedCheckpoint(
            f"{shown(path)} is the weights/ of a NeMo 2.0 checkpoint without the rest: context/ "
            "with the configuration and the tokenizer is missing beside it. Copy the whole "
            "directory."
        )
    try:
        state, _ = read_common(path, objects, report)
    except CheckpointError as fault:
        report(fault)
        state = {}
    if lightning.VERSION in state:
        return _of_nemo1(path, tensors, state, sum(files.values()), name)
    notes += _state_notes(state)
    if len(stored) > len(tensors):
        notes += (f"{len(stored) - len(tensors)} tensors of optimizer state beside the weights",)
    run, args = _run_config(path), section(state, "args")
    notes += foreign_names.note(run, path / RUN_CONFIG)
    return Checkpoint(
        path=path,
        kind=Kind.MEGATRON,
        detail=f"{'Megatron-Bridge' if run else 'Megatron-LM'}, {name}",
        architecture=_architecture(run, args, tensors),
        nbytes=sum(files.values()),
        tensors=tuple(tensors.values()),
        tokenizer=_tokenizer(path, run, args),
        adapter=_adapter(run, tensors),
        notes=notes,
        version=_version(name, backend.get("sharded_backend_version"), state),
    )


def _is_optimizer(name: str) -> bool:
    return name.startswith(("optimizer.", "chained_", "rng_state", "rerun_state"))


def read_common(
    path: Path, objects: Mapping[str, StoredObject], report: Report = stop
) -> tuple[Mapping[str, Any], str]:
    """The state that is not sharded, empty where there is none, and what to call its place in
    errors.

    ``objects`` are those of the index of ``path``. Errors and faults as
    :func:`.torch_archive.read_state`.
    """
    file, stored = path / torch_dist.COMMON, objects.get(torch_dist.COMMON_STATE)
    if file.is_file() or not stored:
        where = shown(file)
        if not file.is_file():
            return {}, where
        with file.open("rb") as opened:
            return saved_tensors.read_state(opened, where, report), where
    where = f"{shown(path / stored.file)}: {stored.name}"
    with (path / stored.file).open("rb") as opened:
        opened.seek(stored.start)
        content = opened.read(min(stored.length, MAX_BYTES))
    held = torch_archive.read_state(io.BytesIO(content), where, report)
    if not (isinstance(held, list) and len(held) == 1 and isinstance(held[0], dict)):
        raise DamagedCheckpoint(
            f"{where} holds a {type(held).__name__}, not a list of one dictionary."
        )
    return held[0], where


def _run_config(path: Path) -> Mapping[str, Any]:
    return read_yaml(path / RUN_CONFIG) if (path / RUN_CONFIG).is_file() else {}


def _architecture(
    run: Mapping[str, Any], args: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Architecture | None:
    """From run_config.yaml's ``model`` or from the arguments."""
    config = section(run, "model") or args
    embedding = next(
        (
            tensor
            for name, tensor in tensors.items()
            if name.endswith("embedding.word_embeddings.weight")
        ),
        None,
    )
    sizes = decoder_config.megatron_core(
        config, tensors, embedding.shape[0] if embedding and embedding.shape else None
    )
    if sizes is None:
        return None
    experts = {"num_moe_experts": size(config, "num_moe_experts", size(config, "num_experts"))}
    return decoder_config.named(
        sizes, decoder_config.family_of_target(config.get("_target_")), dict(config) | experts
    )


def _tokenizer(path: Path, run: Mapping[str, Any], args: Mapping[str, Any]) -> str | None:
    described = section(run, "tokenizer") or args
    kind = described.get("tokenizer_type")
    name = described.get("tokenizer_model") or described.get("vocab_file")
    here = " (a copy is in tokenizer/)" if (path / "tokenizer").is_dir() else ""
    return f"{kind}: {name}{here}" if isinstance(kind, str) else None


def _adapter(run: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter | None:
    """Megatron-Bridge saves only the adapter's tensors when it trains one."""
    lora = lora_layout.find(tensors.values())
    if lora is None or not all(".adapter." in name for name in tensors):
        return None
    peft, base = section(run, "peft"), text(section(run, "checkpoint"), "pretrained_checkpoint")
    return Adapter(
        rank=lora.rank or size(peft, "dim"),
        alpha=number(peft, "alpha"),
        targets=lora.targets,
        base=base,
        base_is_here=Path(base).exists() if base else None,
        variant="DoRA" if lora.is_dora else "LoRA",
    )


def _version(backend: str, version: Any, state: Mapping[str, Any]) -> str:
    found = f"{backend} {version}" if version is not None else backend
    return (
        f"{found}, checkpoint version {state['checkpoint_version']}"
        if isinstance(state.get("checkpoint_version"), int | float)
        else found
    )


def _state_notes(state: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        (f"saved after iteration {state['iteration']:,}",)
        if type(state.get("iteration")) is int
        else ()
    )


def _of_nemo1(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], nbytes: int, backend: str
) -> Checkpoint:
    """NeMo 1 saves a training with sharded weights as such a directory too, with Lightning's state
    in common.pt."""
    return Checkpoint(
        path=path,
        kind=Kind.LIGHTNING,
        detail=f"sharded, {backend}",
        architecture=None,
        nbytes=nbytes,
        tensors=tuple(tensors.values()),
        tokenizer=None,
        adapter=None,
        notes=tuple(lightning.notes(state)),
        version=f"Lightning {state[lightning.VERSION]}",
    )


def _rank_files(path: Path) -> dict[tuple[int, int], Path]:
    """(tensor-parallel rank, pipeline-parallel rank) -> file, in the old form."""
    names = (str(file.relative_to(path)) for file in path.glob(f"mp_rank_*/{MEGATRON_STATE}"))
    return {rank: path / name for rank, name in megatron_rank_files(names).items()}


def _describe_ranks(
    path: Path, ranks: Mapping[tuple[int, int], Path], report: Report
) -> Checkpoint:
    """The old form: the pieces that each rank holds; names come once for each rank, and the file
    tells which."""
    sizes = rank_sizes(ranks)
    if sizes[0] * sizes[1] != len(ranks):
        report(
            DamagedCheckpoint(
                f"{shown(path)} has {len(ranks)} parts for parallel sizes {sizes[0]:,} and "
                f"{sizes[1]:,}: some are missing."
            )
        )
    tensors: list[Tensor] = []
    state: Mapping[str, Any] = {}
    for _, file in sorted(ranks.items()):
        try:
            with file.open("rb") as opened:
                state = saved_tensors.read_state(opened, shown(file), report)
        except CheckpointError as fault:
            report(fault)
            continue
        part = str(file.relative_to(path))
        for key in sorted(
            key for key in state if isinstance(key, str) and re.fullmatch(r"model\d*", key)
        ):
            tensors += saved_tensors.tensors(state[key], part)
    args = section(state, "args")
    note = (
        f"the old form, one file for each of {len(ranks)} ranks (tensor-parallel size "
        f"{sizes[0]}, pipeline-parallel size {sizes[1]}): shapes are those of the parts, and "
        "what every rank holds is listed and counted for each"
    )
    return Checkpoint(
        path=path,
        kind=Kind.MEGATRON,
        detail="Megatron-LM, torch",
        architecture=_architecture(
            {}, args, {} if len(ranks) > 1 else {tensor.name: tensor for tensor in tensors}
        ),
        nbytes=sum(file.stat().st_size for file in ranks.values()),
        tensors=tuple(tensors),
        tokenizer=_tokenizer(path, {}, args),
        adapter=None,
        notes=(note, *_state_notes(state)),
        version=_version("torch", None, state),
        parallel=sizes,
    )
