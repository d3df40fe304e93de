"""Checkpoints of one NeMo format as another: NeMo 1 and NeMo 2.0, and Hugging Face and Megatron
into both.

Every format is read into one description (:mod:`.source`, :mod:`.readers`) and written from it
(:mod:`.targets`). Sharded weights are not copied but linked, with an index of their own; weights in
one file for each rank are written as a torch_dist directory, tensor by tensor (:mod:`.weights`).
Only Hugging Face models need NeMo itself, in a process of its own.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.checkpoints.formats.tensor import DTYPES
from workshop_utils.core import paths
from workshop_utils.core.errors import OutputExists, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

FORMATS = ("nemo2", "nemo1")


@dataclass(frozen=True)
class Conversion:
    """What a conversion does, or did: the target, and sentences for a person."""

    target: Path
    notes: tuple[str, ...]


def convert(
    source: Path | str,
    target: Path | str,
    to: str,
    tokenizer: Path | str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    trust: bool = False,
) -> Conversion:
    """Write the checkpoint ``source`` to ``target`` in the format ``to``, ``nemo2`` or ``nemo1``
    (``target`` ``*.nemo``: an archive).

    ``source`` is a NeMo 2.0 directory, a ``.nemo`` archive or what it unpacks to, a Megatron
    ``iter_XXXXXXX`` directory or a Hugging Face model directory. ``tokenizer`` (a Hugging Face
    directory or a SentencePiece file) replaces the one of the source. The dtype of every tensor
    stays unless ``dtype`` is given. With ``dry_run`` nothing is written. The source is verified
    first; with ``trust`` what is found is only printed, and what cannot be read without running it
    is left out.

    Raises :class:`NotACheckpoint`, :class:`UnsupportedCheckpoint`, :class:`UnsafeCheckpoint` and
    :class:`DamagedCheckpoint` for what cannot be converted, each naming the field or tensor;
    :class:`OutputExists` unless ``overwrite``. ``target`` is whole or absent.
    """
    from workshop_utils.checkpoints.convert import targets
    from workshop_utils.checkpoints.formats.identify import require_place

    source, target = Path(source), Path(target)
    target = target.parent.resolve() / target.name
    if to not in FORMATS or dtype not in (None, *DTYPES):
        raise ValueError(f"to is one of {FORMATS} and dtype one of {DTYPES} or None")
    if source.exists() and targets.inside(source, target):
        raise OutputExists(
            f"{shown(target)}: the target cannot lie inside the source or contain it. Choose "
            "another place."
        )
    require_place(target, overwrite)
    if target.suffix == ".nemo" and to == "nemo2":
        raise UnsupportedCheckpoint(
            f"{shown(target)}: a .nemo archive is NeMo 1. For NeMo 2.0 name a directory."
        )
    from workshop_utils.checkpoints.convert import tokenizers
    from workshop_utils.checkpoints.verify.verify import require_sound

    if tokenizer is not None:
        tokenizers.given(Path(tokenizer))  # before an import that takes a while
    if source.exists():
        require_sound(source, trust=trust)
    if (source / "config.json").is_file() and not (source / "context").is_dir():
        return _from_huggingface(source, target, to, tokenizer, dtype, dry_run, trust)
    return _convert(source, target, to, tokenizer, dtype, dry_run, trust)


def _convert(
    path: Path,
    target: Path,
    to: str,
    tokenizer: Path | str | None,
    dtype: str | None,
    dry_run: bool,
    trust: bool,
    temporary: bool = False,
) -> Conversion:
    """``temporary``: the files of ``path`` may be moved to ``target``."""
    from workshop_utils.checkpoints.convert import readers, targets, tokenizers, weights
    from workshop_utils.checkpoints.formats.findings import pass_over

    found = readers.read(
        path, None if tokenizer is None else tokenizers.given(Path(tokenizer)), pass_over(trust)
    )
    archive = target.suffix == ".nemo"
    same = (
        found.format == {"nemo2": "NeMo 2.0", "nemo1": "NeMo 1"}[to]
        and found.sharded
        and archive == path.is_file()
    )
    if same and dtype is None and tokenizer is None:
        raise UnsupportedCheckpoint(
            f"{shown(path)} is a {found.format} checkpoint already. Nothing was converted."
        )
    what = weights.how(found, dtype, archive, temporary)
    if what is weights.How.LINK and targets.inside(weights.origin(found), target):
        raise OutputExists(
            f"{shown(target)} holds the weights that {shown(path)} only links to. Choose another "
            "place."
        )
    targets.check(found, to, dtype)
    write: Callable = (
        targets.write_nemo2
        if to == "nemo2"
        else targets.write_archive
        if archive
        else targets.write_nemo1
    )
    notes = [
        f"{found.format}, family {found.family.name}: {found.fields['num_layers']} layers, "
        f"{len(found.tensors)} tensors, {found.nbytes / 1e9:.2f} GB of {found.dtype}"
        + (f", converted to {dtype}" if dtype and dtype != found.dtype else ""),
        f"weights: {what.value}"
        + (f" to {shown(weights.origin(found))} (keep both)" if what is weights.How.LINK else ""),
    ]
    if archive and found.tokenizer and found.tokenizer.kind == "huggingface":
        notes.append(
            "tokenizer: packed for the way back, but NeMo 1 wants it as a directory; "
            "tokenizer.type names where it lies now"
        )
    if not dry_run:
        write(found, target, what, dtype)
    return Conversion(target, tuple(notes))


def _from_huggingface(
    source: Path,
    target: Path,
    to: str,
    tokenizer: Path | str | None,
    dtype: str | None,
    dry_run: bool,
    trust: bool,
) -> Conversion:
    """By NeMo's importer, in a process of its own: Lightning refuses NeMo's strategy in a
    notebook's kernel."""
    from workshop_utils.checkpoints.convert.huggingface import check
    from workshop_utils.runtime.processes import run_quietly

    check(source.resolve())
    steps = ["Hugging Face: imported by NeMo to NeMo 2.0"]
    if dry_run:
        return Conversion(
            target, (*steps, *(["and from there to NeMo 1"] if to == "nemo1" else []))
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with paths.temporary_directory(f".{target.name}.", target.parent) as folder:
        made = folder / "nemo2"
        run_quietly("import", str(source), "--out", str(made), *(["--trust"] if trust else []))
        if to == "nemo2" and dtype is None and tokenizer is None:
            with paths.new_directory(target) as part:
                for child in made.iterdir():
                    shutil.move(child, part / child.name)
            return Conversion(target, tuple(steps))
        # An archive names the directory of its tokenizer, and the one between will be gone.
        tokenizer = source if tokenizer is None and target.suffix == ".nemo" else tokenizer
        done = _convert(
            made, target, to, tokenizer, dtype, dry_run=False, trust=trust, temporary=True
        )
    return Conversion(target, (*steps, *done.notes))
