"""The tokenizer of a checkpoint: found, and put where the other format looks for it.

Both formats know Hugging Face tokenizers (a directory of files) and SentencePiece (one file,
``*.model``).
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.convert.source import Tokenizer
from workshop_utils.checkpoints.formats import nemo_archive
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

_CLASSES = {
    "huggingface": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
    "sentencepiece": "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer",  # noqa: E501
}


def given(path: Path) -> Tokenizer:
    """The tokenizer that a person named: a directory, or a SentencePiece file. Raises
    :class:`NotACheckpoint` for anything else."""
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
    described = config.get("tokenizer")
    if not isinstance(described, Mapping):
        return None
    names = [member.name for member in nemo_archive.members(place)] if place.is_file() else []
    if described.get("library") == "sentencepiece":
        return _sentencepiece(described, place, names, where)
    if described.get("library") != "huggingface" or not isinstance(described.get("type"), str):
        return None
    members = {
        name: name.partition("/")[2]
        for name in names
        if name.startswith(f"{FOLDER}/") and name.count("/") == 1
    }
    use_fast = described.get("use_fast", True) is not False
    if members:
        return Tokenizer("huggingface", archive=place, members=members, use_fast=use_fast)
    path = Path(described["type"])
    if path.is_absolute() and path.is_dir():
        return Tokenizer("huggingface", path, use_fast=use_fast)
    if place.is_dir() and (place / FOLDER).is_dir():
        return Tokenizer("huggingface", (place / FOLDER).resolve(), use_fast=use_fast)
    return Tokenizer("huggingface", hub=described["type"], use_fast=use_fast)


def _sentencepiece(
    described: Mapping[str, Any], place: Path, names: list[str], where: str
) -> Tokenizer | None:
    value, legacy = described.get("model"), described.get("sentencepiece_legacy", False) is True
    if not isinstance(value, str):
        return None
    # "nemo:" marks a file that NeMo packed with the model.
    name = value.removeprefix("nemo:")
    if place.is_file() and name in names:
        return Tokenizer(
            "sentencepiece", archive=place, members={name: "tokenizer.model"}, legacy=legacy
        )
    if place.is_dir() and not os.path.isabs(name):
        path = Path(os.path.normpath(place / name))
        if not path.is_relative_to(place):
            raise UnsafeCheckpoint(
                f"{where}: tokenizer.model is {value!r}, outside the checkpoint."
            )
        return Tokenizer("sentencepiece", path.resolve(), legacy=legacy) if path.is_file() else None
    return (
        Tokenizer("sentencepiece", Path(name), legacy=legacy)
        if os.path.isabs(name) and os.path.isfile(name)
        else None
    )


def of_nemo2(config: Mapping[str, Any]) -> Tokenizer:
    """From the ``tokenizer`` section that
    :func:`workshop_utils.checkpoints.convert.bridge_config.tokenizer` made of a
    ``context/model.yaml``."""
    if config["library"] == "sentencepiece":
        return Tokenizer(
            "sentencepiece", Path(config["model"]), legacy=config["sentencepiece_legacy"]
        )
    path = Path(config["type"])
    if path.is_absolute():
        return Tokenizer("huggingface", path, use_fast=config["use_fast"])
    return Tokenizer("huggingface", hub=config["type"], use_fast=config["use_fast"])


def files(tokenizer: Tokenizer) -> dict[str, Path | str]:
    """File name -> where it is: a path, or the name of a member of ``tokenizer.archive``."""
    if tokenizer.archive:
        return {name: member for member, name in tokenizer.members.items()}
    if tokenizer.kind == "sentencepiece":
        return {"tokenizer.model": tokenizer.path}
    found = {name: tokenizer.path / name for name in _FILES if (tokenizer.path / name).is_file()}
    if not found:
        raise DamagedCheckpoint(
            f"{shown(tokenizer.path)} holds no tokenizer. Name one with --tokenizer DIR."
        )
    return found


def copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the files into the new directory ``folder``."""
    folder.mkdir(parents=True)
    for name, place in files(tokenizer).items():
        if isinstance(place, Path):
            shutil.copyfile(place, folder / name)
            continue
        with (
            nemo_archive.open_member(tokenizer.archive, place) as member,
            (folder / name).open("wb") as target,
        ):
            shutil.copyfileobj(member, target)


def nemo2_section(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``tokenizer`` of ``context/model.yaml``, for files that lie in
    ``context/nemo_tokenizer``."""
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
    if tokenizer.kind == "sentencepiece":
        return {
            "library": "sentencepiece",
            "type": None,
            "model": place,
            "vocab_file": None,
            "merge_file": None,
            "sentencepiece_legacy": tokenizer.legacy,
        }
    return {
        "library": "huggingface",
        "type": place,
        "use_fast": tokenizer.use_fast,
        "model": None,
        "vocab_file": None,
        "merge_file": None,
    }


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
