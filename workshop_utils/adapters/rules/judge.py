"""Which form lies at a path, whether its reader takes that form, and then the rules of the form."""

import os
from pathlib import Path

from workshop_utils.adapters.rules import dot_nemo, peft
from workshop_utils.adapters.rules.rules import Judgement, first
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import CheckpointError, NotACheckpoint, WorkshopError
from workshop_utils.core.paths import shown

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Reader -> forms it takes, its largest rank by default, and what is not known about it.
READERS: dict[str, tuple[tuple[str, ...], int | None, tuple[str, ...]]] = {
    "trtllm": (
        ("nemo", "hf-peft"),
        None,
        ("the largest rank is fixed when an engine is built: give it with --max-rank",),
    ),
    "nemo": (("nemo",), None, ()),
    "peft": (("hf-peft",), None, ()),
    "vllm": (
        ("hf-peft",),
        16,
        (
            (
                "--max-lora-rank of vLLM is 16 unless it is set: "
                f"{', '.join(map(str, _VLLM_RANKS[:-1]))} or {_VLLM_RANKS[-1]}"
            ),
        ),
    ),
    "nim1": (
        ("nemo", "hf-peft"),
        32,
        (
            (
                "NIM 1.x's own loader is closed: these are its pages' rules and those of the "
                "public TensorRT-LLM and vLLM"
            ),
            (
                "32 is the largest rank of one published profile of NIM 1.x; yours is "
                "NIM_MAX_LORA_RANK (--max-rank)"
            ),
        ),
    ),
    "nim2": (
        ("hf-peft",),
        32,
        (
            (
                "NIM 2.x's own loader is closed: these are its pages' rules and those of the "
                "public vLLM"
            ),
            (
                "the pages give no largest rank; 32 is that of NIM 1.x, yours is NIM_MAX_LORA_RANK "
                "(--max-rank)"
            ),
        ),
    ),
}
_NAMES = {"nemo": "a .nemo", "hf-peft": "a Hugging Face PEFT directory"}
_ALONE = (".nemo", "adapter_config.json")


def judge(path: Path | str, reader: str, max_rank: int | None = None) -> Judgement:
    """Judge the adapter at ``path`` by the public rules of ``reader`` (a key of :data:`READERS`).

    ``path`` is a ``.nemo``, a PEFT directory, or the directory of one adapter in a NIM store.
    ``max_rank`` is the server's largest rank.

    Raises:
        NotACheckpoint: there is no adapter and no checkpoint at all; the message says what is
            there.
        WorkshopError: an unknown reader.
    """
    if reader not in READERS:
        raise WorkshopError(f"Unknown reader {reader!r}: it is one of {', '.join(READERS)}.")
    if max_rank is not None and max_rank < 1:
        raise WorkshopError(f"The largest rank is {max_rank}; it must be 1 or more.")
    path = Path(path)
    forms, usual, notes = READERS[reader]
    found = Judgement(path, reader, notes=list(notes))
    adapter = _adapter_at(found, path)
    if adapter is None:
        return found
    takes = " or ".join(_NAMES[form] for form in forms)
    refused = None if found.form in forms else f"this is {_NAMES[found.form]}"
    if not found.check(
        f"the form: {takes}",
        refused,
        found.again(forms[0], *(["--reader nemo --base DIR"] if reader == "nemo" else [])),
    ):
        return found
    if reader.startswith("nim"):
        _check_store(found, path)
    if found.form == "nemo":
        dot_nemo.check(found, adapter, max_rank or usual)
    else:
        peft.check(found, adapter, max_rank or usual)
    return found


def rank_notes(rank: int, form: str) -> list[str]:
    """How to start the servers that take ``form`` and whose largest rank is below ``rank`` unless
    they are told otherwise."""
    notes = []
    if form == "hf-peft" and rank > READERS["vllm"][1]:
        enough = next((size for size in _VLLM_RANKS if size >= rank), None)
        way = (
            f"start it with --max-lora-rank {enough}"
            if enough
            else f"it takes no rank above {_VLLM_RANKS[-1]}"
        )
        notes.append(f"rank {rank} is above vLLM's default of {READERS['vllm'][1]}: {way}")
    if rank > READERS["nim2"][1]:
        notes.append(
            f"rank {rank} may be above NIM's largest ({READERS['nim2'][1]} in a published "
            f"profile): start it with NIM_MAX_LORA_RANK={rank}"
        )
    return notes


def _adapter_at(found: Judgement, path: Path) -> Path | None:
    """The adapter at ``path``, with ``found.form`` set; None where that is already a broken
    rule."""
    if not path.exists():
        raise NotACheckpoint(
            f"{shown(path)} does not exist."
            if not path.is_symlink()
            else f"{shown(path)} is a link to {os.readlink(path)}, which is gone."
        )
    inside = sorted(path.glob("*.nemo")) if path.is_dir() else []
    if (path / "adapter_config.json").is_file():
        found.form = "hf-peft"
        return path
    if len(inside) > 1:
        found.check(
            "one adapter in a directory",
            f"it holds {', '.join(file.name for file in inside)}",
            "give each adapter a directory of its own",
        )
        return None
    if path.is_file() or inside:
        found.form = "nemo"
        return _nemo(path if path.is_file() else inside[0])
    if nemo2.looks_like(path):
        return _refuse_nemo2(found, path)
    kind = identify(path).kind
    found.check(
        "it is a LoRA adapter",
        f"it is a {kind}",
        "give an adapter: a .nemo or a PEFT directory. A whole model is served as a model",
    )
    return None


def _nemo(file: Path) -> Path:
    """``file``, once it is known to be an archive and no other checkpoint."""
    with file.open("rb") as opened:
        start = opened.read(512)
    if start[257:262] != b"ustar" and start[:2] != b"\x1f\x8b":
        try:
            kind = identify(file).kind
        except NotACheckpoint:
            raise
        except CheckpointError as error:
            raise NotACheckpoint(f"{shown(file)} is no .nemo archive (a tar): {error}") from error
        raise NotACheckpoint(
            f"{shown(file)} is a {kind}, no .nemo and no PEFT directory. Export it: workshop "
            f"export {shown(file)} --to hf-peft"
        )
    return file


def _refuse_nemo2(found: Judgement, path: Path) -> None:
    is_adapter = (path / "weights" / "adapter_metadata.json").is_file()
    what = (
        "an adapter as NeMo 2.0 saves it (weights/*.distcp)"
        if is_adapter
        else "a whole model of NeMo 2.0"
    )
    to = READERS[found.reader][0][-1]
    fix = found.again(to) if is_adapter else "give the adapter; a merged model is served as a model"
    found.check(
        "the form: " + " or ".join(_NAMES[form] for form in READERS[found.reader][0]),
        f"this is {what}, which no server reads",
        fix,
    )


def _check_store(found: Judgement, path: Path) -> None:
    """NIM takes each directory of its store as one adapter, in a container that sees nothing
    else."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    links = [f"{file.name} is a link to {os.readlink(file)}" for file in files if file.is_symlink()]
    found.check(
        "files, and no links: a container sees only the store",
        first(links),
        "copy the file itself there (cp -L)",
    )
    kinds = [file.name for file in files if file.name == _ALONE[1] or file.suffix == _ALONE[0]]
    fault = f"it holds {', '.join(kinds)}" if len(kinds) > 1 else None
    found.check(
        "one adapter in a directory",
        fault,
        "give each adapter a directory of its own; its name is the model's name in the API",
    )
