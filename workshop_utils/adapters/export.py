"""One export from start to end: read, write beside the place it goes to, check, then give it its
name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workshop_utils.adapters import merge, write_peft
from workshop_utils.adapters.adapter import NAME, NAME_RULE, LoraAdapter
from workshop_utils.adapters.base_id import base_id, local_model, of_directory
from workshop_utils.adapters.check import check_export
from workshop_utils.adapters.model_card import model_card
from workshop_utils.adapters.modules import fused, of_dtype, separated
from workshop_utils.adapters.proof import BY_OTHERS, OURS, prove
from workshop_utils.adapters.read import find_adapter, read_adapter
from workshop_utils.adapters.record import FILE, Record, make_record
from workshop_utils.adapters.rules import rank_notes
from workshop_utils.adapters.write_nemo1 import refuse_for_trtllm, write_nemo
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.lora_layout import PEFT_CONFIG
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.formats.tensor import DTYPES
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import (
    CheckpointError,
    ConformanceFailed,
    OutputExists,
    UnsupportedAdapter,
    WorkshopError,
)
from workshop_utils.core.paths import shown

TARGETS = ("nemo", "hf-peft", "hf-merged", "nemo2-merged")
ELSEWHERE = "Choose another --out"
_CARD = "README.md"
_PEFT_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|workshop_export\.json|README\.md"
)
_MERGED_FILES = re.compile(
    r"model[\w-]*\.safetensors|[\w.-]+\.(json|txt|model|jinja)|README\.md|context|weights"
)
_YES = "proven: "
_PROVEN = re.compile(rf"^Proof: ({_YES}.*)$", re.MULTILINE)
_BASES = {"hf-merged": Kind.HUGGINGFACE, "nemo2-merged": Kind.NEMO2}


@dataclass(frozen=True)
class Export:
    """What an export made. ``path`` is the ``.nemo`` or the directory; ``rules`` are the reader's
    rules it keeps, ``notes`` to know. ``proof`` says how it was ``proven`` to compute, on the base,
    what the trained adapter does, or why that is not proven."""

    path: Path
    files: tuple[Path, ...]
    record: Record
    rules: tuple[str, ...]
    reused: bool
    notes: tuple[str, ...] = ()
    proven: bool = False
    proof: str = ""


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
    base: Path | None
    elsewhere: str
    accept: Callable[[Path], None] | None
    proof_base: Path | str

    def write(self, part: Path) -> None:
        """The files of the export at ``part``, a file or an empty directory."""
        to = self.record.to
        if to == "nemo":
            write_nemo(self.adapter, part, self.record)
            return
        if to == "hf-peft":
            write_peft.write_hf_peft(self.adapter, part, self.record)
        elif to == "hf-merged":
            merge.merge_huggingface(self.adapter, self.base, part, self.record.dtype)
        else:
            merge.merge_nemo2(self.adapter, self.base, part)
        text = json.dumps(self.record.as_dict(), indent=2)
        (part / FILE).write_text(text + "\n", encoding="utf-8")

    def rules(self, path: Path) -> list[str]:
        """The rules that the export at ``path`` keeps; without ``check`` only ``accept`` looks."""
        kept = check_export(path, self.read, self.record, self.base) if self.check else []
        if self.accept:
            self.accept(path)
        return kept

    def reusable(self, target: Path) -> list[str] | None:
        """The rules kept by an existing export of the same adapter in the same form; None when a
        new one is to be written.

        Raises:
            OutputExists: something else is there, or that export no longer passes its checks, and
                ``overwrite`` is not set.
        """
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return None
        try:
            return self.rules(target) if self.record.is_that_of(target) else None
        except (WorkshopError, OSError, ValueError) as error:
            if self.overwrite:
                return None
            raise OutputExists(
                f"{shown(target)} exists. {error} {self.elsewhere}, or replace it with --overwrite."
            ) from error

    def run(self, target: Path) -> Export:
        self.refuse_place(target)
        is_file = self.record.to == "nemo"
        card = target.with_suffix(".md") if is_file else target / _CARD
        kept = self.reusable(target)
        reused = kept is not None
        if reused:
            before = _PROVEN.search(card.read_text(encoding="utf-8")) if card.is_file() else None
            proof = before[1] if before else self.prove(target)
            if self.results or not card.is_file() or (proof.startswith(_YES) and not before):
                paths.write_text(card, self.card(proof))
        elif is_file:
            with paths.new_file(card) as new_card, paths.new_file(target) as part:
                self.write(part)
                kept, proof = self.rules(part), self.prove(part)
                new_card.write_text(self.card(proof), encoding="utf-8")
        else:
            with paths.new_directory(target) as part:
                self.write(part)
                kept, proof = self.rules(part), self.prove(part)
                (part / _CARD).write_text(self.card(proof), encoding="utf-8")
        files = (target, card) if is_file else sorted(f for f in target.rglob("*") if f.is_file())
        notes = self.adapter.notes
        if self.record.for_servers:
            notes += tuple(rank_notes(self.record.rank, self.record.to))
        proven = proof.startswith(_YES)
        return Export(target, tuple(files), self.record, tuple(kept), reused, notes, proven, proof)

    def card(self, proof: str) -> str:
        return model_card(self.adapter, self.record, self.name, self.results, proof)

    def prove(self, path: Path) -> str:
        """How the export at ``path`` was proven, or why it was not. Raises
        :class:`ConformanceFailed` where the proof fails."""
        if not self.check or isinstance(self.proof_base, str):
            asked = "it was not checked, as you asked"
            return f"not proven: {self.proof_base if self.check else asked}"
        try:
            with paths.temporary_directory("workshop-proof-") as folder:
                # Its own name says that it is not finished, which readers refuse.
                link = folder / (f"{self.name}.nemo" if path.is_file() else self.name)
                link.symlink_to(path.resolve())
                made = prove(self.read.source, {self.record.to: link}, self.proof_base)
        except (CheckpointError, UnsupportedAdapter) as error:
            return f"not proven: {error}"
        (form,) = made.forms
        if form.proven is False:
            why = form.not_checked or f"its logits differ by up to {form.logits:.2g}"
            raise ConformanceFailed(
                f"The export does not compute what was trained ({form.reader}): {why}, so it is "
                "not used."
            )
        if not form.proven:
            return f"not proven: {form.not_checked}"
        figures = (
            f"read by {form.reader}, its logits differ from the trained adapter's (read by "
            f"{made.trained_by}) by {form.logits:.1e} at most, where that moves one by "
            f"{made.effect:.2g}"
        )
        if made.trained_by == OURS or form.reader not in BY_OTHERS:
            side = "the trained adapter" if made.trained_by == OURS else "the export"
            return f"not proven: nobody else's code reads {side} here; {figures}"
        return f"{_YES}{figures}"

    def refuse_place(self, target: Path) -> None:
        """Raise :class:`OutputExists` where ``target`` would cover the source or the base, or
        something that no export wrote, overwrite or not: a whole directory is replaced."""
        fault, source = "", self.read.source.resolve()
        if self.record.to == "nemo":
            if target.is_dir():
                fault = f"{shown(target)} is a directory"
        elif target.exists() and not target.is_dir():
            fault = f"{shown(target)} is a file; this export is a directory"
        elif target.exists():
            merged = (target / FILE).is_file() and not (target / PEFT_CONFIG).exists()
            known = _MERGED_FILES if merged else _PEFT_FILES
            foreign = [file.name for file in target.iterdir() if not known.fullmatch(file.name)]
            if foreign:
                fault = (
                    f"{shown(target)} holds {min(foreign)!r}, which no export wrote: it is not "
                    "replaced"
                )
            elif self.base and self.base.resolve() == target.resolve():
                fault = f"{shown(target)} is the base itself"
        if not fault and target.exists() and source.is_relative_to(target.resolve()):
            fault = f"{shown(target)} is, or holds, the adapter that is exported"
        if fault:
            raise OutputExists(f"{fault}. {self.elsewhere}.")


def export_adapter(
    adapter: Path | str,
    to: Literal["nemo", "hf-peft", "hf-merged", "nemo2-merged"],
    out: Path | str | None = None,
    reader: Literal["nemo", "trtllm"] = "nemo",
    base_model: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    results: Mapping[str, float | str] | None = None,
    trust: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    check: bool = True,
    accept: Callable[[Path], None] | None = None,
    elsewhere: str = ELSEWHERE,
) -> Export:
    """Export ``adapter`` and say all that there is to say about it.

    The result is checked against the rules of its reader before it gets its name, and a model card
    is written with it. An export that was already made from the identical adapter is checked and
    reused.

    Args:
        adapter: a ``.nemo`` or ``.ckpt`` of NeMo's script path, a run directory that holds exactly
            one ``.nemo``, an adapter directory of NeMo 2.0 (LoRA, DoRA, CanonicalLoRA), or a PEFT
            directory (LoRA, DoRA).
        to: the form.
        out: where; by default ``runs/exports/NAME/{trtllm,nemo}/NAME.nemo`` or
            ``runs/exports/NAME/TO``.
        reader: whose ``.nemo``: ``"nemo"`` (rows interleaved, as NeMo trains and writes it: for
            NeMo and NIM 1.x) or ``"trtllm"`` (rows Q|K|V, alpha baked in: for TensorRT-LLM).
        base_model: the base's id to record; by default the name in the adapter's configuration. Or
            its directory: needed for merging (a Hugging Face model or a NeMo 2.0 checkpoint), and
            for a ``.nemo`` of a PEFT adapter, which does not tell the base's heads.
        name: the adapter's name; by default the file's.
        overwrite: replace an export of another adapter, or a spoilt one. A directory with other
            files is never replaced.
        results: measured figures by name, for the model card.
        dtype: of the adapter's tensors, or of the merged Hugging Face model; by default they keep
            theirs.
        check: check the result before it gets its name.
        trust: what :func:`workshop_utils.checkpoints.verify.verify.require_sound` finds wrong with
            ``adapter`` is printed and not raised.
        accept: gets the export before it has its name, or the one that is to be reused, and raises
            a WorkshopError to refuse it.
        elsewhere: what to do where something else stands in its place.

    Raises:
        NotACheckpoint, UnsafeCheckpoint, DamagedCheckpoint: see
            :func:`workshop_utils.adapters.read.read_adapter`.
        UnsupportedAdapter: the form cannot hold this adapter; the message names one that can.
        OutputExists: something else is where the export would go.
        ConformanceFailed: what was written breaks a rule of its reader. It was not kept.
    """
    if to not in TARGETS or reader not in ("nemo", "trtllm") or dtype not in (None, *DTYPES):
        raise WorkshopError(
            f"Cannot export to {to!r} for reader {reader!r} as {dtype!r}: to is one of "
            f"{', '.join(TARGETS)}, reader is nemo or trtllm, dtype one of {', '.join(DTYPES)}."
        )
    if to == "nemo2-merged" and dtype:
        raise WorkshopError(
            "A merged NeMo 2.0 checkpoint keeps its base's dtype. To change it: workshop convert "
            "MERGED OUT --to nemo2 --dtype ..."
        )
    source = find_adapter(adapter)
    require_sound(source, trust)
    base = None
    if to in _BASES:
        base = merge.base_directory(base_model, to)
        require_sound(base, trust, (_BASES[to],))
    elif base_model and Path(base_model).is_dir():
        base = Path(base_model)
    lora = read_adapter(source, base)
    name = name or _default_name(source)
    if not NAME.fullmatch(name):
        raise WorkshopError(f"{name!r} cannot name an export: use {NAME_RULE}.")
    if to == "nemo" and reader == "trtllm":
        refuse_for_trtllm(lora)
    written = fused(lora) if to == "nemo" else separated(lora)
    if dtype and to not in _BASES:
        written = of_dtype(written, dtype)
    recorded = of_directory(base, lora.base) if base else base_id(base_model or lora.base)
    record = make_record(written, to, reader if to == "nemo" else None, recorded, dtype)
    folder = paths.runs_dir() / "exports" / name
    if to != "nemo":
        target = Path(out or folder / to)
    elif str(out).endswith(".nemo"):
        target = Path(out)
    else:
        target = Path(out or folder / reader) / f"{name}.nemo"
    return _Job(
        lora, written, record, name, overwrite, results, check, base, elsewhere, accept,
        _base_of_proof(base, record.base, lora.base),
    ).run(target)  # fmt: skip


def _base_of_proof(given: Path | None, recorded: str, trained_on: str) -> Path | str:
    """The Hugging Face model that the adapter is for, where it is at hand and fits into memory
    twice, in single precision; or why there is none."""
    import psutil

    places = (given, local_model(recorded), Path(trained_on) if trained_on else None)
    base = next((each for each in places if each and (each / "config.json").is_file()), None)
    if base is None:
        return "the base is not at hand: give its Hugging Face directory with --base DIR"
    need, free = 8 * identify(base).parameters, psutil.virtual_memory().available
    if need > free:
        return (
            f"{shown(base)} takes {need / 1e9:.0f} GB of memory for that, and {free / 1e9:.0f} GB "
            "are free"
        )
    return base


def _default_name(source: Path) -> str:
    """The name of the file or directory; for ``NAME/checkpoints/...`` and for the forms of an
    earlier export, that of the run."""
    above = source.resolve().parent
    if above.name == "checkpoints" and source.suffix != ".nemo":
        return above.parent.name
    if source.is_dir():
        return above.name if source.name == "hf-peft" else source.name
    return source.stem


def export(
    adapter: Path | str,
    to: Literal["nemo", "hf-peft", "hf-merged", "nemo2-merged"],
    out: Path | str | None = None,
    **options: Any,
) -> Path:
    """The path of what :func:`export_adapter` makes of ``adapter``: a ``.nemo`` (``to="nemo"``) or
    a directory (PEFT adapter or merged model). The ``options`` are the same."""
    return export_adapter(adapter, to, out, **options).path
