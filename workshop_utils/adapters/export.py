"""One export from start to end: read, write beside the place it goes to, check, then give it its
name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from workshop_utils.adapters import merge, write_peft
from workshop_utils.adapters.adapter import NAME, NAME_RULE, LoraAdapter
from workshop_utils.adapters.base_id import base_id, of_directory, same_base
from workshop_utils.adapters.check import check_hf_peft, check_merged, check_nemo
from workshop_utils.adapters.model_card import model_card
from workshop_utils.adapters.modules import fused, of_dtype, separated
from workshop_utils.adapters.read import find_adapter, read_adapter
from workshop_utils.adapters.record import Record, make_record
from workshop_utils.adapters.rules.judge import rank_notes
from workshop_utils.adapters.write_nemo1 import refuse_for_trtllm, write_nemo
from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.formats.tensor import DTYPES
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import OutputExists, WorkshopError
from workshop_utils.core.paths import shown

TARGETS = ("nemo", "hf-peft", "hf-merged", "nemo2-merged")
_CARD = "README.md"
ELSEWHERE = "Choose another place"
_PEFT_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|workshop_export\.json|README\.md"
)
_MERGED_FILES = re.compile(
    r"model[\w-]*\.safetensors|[\w.-]+\.(json|txt|model|jinja)|README\.md|context|weights"
)
_BASES = {"hf-merged": Kind.HUGGINGFACE, "nemo2-merged": Kind.NEMO2}


@dataclass(frozen=True)
class Export:
    """What an export made. ``path`` is the ``.nemo`` or the directory; ``rules`` are the reader's
    rules it keeps, ``notes`` to know."""

    path: Path
    files: tuple[Path, ...]
    record: Record
    rules: tuple[str, ...]
    reused: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """The adapter as read and as it is to be written, and what goes with it."""

    read: LoraAdapter
    adapter: LoraAdapter
    record: Record
    name: str
    overwrite: bool
    results: Mapping[str, float | str] | None
    check: bool
    base: Path | None = None
    dtype: str | None = None
    accept: Callable[[Path], None] | None = None

    def card(self) -> str:
        """The model card."""
        return model_card(self.adapter, self.record, self.name, self.results)

    def notes(self) -> tuple[str, ...]:
        """What reading the adapter changed, and what a server has to be started with."""
        return (
            *self.adapter.notes,
            *(rank_notes(self.record.rank, self.record.to) if self.record.for_servers else ()),
        )


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
    dtype: str | None = None,
    check: bool = True,
    accept: Callable[[Path], None] | None = None,
) -> Export:
    """The same as :func:`workshop_utils.adapters.export.export`, with everything there is to say
    about what was made.

    ``accept`` gets the export before it has its name, or the one that is to be reused, and raises a
    WorkshopError to refuse it.
    """
    if to not in TARGETS or reader not in ("trtllm", "nemo") or dtype not in (None, *DTYPES):
        raise WorkshopError(
            f"Cannot export to {to!r} for reader {reader!r} as {dtype!r}: to is one of "
            f"{', '.join(TARGETS)}, reader is trtllm or nemo, dtype one of {', '.join(DTYPES)}."
        )
    if to == "nemo2-merged" and dtype:
        raise WorkshopError(
            "A merged NeMo 2.0 checkpoint keeps its base's dtype. To change it: workshop convert "
            "MERGED OUT --to nemo2 --dtype ..."
        )
    source = find_adapter(adapter)
    require_sound(source, trust)
    base = (
        merge.base_directory(base_model, to)
        if to in _BASES
        else Path(base_model)
        if base_model and Path(base_model).is_dir()
        else None
    )
    if to in _BASES:
        require_sound(base, trust, (_BASES[to],))
    lora = read_adapter(source, base)
    name = name or _default_name(source)
    if not NAME.fullmatch(name):
        raise WorkshopError(f"{name!r} cannot name an export: use {NAME_RULE}.")
    if to == "nemo" and reader == "trtllm":
        refuse_for_trtllm(lora)
    written = fused(lora) if to == "nemo" else separated(lora)
    written = of_dtype(written, dtype) if dtype and to not in _BASES else written
    recorded = of_directory(base, lora.base) if base else base_id(base_model or lora.base)
    record = make_record(written, to, reader if to == "nemo" else None, recorded, dtype)
    job = _Job(lora, written, record, name, overwrite, results, check, base, dtype, accept)
    return (
        _to_nemo(job, _nemo_target(name, reader, out))
        if to == "nemo"
        else _to_directory(job, Path(out) if out else _place(name, to))
    )


def _default_name(source: Path) -> str:
    """The name of the file or directory; for ``NAME/checkpoints/...`` and for the forms of an
    earlier export, that of the run."""
    above = source.resolve().parent
    if above.name == "checkpoints" and source.suffix != ".nemo":
        return above.parent.name
    return (
        above.name
        if source.is_dir() and source.name == "hf-peft"
        else source.name.removesuffix(source.suffix if source.is_file() else "")
    )


def _place(name: str, *form: str) -> Path:
    return paths.runs_dir().joinpath("exports", name, *form)


def _nemo_target(name: str, reader: str, out: Path | str | None) -> Path:
    if out is None:
        return _place(name, reader, f"{name}.nemo")
    return Path(out) if str(out).endswith(".nemo") else Path(out) / f"{name}.nemo"


def _to_nemo(job: _Job, target: Path) -> Export:
    if job.record.alpha_baked_in:
        _refuse_second_nemo(target)
    _refuse_source(job.read, target)
    card = target.with_suffix(".md")
    kept = _reusable(job, target)
    reused = kept is not None
    if not reused:
        with paths.new_file(card) as new_card, paths.new_file(target) as new_target:
            write_nemo(job.adapter, new_target, job.record)
            kept = _kept(job, new_target)
            new_card.write_text(job.card(), encoding="utf-8")
    elif job.results or not card.exists():
        paths.write_text(card, job.card())
    return Export(target, (target, card), job.record, tuple(kept), reused, job.notes())


def _to_directory(job: _Job, target: Path) -> Export:
    """A PEFT adapter or a merged model."""
    _refuse_foreign_directory(target)
    _refuse_source(job.read, target)
    if job.base and target.exists() and (job.base.resolve() == target.resolve()):
        raise OutputExists(f"{shown(target)} is the base itself. {ELSEWHERE}.")
    kept = _reusable(job, target)
    reused = kept is not None
    if not reused:
        with paths.new_directory(target) as part:
            if job.record.to == "hf-peft":
                write_peft.write_hf_peft(job.adapter, part, job.record)
            elif job.record.to == "hf-merged":
                merge.merge_huggingface(job.adapter, job.base, part, job.dtype)
            else:
                merge.merge_nemo2(job.adapter, job.base, part)
            (part / write_peft.RECORD).write_text(
                json.dumps(job.record.as_dict(), indent=2) + "\n", encoding="utf-8"
            )
            kept = _kept(job, part)
            (part / _CARD).write_text(job.card(), encoding="utf-8")
    elif job.results or not (target / _CARD).exists():
        paths.write_text(target / _CARD, job.card())
    files = tuple(sorted(file for file in target.rglob("*") if file.is_file()))
    return Export(target, files, job.record, tuple(kept), reused, job.notes())


def _kept(job: _Job, path: Path) -> list[str]:
    """The rules that the export at ``path`` keeps; without ``check`` only ``accept`` looks."""
    rules = _rules(job, path) if job.check else []
    if job.accept:
        job.accept(path)
    return rules


def _rules(job: _Job, path: Path) -> list[str]:
    if job.record.to == "nemo":
        return check_nemo(path, job.read, job.record)
    return (
        check_hf_peft(path, job.read, job.record)
        if job.record.to == "hf-peft"
        else check_merged(path, job.base, job.read, job.record.to)
    )


def _reusable(job: _Job, target: Path) -> list[str] | None:
    """The rules kept by an existing export of the same adapter in the same form; ``None`` when a
    new one is to be written.

    Raises:
        OutputExists: something else is there, or that export no longer passes its checks, and
            ``overwrite`` is not set.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        return _check_existing(job, target)
    except (WorkshopError, OSError, ValueError) as error:
        if job.overwrite:
            return None
        raise OutputExists(
            f"{shown(target)} exists. {error} {ELSEWHERE}, or replace it with --overwrite."
        ) from error


def _check_existing(job: _Job, target: Path) -> list[str] | None:
    if job.record.to == "nemo":
        found = nemo_archive.read_config(target).get("workshop")
    else:
        file = target / write_peft.RECORD
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if not isinstance(found, dict):
        raise OutputExists("It was not made by this workshop.")
    # The name of the file it was made from and the version that made it do not matter: what it
    # holds is checked below.
    differing = {
        field for field, value in asdict(job.record).items() if found.get(field) != value
    } - {"source", "exporter"}
    if differing == {"base"} and same_base(str(found.get("base") or ""), job.record.base):
        return None  # the same export, but for how it names the base
    if differing:
        raise OutputExists(
            "It was made from another adapter, or for another reader, base or dtype."
        )
    return _kept(job, target)


def _refuse_second_nemo(target: Path) -> None:
    """NIM takes a directory as one adapter and wants exactly one ``.nemo`` in it."""
    others = [path for path in target.parent.glob("*.nemo") if path.name != target.name]
    if others:
        raise OutputExists(
            f"NIM wants exactly one .nemo a directory, and {shown(others[0])} is there already. "
            f"{ELSEWHERE}."
        )


def _refuse_foreign_directory(target: Path) -> None:
    """A whole directory is replaced, so nothing of somebody else's may be in it, overwrite or not:
    only what an export wrote."""
    if target.exists() and not target.is_dir():
        raise OutputExists(f"{shown(target)} is a file; this export is a directory. {ELSEWHERE}.")
    merged = (target / write_peft.RECORD).is_file() and not (target / write_peft.CONFIG).exists()
    known = _MERGED_FILES if merged else _PEFT_FILES
    foreign = (
        sorted(path.name for path in target.iterdir() if not known.fullmatch(path.name))
        if target.exists()
        else []
    )
    if foreign:
        raise OutputExists(
            f"{shown(target)} holds {foreign[0]!r}, which no export wrote: it is not replaced. "
            f"{ELSEWHERE}."
        )


def _refuse_source(adapter: LoraAdapter, target: Path) -> None:
    if target.suffix == ".nemo" and target.is_dir():
        raise OutputExists(f"{shown(target)} is a directory. {ELSEWHERE}.")
    if target.exists() and adapter.source.resolve().is_relative_to(target.resolve()):
        raise OutputExists(
            f"{shown(target)} is, or holds, the adapter that is exported. {ELSEWHERE}."
        )


def export(
    adapter: Path | str,
    to: Literal["nemo", "hf-peft", "hf-merged", "nemo2-merged"],
    out: Path | str | None = None,
    reader: Literal["trtllm", "nemo"] = "trtllm",
    base_model: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    results: Mapping[str, float | str] | None = None,
    trust: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    check: bool = True,
) -> Path:
    """Export ``adapter`` and return the path of the new ``.nemo`` (``to="nemo"``) or directory
    (PEFT adapter or merged model).

    The result is checked against the rules of its reader before it gets its name, and a model card
    is written with it. An export that was already made from the identical adapter is checked and
    reused.

    Args:
        adapter: a ``.nemo`` or ``.ckpt`` of NeMo's script path, a run directory that holds exactly
            one ``.nemo``, an adapter directory of
            NeMo 2.0 (LoRA, DoRA, CanonicalLoRA), or a PEFT directory (LoRA, DoRA).
        to: the form.
        out: where; by default ``runs/exports/NAME/{trtllm,nemo}/NAME.nemo`` or
            ``runs/exports/NAME/TO``.
        reader: whose ``.nemo``: ``"trtllm"`` (rows Q|K|V, alpha baked in) or ``"nemo"``
            (interleaved, as trained).
        base_model: the base's id to record; by default the name in the adapter's configuration. Or
            its directory: needed for merging (a
            Hugging Face model or a NeMo 2.0 checkpoint), and for a ``.nemo`` of a PEFT adapter,
            which does not tell the base's heads.
        name: the adapter's name; by default the file's.
        overwrite: replace an export of another adapter, or a spoilt one. A directory with other
            files is never replaced.
        results: measured figures by name, for the model card.
        dtype: of the adapter's tensors, or of the merged Hugging Face model; by default they keep
            theirs.
        check: judge the result before it gets its name.
        trust: what :func:`workshop_utils.checkpoints.verify.verify.require_sound` finds wrong with
            ``adapter`` is printed and not raised.

    Raises:
        NotACheckpoint, UnsafeCheckpoint, DamagedCheckpoint: see
            :func:`workshop_utils.adapters.read.read_adapter`.
        UnsupportedAdapter: the form cannot hold this adapter; the message names one that can.
        OutputExists: something else is where the export would go.
        ConformanceFailed: what was written breaks a rule of its reader. It was not kept.
    """
    from workshop_utils.adapters.export import export_adapter

    return export_adapter(
        adapter, to, out, reader, base_model, name, overwrite, results, trust, dtype, check
    ).path
