"""Which reader is for this path? Decided by the names of the files there, and for a single file by
how it begins."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from workshop_utils.checkpoints.formats import (
    gguf,
    huggingface,
    incomplete,
    lightning,
    megatron,
    nemo1,
    nemo2,
    tokenizer_files,
)
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.core.errors import (
    CheckpointError,
    DamagedCheckpoint,
    NotACheckpoint,
    OutputExists,
    WorkshopError,
)
from workshop_utils.core.home import can_be_written
from workshop_utils.core.paths import shown

Describe = Callable[[Path, Report], Checkpoint]

_LOOK_BELOW = 2000
"""Directories that are looked at for checkpoints below a wrong path."""

_FILES = (".nemo", ".ckpt", ".gguf")

_HALF_WRITTEN = re.compile(r"\.(partial|tmp|incomplete)$|-unfinished$")


def require_place(target: Path, overwrite: bool) -> None:
    """Before anything long starts: ``target`` can be written, and stands in the way of nothing but
    an empty directory, or with ``overwrite`` a checkpoint. Raises :class:`OutputExists` and
    :class:`WorkshopError`.
    """
    if not can_be_written(target.parent):
        raise WorkshopError(
            f"{shown(target)} cannot be written: {shown(target.parent)} is no directory of "
            "yours. Choose another place."
        )
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        identify(target, lambda fault: None)
    except NotACheckpoint:
        raise OutputExists(
            f"{shown(target)} exists and is no checkpoint. It was left as it is. Choose another "
            "place."
        ) from None
    except CheckpointError:
        pass  # a damaged one
    if not overwrite:
        raise OutputExists(
            f"{shown(target)} exists. It was left as it is; --overwrite replaces it."
        )


def identify(path: Path | str, report: Report = stop) -> Checkpoint:
    """Tell what the checkpoint ``path`` is; reads headers and indexes, no weights, and runs nothing
    that a file contains.

    Raises :class:`NotACheckpoint` for anything else (naming the right path when ``path`` is above
    or inside a checkpoint), and :class:`DamagedCheckpoint`, :class:`UnsafeCheckpoint` or
    :class:`UnsupportedCheckpoint` for one that cannot be read. A fault of one tensor goes to
    ``report``; what is left is described.
    """
    path = Path(path)
    try:
        _check_there(path)
        describe = reader_of(path)
        if describe is None:
            raise NotACheckpoint(_why_not(path))
        try:
            checkpoint = describe(path, report)
        except DamagedCheckpoint as error:
            # A clone without Git LFS, or a page saved as weights, breaks every format in a way of
            # its own.
            if why := incomplete.find(path):
                raise DamagedCheckpoint(why) from error
            raise
    except PermissionError as error:
        raise NotACheckpoint(
            f"{shown(error.filename or path)} may not be read by you. Ask its owner for: chmod "
            f"-R a+rX {shown(path)}"
        ) from error
    except OSError as error:
        why = error.strerror or error
        raise DamagedCheckpoint(f"{shown(error.filename or path)} cannot be read: {why}") from error
    if path.is_symlink():
        link = f"a link to {shown(path.resolve())}"
        return replace(checkpoint, notes=(link, *checkpoint.notes))
    return checkpoint


def reader_of(path: Path) -> Describe | None:
    """The function that describes ``path``, or None when nothing there is known."""
    if path.is_file():
        return _reader_of_file(path)
    if not path.is_dir():
        return None
    if nemo1.looks_like(path):
        return nemo1.describe
    if nemo2.looks_like(path):
        return nemo2.describe
    if (path / "adapter_config.json").is_file():
        return huggingface.describe_peft
    if (path / "config.json").is_file():
        return huggingface.describe
    # weights/ and model_weights/ of a NeMo checkpoint hold the same files as Megatron's.
    above = path.resolve().parent
    is_part = nemo2.looks_like(above) or nemo1.looks_like(above)
    return megatron.describe if megatron.looks_like(path) and not is_part else None


def _reader_of_file(path: Path) -> Describe | None:
    with path.open("rb") as file:
        start = file.read(512)
    if start[:4] == gguf.MAGIC:
        return gguf.describe
    # A .nemo under another name is one all the same; a tar has its name at byte 257.
    is_tar = start[257:262] == b"ustar" or (
        start[:2] == b"\x1f\x8b" and path.name.endswith((".tar.gz", ".tgz", ".nemo.gz"))
    )
    above = path.resolve().parents[:2]
    is_weights = path.name == nemo1.WEIGHTS and any(map(nemo1.looks_like, above))
    if not (is_tar or path.suffix in (".nemo", ".ckpt")) or is_weights or incomplete.sentence(path):
        return None
    return lightning.describe if path.suffix == ".ckpt" and not is_tar else nemo1.describe


def _check_there(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise NotACheckpoint(
            f"{shown(path)} is a link to {os.readlink(path)}, which is gone. Give the checkpoint "
            "itself."
        )
    if not path.exists():
        raise NotACheckpoint(f"{shown(path)} does not exist.")
    if _HALF_WRITTEN.search(path.name):
        marked = path.parent / path.name.removesuffix("-unfinished")
        rest = f" It marks {shown(marked)} as half-written." if marked.exists() else ""
        raise NotACheckpoint(
            f"{shown(path)} is what a writer leaves that has not finished."
            f"{rest if marked != path else ''} Use an earlier checkpoint, or make it again."
        )


def _why_not(path: Path) -> str:
    if path.is_file() and (why := incomplete.sentence(path)):
        return why
    for above in path.resolve().parents[:3]:
        if reader_of(above):
            return (
                f"{shown(path)} is a part of a checkpoint. Give its top directory: {shown(above)}"
            )
    if not path.is_dir():
        return f"{shown(path)} is {_about_file(path)}"
    if not any(path.iterdir()):
        return f"{shown(path)} is empty. Copy or make the checkpoint again."
    if latest := megatron.latest(path):
        return (
            f"{shown(path)} holds the checkpoints of a run of Megatron. Give one of them; the "
            f"latest is {shown(latest)}"
        )
    if below := sorted(set(_below(path))):
        return nemo2.holds(path, below)
    return f"{shown(path)} {_about_directory(path)}"


def _about_file(path: Path) -> str:
    if path.suffix in (".safetensors", ".bin"):
        return (
            "weights alone. A Hugging Face checkpoint is a directory: put config.json and the "
            "tokenizer beside them (for an adapter: adapter_config.json), and give the directory."
        )
    if path.suffix == ".distcp":
        return (
            "one file of a distributed checkpoint, useless without .metadata beside it. Copy the "
            "whole directory."
        )
    return (
        "not a .nemo archive, a GGUF file or a Lightning .ckpt, and no part of a checkpoint that "
        "is known here."
    )


def _about_directory(path: Path) -> str:
    names = {child.name for child in path.iterdir()}
    weights = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")
    if names & {"adapter_model.safetensors", "adapter_model.bin"}:
        return (
            "has the weights of a PEFT adapter but no adapter_config.json. Copy that file from "
            "where the adapter was made."
        )
    if any(map(weights.fullmatch, names)):
        return (
            "has weights of a Hugging Face model but no config.json. Copy that file from where "
            "the model came from."
        )
    if any(name.endswith(".distcp") for name in names):
        return (
            "has .distcp files but no .metadata, without which nobody can tell what they hold. "
            "Copy the checkpoint again, all of it."
        )
    if tokenizer_files.is_one(path):
        return "is a tokenizer, not a model. Give the directory with the weights."
    return (
        "is not a checkpoint: it has none of context/model.yaml (NeMo 2.0), model_config.yaml "
        "(NeMo 1), config.json (Hugging Face), adapter_config.json (PEFT) and .metadata (Megatron)."
    )


def _below(path: Path) -> Iterator[Path]:
    """Checkpoints below ``path``, down to three levels: run directories put them in checkpoints/
    and below dates."""
    waiting, seen = [(path, 0)], 0
    while waiting and seen < _LOOK_BELOW:
        folder, depth = waiting.pop(0)
        # What may not be looked at is passed over.
        with contextlib.suppress(OSError):
            for child in sorted(folder.iterdir()):
                seen += 1
                if _HALF_WRITTEN.search(child.name):
                    continue
                if _is_one(child):
                    yield child
                elif child.is_dir() and depth < 2:
                    waiting.append((child, depth + 1))


def _is_one(child: Path) -> bool:
    """Whether ``child`` is a checkpoint. Files of other names are not opened: below / are some that
    never end."""
    with contextlib.suppress(OSError):
        return (child.is_dir() or child.suffix in _FILES) and reader_of(child) is not None
    return False
