"""The tokenizer of a checkpoint: found, and put where the other format looks for it.

Both formats know Hugging Face tokenizers (a directory of files) and SentencePiece (one file,
``*.model``).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.convert.source import Tokenizer
from workshop_utils.checkpoints.formats import huggingface_config, nemo_archive
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.nemo2 import Nemo2Checkpoint
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)
from workshop_utils.core.paths import shown

FOLDER = "nemo_tokenizer"
"""Where NeMo 2.0 keeps the files, below ``context/``; the same name is used in what is written for
NeMo 1."""

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""The files of a Hugging Face tokenizer; nothing else of the directory is taken along."""

_NEMO = "nemo.collections.common.tokenizers"
_CLASSES = {
    "huggingface": f"{_NEMO}.huggingface.auto_tokenizer.AutoTokenizer",
    "sentencepiece": f"{_NEMO}.sentencepiece_tokenizer.SentencePieceTokenizer",
}


def given(path: Path) -> Tokenizer:
    """The tokenizer that a person named: a directory, or a SentencePiece file."""
    path = Path(path)
    if path.is_file() and path.suffix == ".model":
        return Tokenizer("sentencepiece", path.resolve())
    if path.is_dir() and any(
        (path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")
    ):
        return Tokenizer("huggingface", path.resolve())
    raise NotACheckpoint(
        f"{shown(path)} is no tokenizer: give a directory with tokenizer.json, or a "
        "SentencePiece file *.model."
    )


def of_nemo1(config: Mapping[str, Any], place: Path, where: str) -> Tokenizer | None:
    """The tokenizer that the ``model_config.yaml`` of the directory or archive ``place`` names;
    None where it names none that is known.

    Raises :class:`UnsafeCheckpoint` for a name that leads out of the archive.
    """
    described = section(config, "tokenizer")
    library, kind = described.get("library"), described.get("type")
    names = [member.name for member in nemo_archive.members(place)] if place.is_file() else []
    if library == "sentencepiece":
        return _sentencepiece(described, place, names, where)
    if library != "huggingface" or not isinstance(kind, str):
        return None
    own = (name for name in names if name.startswith(f"{FOLDER}/") and name.count("/") == 1)
    members = {name: name.partition("/")[2] for name in own}
    use_fast = described.get("use_fast", True) is not False
    if members:
        return Tokenizer("huggingface", archive=place, members=members, use_fast=use_fast)
    beside = (place / FOLDER).resolve()
    for path in (Path(kind), beside if place.is_dir() else Path()):
        if path.is_absolute() and path.is_dir():
            return Tokenizer("huggingface", path, use_fast=use_fast)
    return Tokenizer("huggingface", hub=kind, use_fast=use_fast)


def _sentencepiece(
    described: Mapping[str, Any], place: Path, names: list[str], where: str
) -> Tokenizer | None:
    value, legacy = described.get("model"), described.get("sentencepiece_legacy", False) is True
    if not isinstance(value, str):
        return None
    # "nemo:" marks a file that NeMo packed with the model.
    name = value.removeprefix("nemo:")
    if place.is_file() and name in names:
        members = {name: "tokenizer.model"}
        return Tokenizer("sentencepiece", archive=place, members=members, legacy=legacy)
    path = Path(name)
    if place.is_dir() and not path.is_absolute():
        path = Path(os.path.normpath(place / name))
        if not path.is_relative_to(place):
            raise UnsafeCheckpoint(
                f"{where}: tokenizer.model is {value!r}, outside the checkpoint."
            )
    if path.is_absolute() and path.is_file():
        return Tokenizer("sentencepiece", path, legacy=legacy)
    return None


def of_nemo2(checkpoint: Nemo2Checkpoint, where: str) -> Tokenizer:
    """The tokenizer that ``context/model.yaml`` names; ``where`` names that file in errors."""
    described = section(checkpoint.model, "tokenizer")
    target = described.get("_target_")
    if target == _CLASSES["huggingface"]:
        name = _file_field(checkpoint, where, "pretrained_model_name", hub_allowed=True)
        place = {"path": Path(name)} if os.path.isabs(name) else {"hub": name}
        use_fast = described.get("use_fast", True) is not False
        return Tokenizer("huggingface", **place, use_fast=use_fast)
    if target == _CLASSES["sentencepiece"]:
        path = Path(_file_field(checkpoint, where, "model_path"))
        return Tokenizer("sentencepiece", path, legacy=described.get("legacy", False) is True)
    if isinstance(target, str) and not target.startswith("nemo."):
        raise UnsafeCheckpoint(
            f"{where}: tokenizer._target_ names {target!r}, which is not NeMo's. Nothing was "
            "executed."
        )
    raise UnsupportedCheckpoint(
        f"{where}: tokenizer._target_ is {target!r}; NeMo's AutoTokenizer and "
        "SentencePieceTokenizer are supported."
    )


def _file_field(
    checkpoint: Nemo2Checkpoint, where: str, field: str, hub_allowed: bool = False
) -> str:
    """Absolute path of what ``tokenizer.<field>`` names, or the name of a repository on the Hub."""
    value = checkpoint.model["tokenizer"].get(field)
    if isinstance(value, dict):
        # NeMo's wrapper around a string that was no path when the checkpoint was written.
        value = value.get("attr")
    if not isinstance(value, str) or not value:
        raise DamagedCheckpoint(f"{where}: tokenizer.{field} is missing.")
    context = checkpoint.path / "context"
    path = os.path.normpath(context / value)
    if not os.path.isabs(value) and not Path(path).is_relative_to(context):
        raise UnsafeCheckpoint(f"{where}: tokenizer.{field} is {value!r}, outside the checkpoint.")
    if os.path.exists(path):
        return path
    if hub_allowed and re.fullmatch(rf"(?!{FOLDER})[^/]+/[^/]*", value):
        return value
    raise DamagedCheckpoint(
        f"{where}: tokenizer.{field} is {value!r}, and there is no such file. Copy the whole "
        "context/ directory."
    )


def _files(tokenizer: Tokenizer) -> dict[str, Path | str]:
    """File name -> where it is: a path, or the name of a member of ``tokenizer.archive``."""
    if tokenizer.archive:
        return {name: member for member, name in tokenizer.members.items()}
    if tokenizer.kind == "sentencepiece":
        return {"tokenizer.model": tokenizer.path}
    files = {name: tokenizer.path / name for name in _FILES if (tokenizer.path / name).is_file()}
    if not files:
        raise DamagedCheckpoint(
            f"{shown(tokenizer.path)} holds no tokenizer. Name one with --tokenizer DIR."
        )
    return files


def copy(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, place in _files(tokenizer).items():
        is_member = tokenizer.archive is not None
        opened = (
            nemo_archive.open_member(tokenizer.archive, place) if is_member else place.open("rb")
        )
        with opened as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    if tokenizer.kind == "huggingface" and tokenizer.path:
        for name, content in huggingface_config.replaced_tokenizer(tokenizer.path).items():
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
            if isinstance(content.get("chat_template"), list):  # which the other file would hide
                (folder / "chat_template.jinja").unlink(missing_ok=True)


def nemo2_section(tokenizer: Tokenizer) -> dict[str, Any]:
    section: dict[str, Any] = {"_target_": _CLASSES[tokenizer.kind]}
    if tokenizer.kind == "sentencepiece":
        return section | {"model_path": f"{FOLDER}/tokenizer.model", "legacy": tokenizer.legacy}
    # trust_remote_code is left out on purpose: a tokenizer that brings its own code is not run.
    return section | {"pretrained_model_name": FOLDER, "use_fast": tokenizer.use_fast}


def nemo1_section(tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    """The ``tokenizer`` of ``model_config.yaml``; ``place`` is the directory, the file, the member
    (``nemo:NAME``) or the Hub's name.

    NeMo 1 looks paths up in the current directory, so they have to be absolute.
    """
    own = {"library": "huggingface", "type": place, "use_fast": tokenizer.use_fast, "model": None}
    if tokenizer.kind == "sentencepiece":
        own = {"library": "sentencepiece", "type": None, "model": place}
        own["sentencepiece_legacy"] = tokenizer.legacy
    return own | {"vocab_file": None, "merge_file": None}


def required(tokenizer: Tokenizer | None, where: str, hub_allowed: bool = False) -> Tokenizer:
    """``tokenizer`` if its files are here, or on the Hub where that is ``hub_allowed``.

    Raises :class:`UnsupportedCheckpoint` otherwise, saying what to do.
    """
    if tokenizer is None:
        raise UnsupportedCheckpoint(
            f"{where} has no tokenizer that can be taken along (Hugging Face or SentencePiece). "
            "Name it with --tokenizer DIR or FILE.model."
        )
    if tokenizer.hub and not hub_allowed:
        raise UnsupportedCheckpoint(
            f"{where} names its tokenizer {tokenizer.hub!r}, which is not here: a repository on "
            "the Hub, or a directory of another machine. Fetch it and name it with --tokenizer "
            "DIR."
        )
    return tokenizer
