"""Writing a :class:`.source.Source` as a NeMo 2.0 directory, a NeMo 1 directory, or a ``.nemo``
archive."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.checkpoints.convert import nemo2_context, tokenizers, weights
from workshop_utils.checkpoints.convert.archive_writer import ArchiveWriter
from workshop_utils.checkpoints.convert.source import Source
from workshop_utils.checkpoints.convert.weights import How
from workshop_utils.checkpoints.formats import nemo1_config
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.formats.torch_dist import StoredObject
from workshop_utils.core import paths
from workshop_utils.core.paths import shown

NEMO2_WEIGHTS, NEMO1_WEIGHTS = "weights", "model_weights"


def check(source: Source, to: str, dtype: str | None) -> None:
    """Raise :class:`UnsupportedCheckpoint` for what the format ``to`` cannot hold, before anything
    is written."""
    tokenizers.required(source.tokenizer, shown(source.path), hub_allowed=to == "nemo1")
    if to == "nemo1":
        _config(source, dtype, {})


def write_nemo2(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The directory ``target``: ``context/`` and ``weights/``. ``dtype`` None keeps that of every
    tensor."""
    tokenizer = tokenizers.required(source.tokenizer, shown(source.path))
    section = tokenizers.nemo2_section(tokenizer)
    tree = nemo2_context.model_tree(
        source.fields, source.family, source.rows, dtype or source.dtype, section
    )
    with paths.new_directory(target) as made:
        weights.place(source, what, made / NEMO2_WEIGHTS, target / NEMO2_WEIGHTS, "module.", dtype)
        tokenizers.copy(tokenizer, made / "context" / tokenizers.FOLDER)
        nemo2_context.write(made / "context", tree)


def write_nemo1(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The directory ``target``: ``model_config.yaml``, ``model_weights/`` and the tokenizer."""
    tokenizer = tokenizers.required(source.tokenizer, shown(source.path), hub_allowed=True)
    with paths.new_directory(target) as made:
        if not tokenizer.hub:
            tokenizers.copy(tokenizer, made / tokenizers.FOLDER)
        name = (
            tokenizers.FOLDER
            if tokenizer.kind == "huggingface"
            else f"{tokenizers.FOLDER}/tokenizer.model"
        )
        config = _config(
            source, dtype, tokenizers.nemo1_section(tokenizer, tokenizer.hub or str(target / name))
        )
        weights.place(source, what, made / NEMO1_WEIGHTS, target / NEMO1_WEIGHTS, "model.", dtype)
        _write_config(made / "model_config.yaml", source, config)


def write_archive(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The ``.nemo`` ``target``: the members that :func:`write_nemo1` writes as files, in a plain
    tar.

    A SentencePiece tokenizer is packed as NeMo packs it. NeMo 1 cannot find a Hugging Face
    tokenizer in an archive: its files are packed for the way back, and ``tokenizer.type`` is the
    directory where they lie now.
    """
    tokenizer = tokenizers.required(source.tokenizer, shown(source.path), hub_allowed=True)
    place = (
        "nemo:tokenizer.model"
        if tokenizer.kind == "sentencepiece"
        else tokenizer.hub or str(tokenizer.path or tokenizers.FOLDER)
    )
    config = _config(source, dtype, tokenizers.nemo1_section(tokenizer, place))
    with (
        paths.new_file(target) as part,
        tempfile.TemporaryDirectory() as name,
        ArchiveWriter(part) as archive,
    ):
        scratch = Path(name)
        _write_config(scratch / "model_config.yaml", source, config)
        archive.add("model_config.yaml", scratch / "model_config.yaml")
        if not tokenizer.hub:
            tokenizers.copy(tokenizer, scratch / tokenizers.FOLDER)
            folder = "" if tokenizer.kind == "sentencepiece" else f"{tokenizers.FOLDER}/"
            for file in sorted((scratch / tokenizers.FOLDER).iterdir()):
                archive.add(folder + file.name, file)
        index = scratch / NEMO1_WEIGHTS
        index.mkdir()
        weights.write_index(source, *_pack(source, archive, what, dtype), index, "model.")
        for file in sorted(index.iterdir()):
            archive.add(f"{NEMO1_WEIGHTS}/{file.name}", file)


def _pack(
    source: Source, archive: ArchiveWriter, what: How, dtype: str | None
) -> tuple[list[Tensor], list[StoredObject]]:
    """Put the weights into the archive from where they are, and return the entries of their
    index."""
    if what is How.WRITE:
        with archive.member(f"{NEMO1_WEIGHTS}/{weights.FILE}") as written:
            return weights.write(source, written, dtype)
    sizes = weights.file_sizes(source)
    with weights.progress(sum(sizes.values()), "packing") as bar:
        for name in sizes:
            with (
                source.files.open(name) as opened,
                archive.member(f"{NEMO1_WEIGHTS}/{name}") as written,
            ):
                shutil.copyfileobj(weights.counted(opened, bar), written)
    return list(source.tensors.values()), list(source.objects.values())


def _config(source: Source, dtype: str | None, tokenizer: dict[str, Any]) -> dict[str, Any]:
    return nemo1_config.from_fields(
        source.fields,
        source.family,
        source.rows,
        dtype or source.dtype,
        tokenizer,
        shown(source.path),
    )


def _write_config(file: Path, source: Source, config: dict[str, Any]) -> None:
    text = f"# Translated from {shown(source.path)} by `workshop convert`.\n" + yaml.safe_dump(
        config, sort_keys=False
    )
    file.write_text(text, encoding="utf-8")


def inside(one: Path, other: Path) -> bool:
    """Whether one of the two paths lies in the other."""
    one, other = (Path(os.path.realpath(path)) for path in (one, other))
    return one.is_relative_to(other) or other.is_relative_to(one)
