"""The files beside the weights: backend, state that is not sharded, tokenizer, what configurations
would import, leftovers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import nemo2, safe_text, tokenizer_files
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core.errors import CheckpointError
from workshop_utils.core.paths import shown

_BACKENDS = {"sharded": [("torch_dist", 1)], "common": [("torch", 1)]}
_LEFTOVERS = ("*-unfinished", "*.partial", "*.incomplete", "*.tmp")


def check_backend(report: Report, weights: Path) -> None:
    """``metadata.json`` names a backend and version that is known, for both halves of the state."""
    file = shown(weights / "metadata.json")
    try:
        stated = safe_text.read_json(weights / "metadata.json")
    except CheckpointError as error:
        report.add(error)
        return
    for half, known in _BACKENDS.items():
        backend = stated.get(f"{half}_backend"), stated.get(f"{half}_backend_version")
        if half == "common" and backend == (None, None):
            # Megatron-Core 0.19 has no such backend: that state is in the index
            # (:data:`.torch_dist.COMMON_STATE`)
            continue
        if backend not in known:
            names = " or ".join(f"{name} {version}" for name, version in known)
            said = f"{backend[0]!r} {backend[1]!r}; known are {names}"
            text = f"{file}: the {half} backend is {said}."
            report.damaged(text, code=Code.BACKEND, file=file)
    report.checked.append("metadata.json names a known backend and version")
    if (weights / "integrity.json").is_file():
        text = "which Megatron-Core wrote: they are not compared here"
        text = f"whether the files have the digests in integrity.json, {text}"
        report.unknown(text, Code.ORIGIN, file=shown(weights / "integrity.json"))


def check_targets(report: Report, file: Path | str, tree: Mapping[str, Any]) -> None:
    """Nothing that ``tree``, the content of ``file``, names for import is outside what a genuine
    checkpoint of NeMo names."""
    for place, value in safe_text.foreign_targets(tree):
        text = (
            f"{shown(file)}: {place} names {value!r}, which is not on the list of what a model of "
            "NeMo needs and what does no harm; loading it would import, call or unpickle that. "
            "Nothing was executed. Load it only if you know why it is there."
        )
        report.damaged(text, code=Code.UNSAFE, file=shown(file))
    report.checked.append(
        f"{Path(file).name} names only classes and functions on the list of those that do no harm"
    )


def check_tokenizer(report: Report, context: Path, model: Mapping[str, Any]) -> None:
    """The tokenizer that ``model.yaml`` names lies in ``context``, when it is no name on the
    Hub."""
    name, source = nemo2.tokenizer_name(model), "context/model.yaml"
    if name is None:
        report.unknown(f"whether its tokenizer is there: {source} names none", Code.TOKENIZER)
        return
    folder = context / name
    if not folder.resolve().is_relative_to(context.resolve()):
        report.note(f"the tokenizer is {name}, outside the checkpoint.", Code.TOKENIZER)
    elif folder.is_file() or (folder.is_dir() and tokenizer_files.is_one(folder)):
        report.checked.append("the tokenizer is there")
    elif folder.exists() or name.startswith(".") or "/" not in name:
        text = f"is missing or holds no tokenizer; {source} names it. Copy the checkpoint again."
        file = shown(folder)
        report.damaged(f"{file} {text}", code=Code.TOKENIZER, file=file, source=source)
    else:
        text = f"the tokenizer is {name} on the Hub; it is not part of the checkpoint."
        report.note(text, Code.TOKENIZER)


def note_leftovers(report: Report, path: Path, weights: Path, named: set[str]) -> None:
    """Notes on what a program left behind that was stopped, and on files of weights that the index
    never names."""
    if not path.is_dir():
        return
    for file in (file for pattern in _LEFTOVERS for file in path.rglob(pattern)):
        text = f"{shown(file)} is left over from a program that was stopped."
        report.note(text, Code.LEFTOVER, file=shown(file))
    for file in sorted(weights.glob("*.distcp")):
        if file.name not in named:
            text = f"{shown(file)} is named by no entry of the index; nothing reads it."
            report.note(text, Code.UNREAD_FILE, file=shown(file))
