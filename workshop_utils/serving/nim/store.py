"""The store of adapters that NIM reads: ``<store>/<name>/`` holds one ``.nemo``, or what PEFT
writes. The name is the model's id."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workshop_utils.adapters.adapter import NAME, NAME_RULE
from workshop_utils.adapters.base_id import same_base
from workshop_utils.adapters.read import find_adapter
from workshop_utils.adapters.rules import ANY_RANK, READERS, Severity, check
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.lora_layout import PEFT_CONFIG, parse
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import (
    CheckpointError,
    ConformanceFailed,
    UnsupportedAdapter,
    WorkshopError,
)
from workshop_utils.core.paths import shown

MAX_RANK = READERS["nim1"].usual
"""``NIM_MAX_LORA_RANK`` where nothing else is known: that of a published profile of NIM 1.x."""
_PEFT_FILES = (PEFT_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
#: Layers whose input is the hidden state.
_READ_HIDDEN = {
    "attention_qkv", "mlp_fc1", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"
}  # fmt: skip


@dataclass(frozen=True)
class Staged:
    """An adapter in a store. ``change`` says what was done to the store; ``warnings`` say what a
    server may refuse or answer wrongly, and the fix; ``notes`` what was not compared, and what else
    to know of the adapter and of that NIM.
    """

    path: Path
    name: str
    change: Literal["added", "replaced", "unchanged"]
    rank: int | None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stage(
    adapter: Path | str,
    name: str,
    store: Path | str,
    base: Path | str | None = None,
    max_rank: int = MAX_RANK,
    reader: Literal["nim1", "nim2"] = "nim1",
    trust: bool = False,
) -> Staged:
    """Put ``adapter`` into ``store`` as ``name``, in place of an older one; an identical one is
    left alone.

    The new directory is written under a hidden name and renamed when it is whole, so that a server
    that reads the store meanwhile finds the older adapter or the new one.

    Args:
        adapter: a PEFT directory, or a ``.nemo`` as NeMo wrote it, or its directory.
        name: the model's id in the API.
        base: the model that will be served, a directory or its id; a warning where the adapter's
            own base is another, or the dtype of the directory's weights. Without it the bases that
            the other adapters of the store record are compared: one NIM has one.
        max_rank: ``NIM_MAX_LORA_RANK`` of the server; a warning when the adapter's rank is above
            it.
        reader: whose rules: those of NIM 1.x or 2.x (see :mod:`workshop_utils.adapters.rules`).
        trust: what is unsound in the adapter is printed and not raised.

    Raises:
        CheckpointError: the adapter is missing, unsafe or damaged.
        ConformanceFailed: NIM cannot read it; the message has the command that converts it.
        UnsupportedAdapter: its sizes are not those of ``base``.
        WorkshopError: ``name`` cannot be a model's id, or something else is in its place.
    """
    adapter, store = find_adapter(adapter), Path(store)
    target = _place(name, store)
    if nemo2.looks_like(adapter):  # no server takes one, sound or not
        _require_readable(adapter, reader)
    require_sound(adapter, trust)
    described, warnings, notes = _require_readable(adapter, reader)
    rank = described.adapter.rank if described.adapter else None
    if rank and rank > max_rank:
        warnings.append(
            f"rank {rank} is above NIM_MAX_LORA_RANK={max_rank}: the server will refuse it. Start "
            f"it with --max-lora-rank {rank}."
        )
    if base:
        warnings += _compare_with_base(described, base)
    else:
        others = {other: its for other, its in _bases(store).items() if other != name}
        trained = _recorded(described)
        if not trained or not others:
            last = _last(trained)
            notes += (f"it was trained on {last}; not compared with the NIM's model: give --base",)
        elif other := next((its for its in others if not same_base(others[its], trained)), None):
            warnings.append(
                f"it was trained on {_last(trained)}, but {other} in this store on "
                f"{_last(others[other])}: are these the same weights? A NIM serves the adapters of "
                "one base."
            )
    warnings = tuple(warnings)
    files = _files(described.path, name)
    existed = target.exists()
    if existed and _same(target, files):
        return Staged(target, name, "unchanged", rank, warnings, notes)
    if existed and adapter.resolve().is_relative_to(target.resolve()):
        raise WorkshopError(
            f"{shown(adapter)} is the adapter in the store itself. Stage it from where it was "
            "exported to."
        )
    with paths.new_directory(target) as part:
        for copied, source in files.items():
            shutil.copyfile(source, part / copied)
    return Staged(target, name, "replaced" if existed else "added", rank, warnings, notes)


def names(store: Path | str) -> list[str]:
    """The adapters in ``store``, by name."""
    store = Path(store)
    return (
        sorted(path.name for path in store.iterdir() if path.is_dir() and NAME.fullmatch(path.name))
        if store.is_dir()
        else []
    )


def _place(name: str, store: Path) -> Path:
    """The directory of the adapter ``name``, once nothing else is in its place."""
    target, fault = store / name, ""
    if not NAME.fullmatch(name):
        fault = f"{name!r} cannot be a model's id in a store: {NAME_RULE}"
    elif store.exists() and not store.is_dir():
        fault = f"{shown(store)} is a file; the store is a directory"
    elif store.is_dir() and (any(store.glob("*.nemo")) or (store / PEFT_CONFIG).exists()):
        fault = (
            f"{shown(store)} is itself an adapter. A store has a directory for each: give the one "
            "above"
        )
    elif target.exists() and not target.is_dir():
        fault = f"{shown(target)} is a file, where the directory of the adapter would go"
    elif target.exists():
        files = [file.name for file in target.iterdir() if file.suffix != ".nemo"]
        if foreign := set(files) - set(_PEFT_FILES):
            fault = (
                f"{shown(target)} holds {min(foreign)!r}, which is no part of an adapter: it is "
                "not replaced. Move it away"
            )
    if fault:
        raise WorkshopError(f"{fault}.")
    return target


def _require_readable(adapter: Path, reader: str) -> tuple[Checkpoint, list[str], tuple[str, ...]]:
    """The description of ``adapter`` once it breaks no rule of ``reader``, what is not known of it,
    and what else to know; its rank is only warned about."""
    result = check(adapter, reader, ANY_RANK, copied=True)
    if broken := result.broken:
        lines = [f"NIM ({reader}) cannot serve {shown(adapter)}; the store was not changed."]
        lines += [f"  {its.rule}: {its.fault}\n    fix: {its.fix}" for its in broken]
        raise ConformanceFailed("\n".join(lines))
    unknown = [f"not known: {its.fault}; {its.fix}" for its in result.of(Severity.NOT_KNOWN)]
    notes = [
        ": ".join(filter(None, (its.fault, its.fix)))
        for its in result.of(Severity.NOTE)
        if its.code != "base"
    ]
    return identify(adapter), unknown, (*READERS[reader].modes, *notes)


def _compare_with_base(adapter: Checkpoint, base: Path | str) -> list[str]:
    """Warnings. Other names are one, since one model has many; other sizes never work."""
    warnings, trained = [], _recorded(adapter)
    served = os.path.abspath(base) if Path(base).is_dir() else str(base)
    if (Path(base) / "config.json").is_file():
        model = identify(base)
        _refuse_other_sizes(adapter, model.architecture, Path(base))
        if adapter.dtype != model.dtype:
            warnings.append(
                f"its weights are {adapter.dtype}, those of {shown(base)} {model.dtype}: some "
                f"servers then answer like the base. Export it with --dtype {model.dtype}, or "
                f"serve the base as {adapter.dtype}."
            )
    if not same_base(served, trained):
        warnings.append(
            f"it was trained on {_last(trained)}, and would be served on {_last(served)}: are "
            "these the same weights? On others it answers nonsense."
        )
    return warnings


def _bases(store: Path) -> dict[str, str]:
    """The bases that the adapters in ``store`` record, by name; one that cannot be read records
    none."""
    bases = {}
    for name in names(store):
        with contextlib.suppress(CheckpointError, OSError):
            archives = sorted((store / name).glob("*.nemo"))
            bases[name] = _recorded(identify(archives[0] if archives else store / name))
    return {name: base for name, base in bases.items() if base}


def _recorded(adapter: Checkpoint) -> str:
    return (adapter.adapter.base or "") if adapter.adapter else ""


def _last(base: str) -> str:
    """``base`` in a message: a model's name, not the path to it."""
    return Path(base).name.removesuffix(".nemo") or "a base that it does not name"


def _refuse_other_sizes(adapter: Checkpoint, base: Architecture | None, served: Path) -> None:
    keys = [(key, tensor.shape) for tensor in adapter.tensors if (key := parse(tensor.name))]
    last = max((key.layer for key, _ in keys if key.layer is not None), default=0)
    inputs = {
        shape[1]
        for key, shape in keys
        if key.half == "A" and key.target in _READ_HIDDEN and len(shape) == 2
    }
    if base and (last >= base.layers or inputs - {base.hidden}):
        raise UnsupportedAdapter(
            f"{shown(adapter.path)} is for {last + 1} layers of hidden size "
            f"{', '.join(map(str, sorted(inputs)))}; {shown(served)} has {base.layers} layers of "
            f"hidden size {base.hidden}. Serve it on the model that it was trained on."
        )


def _files(source: Path, name: str) -> dict[str, Path]:
    if source.is_file():
        return {f"{name}.nemo": source}
    return {file: source / file for file in _PEFT_FILES if (source / file).is_file()}


def _same(target: Path, files: dict[str, Path]) -> bool:
    return {file.name for file in target.iterdir()} == set(files) and all(
        filecmp.cmp(source, target / copied, shallow=False) for copied, source in files.items()
    )
