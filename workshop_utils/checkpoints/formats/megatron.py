"""Checkpoints of Megatron-LM and Megatron-Bridge: one directory ``iter_XXXXXXX`` for each save.

    .metadata, metadata.json, *.distcp   sharded weights (torch_dist), as NeMo has them, without a
                                         prefix to the names
    common.pt                            state that is not sharded; of Megatron-LM with ``args``, an
                                         argparse.Namespace (from Megatron-Core 0.19 on an entry of
                                         the index instead)
    run_config.yaml, train_state.pt      of Megatron-Bridge: the configuration, as a tree of
                                         ``_target_`` and arguments
    mp_rank_XX[_XXX]/model_optim_rng.pt  the old form: one file for each tensor-parallel (and
                                         pipeline-parallel) rank

The directory above has ``latest_checkpointed_iteration.txt`` (Megatron-Bridge also
``latest_train_state.pt``). Sources: ``megatron/training/checkpointing.py`` (Megatron-LM) and
``megatron/bridge/training/checkpointing.py`` (Megatron-Bridge 0.5).
"""

import io
import re
from collections.abc import Collection, Mapping
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
from workshop_utils.checkpoints.formats.megatron_layout import EMBEDDING
from workshop_utils.checkpoints.formats.rank_files import (
    MEGATRON_STATE,
    megatron_rank_files,
    parts_note,
)
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
_MARKS = (torch_dist.INDEX, "metadata.json", RUN_CONFIG)
_NOT_OF_THE_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state")


def looks_like(path: Path) -> bool:
    """Whether the directory ``path`` is one save of Megatron's, whole or not."""
    return any((path / name).is_file() for name in _MARKS) or bool(rank_files(path))


def rank_files(path: Path) -> dict[tuple[int, int], str]:
    """(tensor-parallel rank, pipeline-parallel rank) -> name of the file, in the old form."""
    files = path.glob(f"mp_rank_*/{MEGATRON_STATE}")
    return megatron_rank_files(str(file.relative_to(path)) for file in files)


def latest(path: Path) -> Path | None:
    """The save in ``path`` that its tracker names, else the one with the highest number."""
    names = (child for child in path.iterdir() if re.fullmatch(r"iter_\d+|release", child.name))
    saves = sorted(child for child in names if child.is_dir())
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
    if ranks := rank_files(path):
        return _describe_ranks(path, ranks, report)
    backend = read_json(path / "metadata.json") if (path / "metadata.json").is_file() else {}
    name, notes = str(backend.get("sharded_backend", "torch_dist")), []
    if name == "zarr":
        raise zarr_directory.unsupported(shown(path))
    index = torch_dist.read_directory(path, report)
    stored, objects, files = index.tensors, index.objects, torch_dist.file_sizes(path)
    tensors = {
        name: tensor for name, tensor in stored.items() if not name.startswith(_NOT_OF_THE_MODEL)
    }
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
    common = {"path": path, "nbytes": sum(files.values()), "tensors": tuple(tensors.values())}
    if lightning.VERSION in state:
        # NeMo 1 saves a training with sharded weights as such a directory too, with Lightning's
        # state in common.pt.
        return Checkpoint(
            kind=Kind.LIGHTNING,
            detail=f"sharded, {name}",
            architecture=None,
            tokenizer=None,
            adapter=None,
            notes=tuple(lightning.notes(state)),
            version=f"Lightning {state[lightning.VERSION]}",
            storage=name,
            **common,
        )
    notes += _state_notes(state)
    if others := len(stored) - len(tensors):
        notes.append(f"{others} tensors of optimizer state beside the weights")
    run, args = _run_config(path), section(state, "args")
    program = "Megatron-Bridge" if run else "Megatron-LM"
    rows = next((held for key, held in tensors.items() if key.endswith(EMBEDDING)), None)
    return Checkpoint(
        kind=Kind.MEGATRON,
        detail=f"{program}, {name}",
        variant=program,
        architecture=_architecture(section(run, "model") or args, tensors, rows),
        tokenizer=_tokenizer(path, section(run, "tokenizer") or args),
        adapter=_adapter(run, tensors),
        notes=(*notes, *foreign_names.note(run, path / RUN_CONFIG)),
        version=_version(name, backend.get("sharded_backend_version"), state),
        storage=name,
        **common,
    )


def read_common(
    path: Path, objects: Mapping[str, StoredObject], report: Report = stop
) -> tuple[Mapping[str, Any], str]:
    """The state that is not sharded, empty where there is none, and what to call its place in
    errors.

    ``objects`` are those of the index of ``path``. Errors and faults as
    :func:`.torch_archive.read_state`.
    """
    file, stored = path / torch_dist.COMMON, objects.get(torch_dist.COMMON_STATE)
    if file.is_file():
        with file.open("rb") as opened:
            return saved_tensors.read_state(opened, shown(file), report), shown(file)
    if not stored:
        return {}, shown(file)
    where = f"{shown(path / stored.file)}: {stored.name}"
    with (path / stored.file).open("rb") as opened:
        opened.seek(stored.start)
        content = opened.read(min(stored.length, MAX_BYTES))
    held = torch_archive.read_state(io.BytesIO(content), where, report)
    if not (isinstance(held, list) and len(held) == 1 and isinstance(held[0], dict)):
        kind = type(held).__name__
        raise DamagedCheckpoint(f"{where} holds a {kind}, not a list of one dictionary.")
    return held[0], where


def _run_config(path: Path) -> Mapping[str, Any]:
    return read_yaml(path / RUN_CONFIG) if (path / RUN_CONFIG).is_file() else {}


def _architecture(
    config: Mapping[str, Any], names: Collection[str], embedding: Tensor | None
) -> Architecture | None:
    rows = embedding.shape[0] if embedding and embedding.shape else None
    family = decoder_config.family_of_target(config.get("_target_"))
    return decoder_config.megatron_core(config, names, rows, family)


def _tokenizer(path: Path, described: Mapping[str, Any]) -> str | None:
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
    checkpoint = state.get("checkpoint_version")
    stated = f", checkpoint version {checkpoint}" if isinstance(checkpoint, int | float) else ""
    return f"{backend}{'' if version is None else f' {version}'}{stated}"


def _state_notes(state: Mapping[str, Any]) -> list[str]:
    iteration = state.get("iteration")
    return [f"saved after iteration {iteration:,}"] if type(iteration) is int else []


def _describe_ranks(path: Path, ranks: Mapping[tuple[int, int], str], report: Report) -> Checkpoint:
    """The old form; names come once for each rank, and the file tells which."""
    sizes = rank_sizes(ranks)
    if sizes[0] * sizes[1] != len(ranks):
        has = f"{shown(path)} has {len(ranks)} parts for parallel sizes {sizes[0]:,} and"
        report(DamagedCheckpoint(f"{has} {sizes[1]:,}: some are missing."))
    tensors: list[Tensor] = []
    state: Mapping[str, Any] = {}
    for part in sorted(ranks.values()):
        try:
            with (path / part).open("rb") as opened:
                state = saved_tensors.read_state(opened, shown(path / part), report)
        except CheckpointError as fault:
            report(fault)
            continue
        models = (key for key in state if isinstance(key, str) and re.fullmatch(r"model\d*", key))
        for key in sorted(models):
            tensors += saved_tensors.tensors(state[key], part)
    args, whole = section(state, "args"), tensors if len(ranks) == 1 else []
    rows = next((tensor for tensor in whole if tensor.name.endswith(EMBEDDING)), None)
    return Checkpoint(
        path=path,
        kind=Kind.MEGATRON,
        detail="Megatron-LM, torch",
        variant="Megatron-LM",
        architecture=_architecture(args, {tensor.name for tensor in whole}, rows),
        nbytes=sum((path / name).stat().st_size for name in ranks.values()),
        tensors=tuple(tensors),
        tokenizer=_tokenizer(path, args),
        adapter=None,
        notes=(f"the old form: {parts_note(len(ranks), sizes)}", *_state_notes(state)),
        version=_version("torch", None, state),
        storage="torch",
        parallel=sizes,
    )
