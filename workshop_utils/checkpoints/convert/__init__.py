"""Checkpoints of one NeMo format as another: NeMo 1 and NeMo 2.0, and Hugging Face and Megatron
into both.

Every format is read into one description (:mod:`.source`, :mod:`.readers`) and written from it
(:mod:`.targets`). Sharded weights are not copied but linked, with an index of their own; weights in
one file for each rank are written as a torch_dist directory, tensor by tensor (:mod:`.weights`).
Only Hugging Face models need NeMo itself, in a process of its own.
"""

import shutil
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
    from workshop_utils.checkpoints.convert import targets, tokenizers
    from workshop_utils.checkpoints.formats.identify import require_place
    from workshop_utils.checkpoints.verify.verify import require_sound

    source, target = Path(source), Path(target)
    target = target.parent.resolve() / target.name
    if to not in FORMATS or dtype not in (None, *DTYPES):
        raise ValueError(f"to is one of {FORMATS} and dtype one of {DTYPES} or None")
    if source.exists():
        targets.refuse_inside(source, target)
    require_place(target, overwrite)
    if target.suffix == ".nemo" and to == "nemo2":
        raise UnsupportedCheckpoint(
            f"{shown(target)}: a .nemo archive is NeMo 1. For NeMo 2.0 name a directory."
        )
    if tokenizer is not None:
        tokenizers.given(Path(tokenizer))  # before an import that takes a while
    if source.exists():
        require_sound(source, trust=trust)
    is_huggingface = (source / "config.json").is_file() and not (source / "context").is_dir()
    run = _from_huggingface if is_huggingface else _convert
    return run(source, target, to, tokenizer, dtype, dry_run, trust)


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

    own = None if tokenizer is None else tokenizers.given(Path(tokenizer))
    source = readers.read(path, own, pass_over(trust))
    archive = target.suffix == ".nemo"
    is_format = source.format == {"nemo2": "NeMo 2.0", "nemo1": "NeMo 1"}[to]
    if is_format and source.sharded and archive == path.is_file() and not (dtype or own):
        raise UnsupportedCheckpoint(
            f"{shown(path)} is a {source.format} checkpoint already. Nothing was converted."
        )
    what = weights.how(source, dtype, archive, temporary)
    linked = what is weights.How.LINK
    if linked and targets.inside(weights.origin(source), target):
        raise OutputExists(
            f"{shown(target)} holds the weights that {shown(path)} only links to. Choose another "
            "place."
        )
    targets.check(source, to, dtype)
    write_nemo1 = targets.write_archive if archive else targets.write_nemo1
    changed = f", converted to {dtype}" if dtype and dtype != source.dtype else ""
    keep = f" to {shown(weights.origin(source))} (keep both)" if linked else ""
    notes = [
        f"{source.format}, family {source.family.name}: {source.fields['num_layers']} layers, "
        f"{len(source.tensors)} tensors, {source.nbytes / 1e9:.2f} GB of {source.dtype}{changed}",
        f"weights: {what.value}{keep}",
    ]
    if archive and source.tokenizer.kind == "huggingface":
        notes.append(
            "tokenizer: packed for the way back, but NeMo 1 wants it as a directory; "
            "tokenizer.type names where it lies now"
        )
    if not dry_run:
        write = targets.write_nemo2 if to == "nemo2" else write_nemo1
        write(source, target, what, dtype)
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
    from workshop_utils.checkpoints.formats import huggingface, huggingface_config
    from workshop_utils.checkpoints.formats.findings import pass_over
    from workshop_utils.runtime.processes import run_quietly

    check(source.resolve(), huggingface.describe(source, pass_over(trust)).dtype)
    notes = (f"not known: {item}" for item in huggingface_config.findings(source))
    steps = ("Hugging Face: imported by NeMo to NeMo 2.0", *notes)
    if dry_run:
        further = ("and from there to NeMo 1",) if to == "nemo1" else ()
        return Conversion(target, steps + further)
    target.parent.mkdir(parents=True, exist_ok=True)
    with paths.temporary_directory(f".{target.name}.", target.parent) as folder:
        imported = folder / "nemo2"
        run_quietly("import", str(source), "--out", str(imported), *(["--trust"] if trust else []))
        if to == "nemo2" and dtype is None and tokenizer is None:
            with paths.new_directory(target) as part:
                for child in imported.iterdir():
                    shutil.move(child, part / child.name)
            return Conversion(target, steps)
        # An archive names the directory of its tokenizer, and the one between will be gone.
        tokenizer = source if tokenizer is None and target.suffix == ".nemo" else tokenizer
        done = _convert(imported, target, to, tokenizer, dtype, dry_run, trust, temporary=True)
    return Conversion(target, steps + done.notes)
