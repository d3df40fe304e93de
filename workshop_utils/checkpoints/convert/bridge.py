"""Make a NeMo 2.0 checkpoint loadable by the script path, without copying a weight.

The script path (``megatron_gpt_finetuning``, NeMo 1) looks for ``model_config.yaml`` and
``model_weights/``, flat keys and tensor names that start with ``model.``. NeMo 2.0 has
``context/model.yaml``, ``weights/``, a tree of classes and names that start with ``module.``. The
folklore is one symbolic link, ``model_config.yaml -> context/model.yaml``: it satisfies the first
look-up and nothing after it. What works is a *bridged view* beside the checkpoint, which stays as
it is:

    VIEW/model_config.yaml         the configuration, translated (bridge_config.py)
    VIEW/model_weights/*.distcp    relative links to the files of NEMO2_DIR/weights
    VIEW/model_weights/.metadata   the index, with the names the script path asks for
    (bridge_view.py)
    VIEW/bridge.json               which checkpoint this is a view of
"""

import json
import os
from pathlib import Path

from workshop_utils.checkpoints.convert import bridge_config, bridge_view
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
    source = Path(nemo2_dir)
    if (source / MARKER).is_file():
        raise NotACheckpoint(
            f"{paths.shown(source)} is already a bridged view; use it as model.restore_from_path."
        )
    source = nemo2.locate(source)
    if link_only:
        if out is not None:
            raise ValueError("link_only makes the link inside nemo2_dir; it takes no out")
        return link(source)
    source = source.resolve()
    target = Path(out) if out is not None else paths.bridged_checkpoint(source.name)
    target = target.parent.resolve() / target.name
    checkpoint = nemo2.read(source, pass_over(trust))
    if checkpoint.is_adapter:
        raise UnsupportedCheckpoint(
            f"{paths.shown(source)} is an adapter, not a model. The script path starts from a "
            "full model: bridge its base, or hand the adapter on with `workshop export`."
        )
    translated = bridge_config.translate(checkpoint)
    require_sound(source, trust, (Kind.NEMO2,))
    fingerprint = bridge_view.fingerprint(checkpoint, translated)
    if _is_current(target, source, fingerprint):
        return target
    with paths.new_directory(target) as made:
        bridge_view.write(checkpoint, translated, made, target)
        # Relative, so that a moved repository still finds it.
        marker = {"view_of": os.path.relpath(source, target), "fingerprint": fingerprint}
        (made / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return target


def link(nemo2_dir: Path) -> Path:
    """Make the link ``nemo2_dir/model_config.yaml -> context/model.yaml`` and return it; an
    existing file is never replaced."""
    path = nemo2_dir / "model_config.yaml"
    wanted = os.path.join("context", "model.yaml")
    if not (nemo2_dir / wanted).is_file():
        raise DamagedCheckpoint(
            f"{paths.shown(nemo2_dir / wanted)} is missing: there is nothing to link to."
        )
    try:
        path.symlink_to(wanted)
    except FileExistsError:
        if not path.is_symlink() or os.readlink(path) != wanted:
            raise OutputExists(
                f"{paths.shown(path)} exists and is not that link. It was left as it is."
            ) from None
    return path


def _is_current(target: Path, source: Path, fingerprint: str) -> bool:
    """Whether ``target`` already is this view. Raises :class:`OutputExists` when something else
    stands there."""
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise OutputExists(
            f"{paths.shown(target)}: the view cannot lie inside the checkpoint or contain it. "
            "Choose another place."
        )
    if not os.path.lexists(target):
        return False
    marker = bridge_view.read_marker(target / MARKER)
    if marker is None:
        raise OutputExists(
            f"{paths.shown(target)} exists and is not a bridged view. It was left as it is. "
            "Choose another place."
        )
    shows = Path(os.path.normpath(target / marker["view_of"]))
    if shows != source and nemo2.looks_like(shows):
        raise OutputExists(
            f"{paths.shown(target)} is the view of another checkpoint, {paths.shown(shows)}. "
            "Choose another place."
        )
    return marker["fingerprint"] == fingerprint and bridge_view.is_whole(target)
