"""The files beside the weights: backend, state that is not sharded, tokenizer, what configurations
would import, leftovers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import nemo2, safe_text, tokenizer_files
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core.errors import CheckpointError, UnsafeCheckpoint
from workshop_utils.core.paths import shown

_BACKENDS = {"sharded": [("torch_dist", 1)], "common": [("torch", 1)]}
_LEFTOVERS = ("*-unfinished", "*.partial", "*.incomplete", "*.tmp")


def check_backend(report: Report, weights: Path) -> None:
    """``metadata.json`` names a backend and version that is known, for both halves of the state."""
    try:
        stated = safe_text.read_json(weights / "metadata.json")
    except CheckpointError as error:
        report.add(error)
        return
    for half, known in _BACKENDS.items():
        found = stated.get(f"{half}_backend"), stated.get(f"{half}_backend_version")
        if half == "common" and found == (None, None):
            # Megatron-Core 0.19 has no such backend: that state is in the index
            # (:data:`.torch_dist.COMMON_STATE`)
            continue
        if found not in known:
            wanted = " or ".join(f"{name} {version}" for name, version in known)
            report.damaged(
                f"{shown(weights / 'metadata.json')}: the {half} backend is {found[0]!r} "
                f"{found[1]!r}; known are {wanted}."
            )
    report.checked.append("metadata.json names a known backend and version")
    if (weights / "integrity.json").is_file():
        report.untold.append(
            "whether the files have the digests in integrity.json, which Megatron-Core wrote: "
            "they are not compared here"
        )


def check_targets(report: Report, file: Path | str, tree: Mapping[str, Any]) -> None:
    """Nothing that ``tree``, the content of ``file``, names for import is outside what a genuine
    checkpoint of NeMo names."""
    for place, value in safe_text.foreign_targets(tree):
        report.add(
            UnsafeCheckpoint(
                f"{shown(file)}: {place} names {value!r}, which is not on the list of what a "
                "model of NeMo needs and what does no harm; loading it would import, call or "
                "unpickle that. Nothing was executed. Load it only if you know why it is there."
            )
        )
    report.checked.append(
        f"{Path(file).name} names only classes and functions on the list of those that do no harm"
    )


def check_tokenizer(report: Report, context: Path, model: Mapping[str, Any]) -> None:
    """The tokenizer that ``model.yaml`` names lies in ``context``, when it is no name on the
    Hub."""
    name = nemo2.tokenizer_name(model)
    if name is None:
        report.untold.append("whether its tokenizer is there: context/model.yaml names none")
        return
    found = context / name
    if not found.resolve().is_relative_to(context.resolve()):
        report.note(f"the tokenizer is {name}, outside the checkpoint.")
    elif found.is_file() or (found.is_dir() and tokenizer_files.is_one(found)):
        report.checked.append("the tokenizer is there")
    elif found.exists() or name.startswith(".") or "/" not in name:
        report.damaged(
            f"{shown(found)} is missing or holds no tokenizer; context/model.yaml names it. Copy "
            "the checkpoint again."
        )
    else:
        report.note(f"the tokenizer is {name} on the Hub; it is not part of the checkpoint.")


def note_leftovers(report: Report, path: Path, weights: Path, named: set[str]) -> None:
    """Notes on what a program left behind that was stopped, and on files of weights that the index
    never names."""
    if not path.is_dir():
        return
    for pattern in _LEFTOVERS:
        for file in path.rglob(pattern):
            report.note(f"{shown(file)} is left over from a program that was stopped.")
    for file in sorted(weights.glob("*.distcp")):
        if file.name not in named:
            report.note(f"{shown(file)} is named by no entry of the index; nothing reads it.")
