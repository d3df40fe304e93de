"""Make a NeMo 2.0 checkpoint loadable by the script path, without copying a weight.

The script path (``megatron_gpt_finetuning``, NeMo 1) looks for ``model_config.yaml`` and
``model_weights/``, flat keys and tensor names that start with ``model.``. NeMo 2.0 has
``context/model.yaml``, ``weights/``, a tree of classes and names that start with ``module.``. The
folklore is one symbolic link, ``model_config.yaml -> context/model.yaml``: it satisfies the first
look-up and nothing after it. What works is a *bridged view* beside the checkpoint, which stays as
it is:

    VIEW/model_config.yaml         the configuration, translated
    VIEW/model_weights/*.distcp    relative links to the files of NEMO2_DIR/weights
    VIEW/model_weights/.metadata   the index, with the names the script path asks for
    VIEW/bridge.json               which checkpoint this is a view of
"""

import hashlib
import json
import os
from pathlib import Path

from workshop_utils.checkpoints.convert import readers, targets, tokenizers, weights
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.findings import pass_over
from workshop_utils.checkpoints.formats.nemo1 import VIEW as MARKER
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    OutputExists,
    UnsupportedCheckpoint,
)
from workshop_utils.core.paths import shown


def bridge(
    nemo2_dir: Path | str,
    out: Path | str | None = None,
    link_only: bool = False,
    trust: bool = False,
) -> Path:
    """Make the view of the NeMo 2.0 checkpoint ``nemo2_dir`` that the script path loads, and return
    its path.

    The view goes to ``out`` (default: ``paths.bridged_checkpoint(NAME)``) and is made again only
    when the checkpoint or its place has changed. Nothing is written into ``nemo2_dir``, unless
    ``link_only``: that makes just the link ``nemo2_dir/model_config.yaml -> context/model.yaml``,
    which satisfies tools that look for the file but does not make the checkpoint loadable, and
    returns the link.

    The checkpoint is verified before anything is written; with ``trust`` what is found wrong is
    only printed. What cannot be translated is refused all the same.

    Raises :class:`NotACheckpoint`, :class:`DamagedCheckpoint`, :class:`UnsafeCheckpoint` or
    :class:`UnsupportedCheckpoint` for what cannot be read or translated, and :class:`OutputExists`
    when ``out`` is not a view of this checkpoint.
    """
    path = Path(nemo2_dir)
    if (path / MARKER).is_file():
        raise NotACheckpoint(
            f"{shown(path)} is already a bridged view; use it as model.restore_from_path."
        )
    path = nemo2.locate(path)
    if link_only:
        if out is not None:
            raise ValueError("link_only makes the link inside nemo2_dir; it takes no out")
        return _link(path)
    path = path.resolve()
    target = Path(out) if out is not None else paths.bridged_checkpoint(path.name)
    target = target.parent.resolve() / target.name
    checkpoint = nemo2.read(path, pass_over(trust))
    if checkpoint.is_adapter:
        raise UnsupportedCheckpoint(
            f"{shown(path)} is an adapter, not a model. The script path starts from a full model: "
            "bridge its base, or hand the adapter on with `workshop export`."
        )
    source = readers.of_nemo2(checkpoint)
    # NeMo 1 looks paths up in the current directory, so they are absolute.
    place = source.tokenizer.hub or str(source.tokenizer.path)
    section = tokenizers.nemo1_section(source.tokenizer, place)
    config = targets.nemo1_fields(source, None, section, shown(checkpoint.config))
    require_sound(path, trust, (Kind.NEMO2,))
    digest = hashlib.sha256((path / "weights" / ".metadata").read_bytes())
    digest.update(json.dumps(config, sort_keys=True).encode())
    if _is_current(target, path, digest.hexdigest()):
        return target
    with paths.new_directory(target) as part:
        header = f"{shown(path)}/context/model.yaml by `workshop bridge`"
        targets.write_config(part / "model_config.yaml", header, config)
        folder = targets.NEMO1_WEIGHTS
        weights.place(source, weights.How.LINK, part / folder, target / folder, "model.", None)
        # Relative, so that a moved repository still finds it.
        marker = {"view_of": os.path.relpath(path, target), "fingerprint": digest.hexdigest()}
        (part / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return target


def _link(nemo2_dir: Path) -> Path:
    """An existing file is never replaced."""
    path, to = nemo2_dir / "model_config.yaml", os.path.join("context", "model.yaml")
    if not (nemo2_dir / to).is_file():
        raise DamagedCheckpoint(f"{shown(nemo2_dir / to)} is missing: there is nothing to link to.")
    try:
        path.symlink_to(to)
    except FileExistsError:
        if not path.is_symlink() or os.readlink(path) != to:
            raise OutputExists(
                f"{shown(path)} exists and is not that link. It was left as it is."
            ) from None
    return path


def _is_current(target: Path, path: Path, fingerprint: str) -> bool:
    targets.refuse_inside(path, target)
    if not os.path.lexists(target):
        return False
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        shows = Path(os.path.normpath(target / marker["view_of"]))
        is_same = marker["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputExists(
            f"{shown(target)} exists and is not a bridged view. It was left as it is. Choose "
            "another place."
        ) from None
    if shows != path and nemo2.looks_like(shows):
        raise OutputExists(
            f"{shown(target)} is the view of another checkpoint, {shown(shows)}. Choose another "
            "place."
        )
    folder = target / targets.NEMO1_WEIGHTS
    needed = {folder / name for name in (".metadata", "metadata.json", "common.pt")}
    needed |= {target / "model_config.yaml", *(folder.iterdir() if folder.is_dir() else ())}
    return is_same and all(file.exists() for file in needed)
