"""Writing a :class:`.source.Source` as a NeMo 2.0 directory, a NeMo 1 directory, or a ``.nemo`` archive."""

import contextlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import yaml

from workshop_utils import paths
from workshop_utils.convert import nemo2_context, tokenizers, weights
from workshop_utils.convert.source import Source
from workshop_utils.convert.weights import How
from workshop_utils.formats import nemo1_config
from workshop_utils.paths import shown

NEMO2_WEIGHTS, NEMO1_WEIGHTS = "weights", "model_weights"


def write_nemo2(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The directory ``target``: ``context/`` and ``weights/``. ``dtype`` None keeps that of every tensor."""
    tokenizer = tokenizers.required(source.tokenizer, shown(source.path))
    section = tokenizers.nemo2_section(tokenizer)
    tree = nemo2_context.model_tree(source.fields, source.family, source.rows, dtype or source.dtype, section)
    with paths.new_directory(target) as made:
        weights.place(source, what, made / NEMO2_WEIGHTS, target / NEMO2_WEIGHTS, "module.", dtype)
        tokenizers.copy(tokenizer, made / "context" / tokenizers.FOLDER)
        nemo2_context.write(made / "context", tree)


def write_nemo1(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The directory ``target``: ``model_config.yaml``, ``model_weights/`` and the tokenizer."""
    tokenizer = source.tokenizer if source.tokenizer and source.tokenizer.hub else None
    tokenizer = tokenizer or tokenizers.required(source.tokenizer, shown(source.path))
    with paths.new_directory(target) as made:
        if not tokenizer.hub:
            tokenizers.copy(tokenizer, made / tokenizers.FOLDER)
        name = tokenizers.FOLDER if tokenizer.kind == "huggingface" else f"{tokenizers.FOLDER}/tokenizer.model"
        config = _config(source, dtype, tokenizers.nemo1_section(tokenizer, tokenizer.hub or str(target / name)))
        weights.place(source, what, made / NEMO1_WEIGHTS, target / NEMO1_WEIGHTS, "model.", dtype)
        _write_config(made / "model_config.yaml", source, config)


def write_archive(source: Source, target: Path, what: How, dtype: str | None) -> None:
    """The ``.nemo`` ``target``: the members that :func:`write_nemo1` writes as files, in a plain tar.

    A SentencePiece tokenizer is packed as NeMo packs it. NeMo 1 cannot find a Hugging Face tokenizer in an archive: its files are
    packed for the way back, and ``tokenizer.type`` is the directory where they lie now.
    """
    tokenizer = source.tokenizer if source.tokenizer and source.tokenizer.hub else None
    tokenizer = tokenizer or tokenizers.required(source.tokenizer, shown(source.path))
    place = (
        "nemo:tokenizer.model"
        if tokenizer.kind == "sentencepiece"
        else tokenizer.hub or str(tokenizer.path or tokenizers.FOLDER)
    )
    config = _config(source, dtype, tokenizers.nemo1_section(tokenizer, place))
    with contextlib.ExitStack() as stack:
        # The weights are put together beside the archive, unless they can be read from where they are.
        part = stack.enter_context(paths.new_file(target))
        folder = stack.enter_context(_scratch(target))
        _write_config(folder / "model_config.yaml", source, config)
        if not tokenizer.hub:
            tokenizers.copy(tokenizer, folder / tokenizers.FOLDER)
        if what is How.COPY and not source.files.are_members:
            # The tar takes the bytes from the files themselves.
            what = How.LINK
        weights.place(source, what, folder / NEMO1_WEIGHTS, folder / NEMO1_WEIGHTS, "model.", dtype)
        _pack(folder, part, sentencepiece=tokenizer.kind == "sentencepiece")


@contextlib.contextmanager
def _scratch(target: Path):
    import tempfile

    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        yield Path(name)


def _config(source: Source, dtype: str | None, tokenizer: dict[str, Any]) -> dict[str, Any]:
    return nemo1_config.from_fields(
        source.fields, source.family, source.rows, dtype or source.dtype, tokenizer, shown(source.path)
    )


def _write_config(file: Path, source: Source, config: dict[str, Any]) -> None:
    text = f"# Translated from {shown(source.path)} by `workshop convert`.\n" + yaml.safe_dump(config, sort_keys=False)
    file.write_text(text, encoding="utf-8")


def _pack(folder: Path, part: Path, sentencepiece: bool) -> None:
    """Write the files below ``folder`` to the tar ``part``: contents of links, no times, no user names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    total = sum(file.stat().st_size for file in files)
    with tarfile.open(part, "w:", format=tarfile.GNU_FORMAT) as archive, weights.progress(total, "packing") as bar:
        for file in files:
            name = str(file.relative_to(folder))
            if sentencepiece:
                name = name.removeprefix(f"{tokenizers.FOLDER}/")
            entry = tarfile.TarInfo(f"./{name}")
            entry.size, entry.mode = file.stat().st_size, 0o644
            with file.open("rb") as opened:
                archive.addfile(entry, io.BufferedReader(_Counted(opened, bar)))


class _Counted(io.RawIOBase):
    """A file that tells a progress bar what is read of it."""

    def __init__(self, file, bar) -> None:
        self._file, self._bar = file, bar

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self._bar.update(count)
        return count


def inside(one: Path, other: Path) -> bool:
    """Whether one of the two paths lies in the other."""
    one, other = (Path(os.path.realpath(path)) for path in (one, other))
    return one.is_relative_to(other) or other.is_relative_to(one)
