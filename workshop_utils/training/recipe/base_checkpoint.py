"""The base of a recipe run: from a Hugging Face id, a catalogue name, a directory or NGC to a NeMo
2.0 checkpoint, once.

A checkpoint appears at its place whole or not at all: it is imported into a temporary directory
beside it, which is renamed. A record (``import.json``) in it says what it was made from; only a
checkpoint with the same record that also passes verification is reused.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.checkpoints import sources
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound, verify
from workshop_utils.core import paths
from workshop_utils.core.errors import (
    CheckpointError,
    NotACheckpoint,
    OutputExists,
    WorkshopError,
)
from workshop_utils.core.hashing import of_contents
from workshop_utils.runtime.processes import run_quietly
from workshop_utils.training.recipe import waiting

RECORD = "import.json"
TIMEOUT = 3600.0  # seconds
# A half-written checkpoint holds nothing but these.
_PARTS = {"context", "weights", RECORD}


@dataclass(frozen=True)
class Source:
    """Where a base comes from: ``name`` as it is recorded, and either a ``directory`` or a
    ``model`` that can be fetched."""

    name: str
    directory: Path | None = None
    model: sources.Model | None = None

    @property
    def here(self) -> Path:
        """Its directory on this machine, whether it is there or not."""
        return self.directory or sources.location(self.model)


def import_base(
    hf_model_id: str, target: Path, timeout: float = TIMEOUT, trust: bool = False
) -> Path:
    """The NeMo 2.0 checkpoint of ``hf_model_id`` at ``target``, imported first when it is not
    there; ``target``.

    ``hf_model_id`` is a name of ``workshop models``, ``org/model`` or ``hf://org/model``
    (``@revision`` may follow), a directory (Hugging Face or NeMo 2.0), or
    ``ngc://org/team/model:version``. A NeMo 2.0 source is linked to, not copied.

    Where several processes ask at once, one imports; the others wait up to ``timeout`` seconds and
    say for whom. What an interrupted import left is removed and the import done again. With
    ``trust``, findings of verification are only printed.

    Raises:
        WorkshopError: there is no such model, directory or name.
        FetchError: it could not be downloaded.
        CheckpointError: the source is unsafe, damaged, or of a family that NeMo cannot import.
        OutputExists: ``target`` holds something that this function did not make; nothing is
            replaced.
        WaitedTooLong: another process did not finish in time.
    """
    source, target = find_source(hf_model_id), Path(os.path.abspath(target))
    with waiting.alone_on(target, f"importing {source.name}", timeout):
        waiting.remove_leftovers(target)
        if not _is_reusable(source, target, trust):
            _make(source, target, trust)
    return target


def find_source(hf_model_id: str) -> Source:
    """What ``hf_model_id`` names; nothing is fetched. Raises WorkshopError, with the nearest names,
    when it is nothing."""
    name = hf_model_id.strip()
    if name.startswith("ngc://"):
        address = name.removeprefix("ngc://")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}:[\w.-]+", address):
            raise WorkshopError(
                f"hf_model_id: {name} is no NGC name: ngc://org/team/model:version, for instance "
                "ngc://nvidia/nemo/llama-3_2-1b-instruct:2.0."
            )
        return _at("ngc", address, None, name)
    plain = name.removeprefix("hf://").rstrip("/")
    if Path(plain).expanduser().is_dir():
        directory = Path(plain).expanduser().resolve()
        return Source(str(directory), directory=directory)
    if plain.startswith((".", "/", "~")) or plain.count("/") > 1:
        raise WorkshopError(
            f"hf_model_id: {plain} is no directory. Give a Hugging Face id (org/model), a name "
            "of `workshop models` or a directory."
        )
    if "/" not in plain:
        return Source(plain, model=sources.find(plain))
    address, _, revision = plain.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise WorkshopError(
            f"hf_model_id: {name} is no Hugging Face id: org/model, or org/model@revision."
        )
    return _at("huggingface", address, revision or None, plain)


def _at(source: str, address: str, revision: str | None, name: str) -> Source:
    """The model of the catalogue at ``address``, else one that it does not list: the licence of
    that is not known here, so the messages point to its page."""
    for model in sources.catalogue().values():
        same = (model.source, model.address) == (source, address)
        if same and revision in (None, model.revision):
            return Source(model.name, model=model)
    page, form = "https://catalog.ngc.nvidia.com", "nemo2"
    if source == "huggingface":
        page, form = f"https://huggingface.co/{address}", "huggingface"
    folder = re.sub("[/:]", "--", name.removeprefix("ngc://"))
    about = (revision, 0, "see its page", page, False, form, {})
    return Source(name, model=sources.Model(folder, address, 0, source, address, *about))


def _make(source: Source, target: Path, trust: bool) -> None:
    """Fetch ``source`` where needed, import it (or link to it), and rename the result to
    ``target``."""
    directory = _fetched(source)
    kind = identify(directory).kind
    if kind not in (Kind.HUGGINGFACE, Kind.NEMO2):
        raise NotACheckpoint(
            f"{paths.shown(directory)} is a {kind}; a base is a Hugging Face model or a NeMo 2.0 "
            "checkpoint. `workshop convert` may help."
        )
    from workshop_utils.checkpoints.convert.huggingface import check

    with paths.new_directory(target) as part:
        if kind is Kind.NEMO2:
            directory = nemo2.locate(directory).resolve()
            require_sound(directory, trust, (Kind.NEMO2,))
            for name in ("context", "weights"):
                (part / name).symlink_to(directory / name, target_is_directory=True)
        else:
            # The process that imports does so, too, but its errors come back as text, and what it
            # prints in spite of them is not seen.
            check(directory)
            require_sound(directory, trust, (Kind.HUGGINGFACE,))
            print(f"importing {source.name} with NeMo", file=sys.stderr, flush=True)
            run_import(directory, part, trust)
        revision = source.model and source.model.revision
        record = {"source": source.name, "revision": revision, "files": of_contents(directory)}
        (part / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def run_import(source: Path, folder: Path, trust: bool, *options: str) -> None:
    """``workshop import``, which fills the empty ``folder``, in a process of its own: Lightning
    refuses to build NeMo's trainer in a notebook's kernel."""
    out = folder / "checkpoint"
    words = [str(source), "--out", str(out), *options, *(["--trust"] if trust else [])]
    run_quietly("import", *words)
    for part in out.iterdir():
        part.rename(folder / part.name)
    out.rmdir()


def _fetched(source: Source) -> Path:
    """The directory of ``source``, downloaded first when it is not here."""
    if source.directory:
        return source.directory
    if source.model.name in sources.catalogue():
        return sources.fetch(source.model.name)
    if not sources.is_present(source.model):
        source.here.parent.mkdir(parents=True, exist_ok=True)
        with waiting.alone_on(source.here, f"fetching {source.name}", TIMEOUT):
            if not sources.is_present(source.model):
                sources.source_of(source.model).download(source.model, source.here)
    return source.here


def _is_reusable(source: Source, target: Path, trust: bool) -> bool:
    """Whether ``target`` is a whole import of ``source``; says why not on standard error. Raises
    OutputExists for foreign content."""
    if not target.exists() and not target.is_symlink():
        return False
    where, record = paths.shown(target), _read_record(target)
    foreign = not target.is_dir() or {item.name for item in target.iterdir()} - _PARTS
    sound = not foreign and _is_sound(target, trust)
    if foreign or (record is None and sound):
        what = "something that is no import of this command"
        what = "a checkpoint, and nothing says what it was made from" if sound else what
        raise OutputExists(
            f"{where} holds {what}. Nothing was replaced. Move it away, or set nemo_ckpt_dir to "
            "another directory."
        )
    fault = "is not whole (an interrupted or damaged import)"
    if sound:
        fault = (other := _difference(record, source)) and f"was made from {other}"
    if fault:
        print(f"{where} {fault}; it is imported again.", file=sys.stderr)
    return not fault


def _is_sound(target: Path, trust: bool) -> bool:
    try:
        report = verify(target)
    except NotACheckpoint:
        return False
    if not report.sound and trust and report.checkpoint is not None:
        require_sound(target, trust)
        return True
    return report.sound


def _read_record(target: Path) -> dict | None:
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _difference(record: dict, source: Source) -> str | None:
    """What ``record`` was made from, where that is not ``source`` as it is now. A source that has
    been removed since is not compared."""
    if record.get("source") != source.name:
        return f"{record.get('source')}, not from {source.name}"
    if source.model and record.get("revision") != source.model.revision:
        return f"revision {record.get('revision')}, not {source.model.revision}"
    try:
        changed = source.here.is_dir() and record.get("files") != of_contents(source.here)
    except CheckpointError:
        return None
    return f"another state of {paths.shown(source.here)}" if changed else None
