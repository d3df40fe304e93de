"""One export from start to end: read, write beside the place it goes to, check, then give it its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workshop_utils import paths
from workshop_utils.doctor.verify import require_sound
from workshop_utils.errors import OutputExists, WorkshopError
from workshop_utils.export import hf_peft
from workshop_utils.export.adapter import LoraAdapter, find_adapter, read_adapter
from workshop_utils.export.check import check_hf_peft, check_nemo
from workshop_utils.export.model_card import model_card
from workshop_utils.export.nemo import refuse_for_trtllm, write_nemo
from workshop_utils.export.record import Record, make_record
from workshop_utils.formats import nemo_archive
from workshop_utils.paths import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CARD = "README.md"
_PEFT_FILES = {hf_peft.CONFIG, hf_peft.WEIGHTS, hf_peft.RECORD, _CARD}


@dataclass(frozen=True)
class Export:
    """What an export made. ``path`` is the ``.nemo`` or the PEFT directory; ``rules`` are the reader's rules it keeps."""

    path: Path
    files: tuple[Path, ...]
    record: Record
    rules: tuple[str, ...]
    reused: bool


def export_adapter(
    adapter: Path | str,
    to: str,
    out: Path | str | None = None,
    reader: str = "trtllm",
    base_model: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    results: Mapping[str, float | str] | None = None,
    trust: bool = False,
) -> Export:
    """The same as :func:`workshop_utils.export.export`, with everything there is to say about what was made."""
    if to not in ("nemo", "hf-peft") or reader not in ("trtllm", "nemo"):
        raise WorkshopError(f"Cannot export to {to!r} for reader {reader!r}: to is nemo or hf-peft, reader is trtllm or nemo.")
    source = find_adapter(adapter)
    require_sound(source, trust)
    lora = read_adapter(source)
    name = name or lora.source.stem
    if not _NAME.fullmatch(name):
        raise WorkshopError(
            f"{name!r} cannot name an export: use letters, digits, '.', '_' and '-'; start with a letter or digit."
        )
    record = make_record(lora, to, reader if to == "nemo" else None, base_model or lora.base)
    if to == "nemo":
        return _to_nemo(lora, record, _nemo_target(name, reader, out), name, overwrite, results)
    target = Path(out) if out else paths.runs_dir() / "exports" / name / "hf-peft"
    return _to_hf_peft(lora, record, target, name, overwrite, results)


def _nemo_target(name: str, reader: str, out: Path | str | None) -> Path:
    if out is None:
        return paths.runs_dir() / "exports" / name / reader / f"{name}.nemo"
    return Path(out) if str(out).endswith(".nemo") else Path(out) / f"{name}.nemo"


def _to_nemo(
    adapter: LoraAdapter, record: Record, target: Path, name: str, overwrite: bool, results: Mapping[str, float | str] | None
) -> Export:
    if record.alpha_baked_in:
        refuse_for_trtllm(adapter)
        _refuse_second_nemo(target)
    _refuse_source(adapter, target)
    card = target.with_suffix(".md")
    kept = _reusable(target, adapter, record, overwrite)
    reused = kept is not None
    if not reused:
        with paths.new_file(card) as new_card, paths.new_file(target) as new_target:
            write_nemo(adapter, new_target, record)
            kept = check_nemo(new_target, adapter, record)
            new_card.write_text(model_card(adapter, record, name, results), encoding="utf-8")
    elif results or not card.exists():
        paths.write_text(card, model_card(adapter, record, name, results))
    return Export(target, (target, card), record, tuple(kept), reused)


def _to_hf_peft(
    adapter: LoraAdapter, record: Record, target: Path, name: str, overwrite: bool, results: Mapping[str, float | str] | None
) -> Export:
    _refuse_foreign_directory(target)
    _refuse_source(adapter, target)
    kept = _reusable(target, adapter, record, overwrite)
    reused = kept is not None
    if not reused:
        with paths.new_directory(target) as part:
            hf_peft.write_hf_peft(adapter, part, record)
            kept = check_hf_peft(part, adapter)
            (part / _CARD).write_text(model_card(adapter, record, name, results), encoding="utf-8")
    elif results or not (target / _CARD).exists():
        paths.write_text(target / _CARD, model_card(adapter, record, name, results))
    files = tuple(sorted(target.iterdir()))
    return Export(target, files, record, tuple(kept), reused)


def _reusable(target: Path, adapter: LoraAdapter, record: Record, overwrite: bool) -> list[str] | None:
    """The rules kept by an existing export of the same adapter in the same form; ``None`` when a new one is to be written.

    Raises:
        OutputExists: something else is there, or that export no longer passes its checks, and ``overwrite`` is not set.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        return _check_existing(target, adapter, record)
    except (WorkshopError, OSError, ValueError) as error:
        if overwrite:
            return None
        raise OutputExists(f"{shown(target)} exists. {error} Choose another --out, or replace it with --overwrite.") from error


def _check_existing(target: Path, adapter: LoraAdapter, record: Record) -> list[str]:
    if record.to == "nemo":
        found = nemo_archive.read_config(target).get("workshop")
    else:
        file = target / hf_peft.RECORD
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if not isinstance(found, dict):
        raise OutputExists("It was not made by this workshop.")
    # The name of the file it was made from and the version that made it do not matter: what it holds is checked below.
    if any(found.get(field) != value for field, value in record.as_dict().items() if field not in ("source", "exporter")):
        raise OutputExists("It was made from another adapter, or for another reader or base.")
    return check_nemo(target, adapter, record) if record.to == "nemo" else check_hf_peft(target, adapter)


def _refuse_second_nemo(target: Path) -> None:
    """NIM takes a directory as one adapter and wants exactly one ``.nemo`` in it."""
    others = [path for path in target.parent.glob("*.nemo") if path.name != target.name]
    if others:
        raise OutputExists(
            f"NIM wants exactly one .nemo a directory, and {shown(others[0])} is there already. Choose another --out."
        )


def _refuse_foreign_directory(target: Path) -> None:
    """A PEFT export replaces its whole directory, so nothing of somebody else's may be in it, overwrite or not."""
    if target.exists() and not target.is_dir():
        raise OutputExists(f"{shown(target)} is a file; an hf-peft export is a directory. Choose another --out.")
    foreign = sorted(path.name for path in target.iterdir() if path.name not in _PEFT_FILES) if target.exists() else []
    if foreign:
        raise OutputExists(
            f"{shown(target)} holds {foreign[0]!r}, which no export wrote: it is not replaced. Choose another --out."
        )


def _refuse_source(adapter: LoraAdapter, target: Path) -> None:
    if target.suffix == ".nemo" and target.is_dir():
        raise OutputExists(f"{shown(target)} is a directory. Choose another --out.")
    if target.exists() and adapter.source.resolve().is_relative_to(target.resolve()):
        raise OutputExists(f"{shown(target)} is, or holds, the adapter that is exported. Choose another --out.")
