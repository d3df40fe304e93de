"""Writing a :class:`.source.Source` as a NeMo 2.0 directory, a NeMo 1 directory, or a ``.nemo``
archive."""

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.checkpoints.convert import nemo2_context, tokenizers, weights
from workshop_utils.checkpoints.convert.archive_writer import ArchiveWriter
from workshop_utils.checkpoints.convert.source import Source
from workshop_utils.checkpoints.convert.weights import How
from workshop_utils.checkpoints.formats import nemo1_config
from workshop_utils.core import paths
from workshop_utils.core.errors import OutputExists
from workshop_utils.core.paths import shown

NEMO2_WEIGHTS, NEMO1_WEIGHTS = "weights", "model_weights"
CONFIG = "model_config.yaml"


def check(source: Source, to: str, dtype: str | None) -> None:
    """Refuse what the format ``to`` cannot hold, before anything is written."""
    tokenizers.required(source.tokenizer, shown(source.path), hub_allowed=to == "nemo1")
    if to == "nemo1":
        nemo1_fields(source, dtype, {})


def write_nemo2(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """``context/`` and ``weights/``. ``dtype`` None keeps that of every tensor."""
    section = tokenizers.nemo2_section(source.tokenizer)
    kind, rows = dtype or source.dtype, source.rows
    tree = nemo2_context.model_tree(source.fields, source.family, rows, kind, section)
    with paths.new_directory(target) as part:
        folder = NEMO2_WEIGHTS
        weights.place(source, what, part / folder, target / folder, "module.", dtype)
        tokenizers.copy(source.tokenizer, part / "context" / tokenizers.FOLDER)
        nemo2_context.write(part / "context", tree)


def write_nemo1(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The directory ``target``: ``model_config.yaml``, ``model_weights/`` and the tokenizer."""
    tokenizer, folder = source.tokenizer, NEMO1_WEIGHTS
    with paths.new_directory(target) as part:
        if not tokenizer.hub:
            tokenizers.copy(tokenizer, part / tokenizers.FOLDER)
        own = target / tokenizers.FOLDER
        file = own if tokenizer.kind == "huggingface" else own / "tokenizer.model"
        section = tokenizers.nemo1_section(tokenizer, tokenizer.hub or str(file))
        config = nemo1_fields(source, dtype, section)
        weights.place(source, what, part / folder, target / folder, "model.", dtype)
        write_config(part / CONFIG, _header(source), config)


def write_archive(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The ``.nemo`` ``target``: the members that :func:`write_nemo1` writes as files, in a plain
    tar.

    A SentencePiece tokenizer is packed as NeMo packs it. NeMo 1 cannot find a Hugging Face
    tokenizer in an archive: its files are packed for the way back, and ``tokenizer.type`` is the
    directory where they lie now.
    """
    tokenizer, folder = source.tokenizer, f"{tokenizers.FOLDER}/"
    place = tokenizer.hub or str(tokenizer.path or tokenizers.FOLDER)
    if tokenizer.kind == "sentencepiece":
        place, folder = "nemo:tokenizer.model", ""
    config = nemo1_fields(source, dtype, tokenizers.nemo1_section(tokenizer, place))
    with (
        paths.new_file(target) as part,
        tempfile.TemporaryDirectory() as name,
        ArchiveWriter(part) as archive,
    ):
        scratch = Path(name)
        write_config(scratch / CONFIG, _header(source), config)
        archive.add(CONFIG, scratch / CONFIG)
        if not tokenizer.hub:
            tokenizers.copy(tokenizer, scratch / tokenizers.FOLDER)
            for file in sorted((scratch / tokenizers.FOLDER).iterdir()):
                archive.add(folder + file.name, file)
        tensors, objects = list(source.tensors.values()), list(source.objects.values())
        if what is How.WRITE:
            with archive.member(f"{NEMO1_WEIGHTS}/{weights.FILE}") as written:
                tensors, objects = weights.write(source, written, dtype)
        else:
            weights.copy(source, "packing", lambda name: archive.member(f"{NEMO1_WEIGHTS}/{name}"))
        index = scratch / NEMO1_WEIGHTS
        index.mkdir()
        weights.write_index(source, tensors, objects, index, "model.")
        for file in sorted(index.iterdir()):
            archive.add(f"{NEMO1_WEIGHTS}/{file.name}", file)


def nemo1_fields(
    source: Source, dtype: str | None, tokenizer: dict[str, Any], where: str | None = None
) -> dict[str, Any]:
    """``model_config.yaml``; ``where`` names the source in errors."""
    where, kind = where or shown(source.path), dtype or source.dtype
    return nemo1_config.from_fields(
        source.fields, source.family, source.rows, kind, tokenizer, where
    )


def _header(source: Source) -> str:
    return f"{shown(source.path)} by `workshop convert`"


def write_config(file: Path, header: str, config: dict[str, Any]) -> None:
    text = yaml.safe_dump(config, sort_keys=False)
    file.write_text(f"# Translated from {header}.\n{text}", encoding="utf-8")


def inside(path: Path, other: Path) -> bool:
    path, other = (Path(os.path.realpath(path)) for path in (path, other))
    return path.is_relative_to(other) or other.is_relative_to(path)


def refuse_inside(source: Path, target: Path) -> None:
    """Raise :class:`OutputExists` where ``target`` would lie in ``source`` or contain it."""
    if inside(source, target):
        raise OutputExists(
            f"{shown(target)}: the target cannot lie inside the source or contain it. Choose "
            "another place."
        )
