"""Which checkpoint of a run: the one with the lowest validation loss, or the last.

NeMo's ModelCheckpoint writes both into the name, ``NAME--val_loss=0.4321-step=39``, and ends the
last one's in ``-last``: a link to the best where that is the last, else a directory. Modification
times say nothing: a copy, a download or a repaired file changes them.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint
from workshop_utils.core.paths import shown

LAST = "-last"
_NEEDED = ("weights/metadata.json", "weights/.metadata", "context/model.yaml")
_NUMBER = r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|[-+]?inf)(?=-|$)"
_LOSS = re.compile(rf"val_loss={_NUMBER}", re.IGNORECASE)
_STEP = re.compile(r"(?<![a-z_])step=(\d+)(?=-|$)")


@dataclass(frozen=True)
class Saved:
    """One checkpoint of a run: ``val_loss`` and ``step`` as its name tells them, None where it does
    not (or says nan), and why it is half-written, if it is."""

    path: Path
    val_loss: float | None
    step: int | None
    is_last: bool
    fault: str | None


def choose(run_dir: Path | str, which: str = "best") -> Path:
    """The checkpoint ``which`` of the run in ``run_dir``: "best", "last", or the path of one, which
    is only looked at for being whole.

    A half-written checkpoint is never chosen; which were passed over is said on standard error.

    Args:
        run_dir: a checkpoint directory, or anything above one directory ``checkpoints/``.

    Raises:
        NotACheckpoint: there is none, or there are several runs below ``run_dir``, or no name tells
            what the choice needs.
        DamagedCheckpoint: all there are, or the one that was named, are half-written.
    """
    if which not in ("best", "last"):
        return _named(Path(run_dir), which)
    if nemo2.looks_like(Path(run_dir)):
        return _named(Path(run_dir), str(run_dir))
    folder, saved = _checkpoints(Path(run_dir))
    whole = [state for state in saved if not state.fault]
    faults = [state for state in saved if state.fault]
    if not whole:
        lines = "".join(f"\n- {state.path.name}: {state.fault}" for state in faults)
        raise DamagedCheckpoint(
            f"No checkpoint in {shown(folder)} is whole; the run was interrupted. Train on from "
            f"there, or again.{lines}"
        )
    for state in faults:
        print(f"note: {shown(state.path)} is passed over: {state.fault}", file=sys.stderr)
    return (_best if which == "best" else _last)(whole, folder).path


def read_name(path: Path) -> Saved:
    """What the name of the checkpoint ``path`` says, and whether it is whole."""
    losses, steps = (p.findall(path.name.removesuffix(LAST)) for p in (_LOSS, _STEP))
    loss, step = (float(said[-1]) if said else math.nan for said in (losses, steps))
    return Saved(
        path,
        None if math.isnan(loss) else loss,
        None if math.isnan(step) else int(step),
        path.name.endswith(LAST),
        _fault(path),
    )


def _best(whole: list[Saved], folder: Path) -> Saved:
    """The lowest loss; of equal ones the later. What is saved last was not validated in that state,
    its name repeats an older loss."""
    known = [state for state in whole if state.val_loss is not None and not state.is_last]
    if not known:
        names = ", ".join(state.path.name for state in whole)
        raise NotACheckpoint(
            f"No name in {shown(folder)} tells a validation loss (val_loss=NUMBER): {names}. Ask "
            "for the last one (checkpoint=last), or name one."
        )
    return min(known, key=lambda state: (state.val_loss, -(state.step or 0)))


def _last(whole: list[Saved], folder: Path) -> Saved:
    """The one of the highest step; at the same step, what ends in ``-last``. Without steps, the
    only ``-last`` or the only one."""
    if all(state.step is not None for state in whole):
        return max(whole, key=lambda state: (state.step, state.is_last))
    candidates = [state for state in whole if state.is_last] or whole
    if len(candidates) > 1:
        names = ", ".join(state.path.name for state in candidates)
        raise NotACheckpoint(
            f"Which checkpoint in {shown(folder)} is the last cannot be told from their names "
            f"(step=NUMBER): {names}. Name one."
        )
    return candidates[0]


def _checkpoints(run_dir: Path) -> tuple[Path, list[Saved]]:
    """The directory that holds the run's checkpoints, and these by step."""
    where = shown(run_dir)
    if not run_dir.is_dir():
        raise NotACheckpoint(f"{where} does not exist: nothing has been trained there.")
    folders = [run_dir] if _candidates(run_dir) else sorted(run_dir.rglob("checkpoints"))
    folders = [folder for folder in folders if _candidates(folder)]
    if not folders:
        raise NotACheckpoint(
            f"{where} holds no checkpoint: train first, or give the run's directory "
            "(nemo_logs_dir)."
        )
    if len(folders) > 1:
        raise NotACheckpoint(
            f"{where} holds the checkpoints of {len(folders)} runs; give one of them "
            f"(nemo_logs_dir): {', '.join(map(shown, folders))}"
        )
    saved = map(read_name, _candidates(folders[0]))
    return folders[0], sorted(
        saved,
        key=lambda state: (state.step is not None, state.step, state.is_last, state.path.name),
    )


def _candidates(folder: Path) -> list[Path]:
    """Directories of ``folder`` that are, or were to become, a checkpoint. A link to nowhere is
    left over from a removed one."""
    return [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir()
        and (nemo2.looks_like(path) or _marker(path).exists() or (path / "weights").is_dir())
    ]


def _named(run_dir: Path, which: str) -> Path:
    """The checkpoint at the path ``which``, or of that name in the run."""
    path = Path(which)
    if not path.exists() and run_dir.is_dir():
        path = next(
            (state.path for state in _checkpoints(run_dir)[1] if state.path.name == which), path
        )
    path = nemo2.locate(path)
    if fault := _fault(path):
        raise DamagedCheckpoint(f"{shown(path)} is half-written: {fault}")
    return path


def _marker(path: Path) -> Path:
    """The file that NeMo keeps beside a checkpoint while it writes or removes it."""
    return path.with_name(f"{path.name}-unfinished")


def _fault(path: Path) -> str | None:
    """Why ``path`` is half-written, in words, or None. What lies in the files is the business of
    ``workshop verify``."""
    for marker in (_marker(path), _marker(path.resolve())):
        if marker.exists():
            name = marker.name
            return f"{name} stands beside it, NeMo's mark of a checkpoint that it had not finished"
    return next((f"{name} is missing" for name in _NEEDED if not (path / name).is_file()), None)
