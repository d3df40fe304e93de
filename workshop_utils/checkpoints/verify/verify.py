"""Is a checkpoint whole, and safe to load? Sizes, indexes and headers are read; the weights
themselves only on request."""

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import (
    gpt_config,
    huggingface_config,
    nemo1,
    nemo1_config,
    nemo_archive,
    tokenizer_files,
    torch_dist,
)
from workshop_utils.checkpoints.formats.architecture import section, text
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.findings import Code, Severity
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.safe_text import read_json, read_yaml
from workshop_utils.checkpoints.formats.summary import Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify import adapters, companions, pickles, places, ranks, shapes
from workshop_utils.checkpoints.verify import manifest as manifests
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core import terminal
from workshop_utils.core.errors import CheckpointError, NotACheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

_SHOWN = 20


def verify(
    path: Path | str, deep: bool = False, manifest: Path | str | None = None, progress: bool = False
) -> Report:
    """Look for everything that is wrong with the checkpoint ``path``; nothing that a file contains
    is run.

    Reads indexes, headers, configurations and the sizes of files; with ``deep`` also every value,
    once, file by file (memory stays near twice the largest chunk), and with ``manifest`` (see
    :mod:`.manifest`) every byte. ``progress`` shows a bar for these.

    Raises :class:`NotACheckpoint` for what is none, with the right path where one is near.
    Everything else is in the report.
    """
    path = Path(path)
    report = Report(path)
    try:
        report.checkpoint = identify(path, report.add)
        _check(report, report.checkpoint, deep, progress)
    except NotACheckpoint:
        raise
    except CheckpointError as fault:
        report.add(fault)
    except OSError as error:
        file = shown(error.filename or path)
        report.damaged(f"{file} cannot be read: {error.strerror}.", file=file)
    _check_manifest(report, Path(manifest) if manifest else None, progress)
    return report


def require_sound(path: Path | str, trust: bool = False, kinds: Collection[Kind] = ()) -> None:
    """Raise the most serious finding about the checkpoint ``path``, with all of them listed; return
    when there is none.

    Without torch, and no weight is read. Raises :class:`NotACheckpoint`, :class:`UnsafeCheckpoint`
    before :class:`DamagedCheckpoint` before :class:`UnsupportedCheckpoint`. With ``trust`` the
    findings go to standard error instead. ``kinds`` are those that the caller is about to load: in
    a directory with files of two formats, another one may have been verified.
    """
    try:
        report = verify(path)
    except NotACheckpoint as error:
        if not trust:
            raise
        print(f"warning: {terminal.one_line(str(error))}", file=sys.stderr)
        return
    if kinds and report.checkpoint and report.checkpoint.kind not in kinds:
        report.add(
            UnsupportedCheckpoint(
                f"{shown(path)} is a {report.checkpoint.kind}, and has been verified as that; "
                f"what would be loaded here is a {' or a '.join(kinds)}. If it holds files of "
                "both, take those of the other format out."
            )
        )
    worst = report.worst
    if worst is None:
        return
    others = [finding for finding in report.refused if finding is not worst]
    lines = [terminal.one_line(str(worst))]
    lines += [f"- {terminal.one_line(str(other))}" for other in others[: _SHOWN - 1]]
    if len(others) >= _SHOWN:
        lines.append(f"- and {len(others) - _SHOWN + 1} more")
    if trust:
        first = f"warning: {report.verdict}. It is used all the same, as you asked."
        print(first, *lines, sep="\n", file=sys.stderr)
        return
    lines.append(
        f"All of it: workshop verify {shown(path)}. To use it all the same: --trust, or trust=True."
    )
    raise type(worst.error())("\n".join(lines), worst.tensor, worst.code)


def _check(report: Report, checkpoint: Checkpoint, deep: bool, progress: bool) -> None:
    """The checks that every format shares, then those of this one."""
    base = checkpoint.path if checkpoint.path.is_file() else checkpoint.path / checkpoint.folder
    report.where = shown(base)
    tensors, held = list(checkpoint.tensors), []
    if (base / torch_dist.INDEX).is_file():
        # With the optimizer's tensors and the objects that are no tensors, which the description
        # leaves out.
        index = torch_dist.read_directory(base, report.add)
        tensors = list(index.tensors.values())
        report.objects = index.objects
        held = [
            places.Range(item.file, item.start, item.start + item.length, item.name)
            for item in index.objects.values()
        ]
        pickles.check_objects(report, checkpoint)
    held += places.ranges(tensors)
    named = {part.file for part in held}
    sizes = _sizes(checkpoint, base, named)
    places.check_files(report, sizes, held, _data_starts(base, sizes))
    places.check_chunks(report, tensors)
    companions.note_leftovers(report, checkpoint.path, base, named)
    _BY_KIND.get(checkpoint.kind, _check_others)(report, checkpoint, base)
    if deep:
        from workshop_utils.checkpoints.verify import deep as values

        values.check(report, checkpoint, tensors, progress)


def _sizes(checkpoint: Checkpoint, base: Path, named: set[str]) -> dict[str, int]:
    """Bytes of each file that the tensors name and that is there."""
    if checkpoint.kind in (Kind.NEMO1_ARCHIVE, Kind.NEMO1_ARCHIVE_ADAPTER):
        return {member.name: member.size for member in nemo_archive.members(checkpoint.path)}
    if base.is_file():
        return dict.fromkeys(named or {base.name}, base.stat().st_size)
    return {name: (base / name).stat().st_size for name in named if (base / name).is_file()}


def _data_starts(base: Path, sizes: Collection[str]) -> dict[str, int]:
    """First byte after the header of each safetensors file; what follows has to belong to exactly
    one tensor."""
    starts = {}
    for name in sizes:
        if name.endswith(".safetensors") and base.is_dir():
            with (base / name).open("rb") as file:
                starts[name] = 8 + int.from_bytes(file.read(8), "little")
    return starts


def _check_nemo2(report: Report, checkpoint: Checkpoint, weights: Path) -> None:
    context, tensors = checkpoint.path / "context", checkpoint.tensors
    companions.check_backend(report, weights)
    pickles.check_common(report, checkpoint)
    model = read_yaml(context / "model.yaml")
    companions.check_targets(report, context / "model.yaml", model)
    io = context / "io.json"
    if io.is_file():
        companions.check_targets(report, io, read_json(io))
    else:
        why = "NeMo 2.0 builds the model from it. Copy the checkpoint again."
        message = f"{shown(io)} is missing; {why}"
        report.damaged(message, code=Code.MISSING_FILE, file=shown(io))
    companions.check_tokenizer(report, context, model)
    config = shown(context / "model.yaml")
    fields = _fields(report, lambda: gpt_config.read_fields(model, config))
    if checkpoint.kind is Kind.NEMO2_ADAPTER:
        rank = section(model, "model_transform").get("dim")
        adapters.check_nemo2(report, tensors, fields, rank)
        adapters.base_note(report, checkpoint.adapter.base)
    elif fields:
        shapes.check_megatron(report, tensors, fields, config)
    else:
        shapes.check_uniform(report, tensors, checkpoint.architecture)
    stated = text(section(section(model, "config"), "params_dtype"), "_target_")
    shapes.check_dtypes(report, tensors, stated and stated.removeprefix("torch."))


def _check_nemo1(report: Report, checkpoint: Checkpoint, weights: Path) -> None:
    path, tensors, parallel = checkpoint.path, checkpoint.tensors, checkpoint.parallel
    config = nemo1.read_config(Files(path))
    described = f"{shown(path)}:{nemo_archive.CONFIG}"
    companions.check_targets(report, f"{path}:{nemo_archive.CONFIG}", config)
    if path.is_file():
        report.checked.append(
            "the archive holds only files, each once, and no name leads out of it"
        )
        if index := pickles.archived_index(checkpoint):
            report.objects = index.objects
            pickles.check_common(report, checkpoint, pickles.SHARDED)
            pickles.check_objects(report, checkpoint, pickles.SHARDED)
    _check_state(report, checkpoint, weights)
    shapes.check_dtypes(report, tensors)
    fields = None
    if checkpoint.adapter:
        if parallel == (1, 1):
            adapters.check_nemo1(report, config, tensors)
        adapters.base_note(report, checkpoint.adapter.base)
    else:
        fields = _fields(report, lambda: nemo1_config.read_fields(config, described)[0])
    if parallel != (1, 1):
        ranks.check(report, tensors, parallel, fields, nemo_archive.CONFIG)
    elif fields:
        shapes.check_megatron(report, tensors, fields, nemo_archive.CONFIG)
    elif not checkpoint.adapter:
        shapes.check_uniform(report, tensors, checkpoint.architecture)


def _check_state(report: Report, checkpoint: Checkpoint, weights: Path) -> None:
    if (weights / torch_dist.INDEX).is_file():
        companions.check_backend(report, weights)
        pickles.check_common(report, checkpoint)


def _fields(report: Report, read: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """None where the family is not known or a field is faulty, which the report then says."""
    try:
        return read()
    except UnsupportedCheckpoint as error:
        message = f"whether names and shapes fit the architecture: {error}"
        report.unknown(message, Code.ARCHITECTURE)
    except CheckpointError as error:
        report.add(error)
    return None


def _check_megatron(report: Report, checkpoint: Checkpoint, weights: Path) -> None:
    _check_state(report, checkpoint, weights)
    run_config = checkpoint.path / "run_config.yaml"
    if run_config.is_file():
        companions.check_targets(report, run_config, read_yaml(run_config))
    _check_others(report, checkpoint, weights)


def _check_hugging_face(report: Report, checkpoint: Checkpoint, base: Path) -> None:
    config = read_json(base / "config.json")
    tensors, sizes = checkpoint.tensors, checkpoint.architecture
    _check_index(report, base, tensors)
    quantised = huggingface_config.quantised(config)
    if checkpoint.detail in shapes.HUGGING_FACE and sizes and not quantised:
        shapes.check_hugging_face(report, tensors, sizes, checkpoint.detail)
    else:
        why = (
            "it is quantised" if quantised else f"the family {checkpoint.detail} is not known here"
        )
        report.unknown(f"whether names and shapes fit config.json: {why}", Code.ARCHITECTURE)
        shapes.check_uniform(report, tensors, sizes)
    if not quantised:
        stated = config.get("dtype") or config.get("torch_dtype")
        shapes.check_dtypes(report, tensors, stated and str(stated).removeprefix("torch."))
    for fault in tokenizer_files.faults(base):
        report.add(fault)
    for finding in huggingface_config.findings(base, checkpoint.dtype):
        # NeMo's importer would not take it: nothing is wrong with the model.
        refused = finding.severity is Severity.REFUSED
        report.keep(replace(finding, severity=Severity.NOTE) if refused else finding)


def _check_index(report: Report, base: Path, tensors: tuple[Tensor, ...]) -> None:
    """No part holds a tensor that the index leaves out, or has in another part (the other direction
    is the reader's)."""
    wholes = ("model.safetensors", "pytorch_model.bin")
    whole = next((name for name in wholes if (base / f"{name}.index.json").is_file()), None)
    index = f"{whole}.index.json"
    parts = read_json(base / index).get("weight_map") if whole else None
    if not isinstance(parts, dict) or (base / whole).is_file():
        return
    for tensor in tensors:
        for file in tensor.files:
            if parts.get(tensor.name) != file:
                said = f"in {parts[tensor.name]}" if tensor.name in parts else "nowhere"
                path = shown(base / file)
                message = f"{path} holds {tensor.name}, which {index} has {said}."
                report.damaged(message, tensor.name, Code.INDEX, file=path, source=index)
    for file in sorted(base.glob(f"*{Path(whole).suffix}")):
        if file.name not in parts.values():
            message = f"{shown(file)} is not in {index}; nothing reads it."
            report.note(message, Code.UNREAD_FILE, file=shown(file), source=index)
    report.checked.append(f"{index} and the files agree on where each tensor is")


def _check_peft(report: Report, checkpoint: Checkpoint, base: Path) -> None:
    adapters.check_peft(report, checkpoint.tensors, read_json(base / "adapter_config.json"))
    shapes.check_dtypes(report, checkpoint.tensors)
    if checkpoint.adapter and checkpoint.adapter.base_is_here is False:
        adapters.base_note(report, checkpoint.adapter.base)


def _check_others(report: Report, checkpoint: Checkpoint, base: Path) -> None:
    if checkpoint.parallel == (1, 1):
        shapes.check_uniform(report, checkpoint.tensors, checkpoint.architecture)
        message = "whether the shapes fit the architecture: that is not looked at in this format"
        report.unknown(message, Code.ARCHITECTURE)
    else:
        # The parts of pipeline stages number their layers from 0, each.
        ranks.check(report, checkpoint.tensors, checkpoint.parallel)
    # A GGUF file mixes quantised types on purpose.
    if checkpoint.kind is not Kind.GGUF:
        shapes.check_dtypes(report, checkpoint.tensors)


_BY_KIND: dict[Kind, Callable[[Report, Checkpoint, Path], None]] = {
    Kind.NEMO2: _check_nemo2,
    Kind.NEMO2_ADAPTER: _check_nemo2,
    Kind.NEMO1_ARCHIVE: _check_nemo1,
    Kind.NEMO1_ARCHIVE_ADAPTER: _check_nemo1,
    Kind.NEMO1_DIRECTORY: _check_nemo1,
    Kind.BRIDGED_VIEW: _check_nemo1,
    Kind.MEGATRON: _check_megatron,
    Kind.HUGGINGFACE: _check_hugging_face,
    Kind.PEFT: _check_peft,
}


def _check_manifest(report: Report, file: Path | None, progress: bool) -> None:
    """All files come from one save if they are those of the manifest; without one nobody can
    tell."""
    if file is None:
        beside = manifests.default_path(report.path)
        how = (
            f"--manifest {shown(beside)} tells"
            if beside.is_file()
            else "there is no manifest (--write-manifest writes one)"
        )
        report.unknown(
            f"whether all shards come from one save, and nothing was exchanged since: {how}",
            Code.ORIGIN,
        )
        return
    try:
        differences = manifests.compare(report.path, file, progress)
    except CheckpointError as error:
        report.add(error)
        return
    listed = shown(file)
    said = {
        name: f"is not the file of {listed}{_held(report, name)}" for name in differences.changed
    }
    said |= {name: f"is missing; {listed} lists it" for name in differences.missing}
    said |= {name: f"is not in {listed}; it was added since" for name in differences.new}
    for name, what in said.items():
        message = f"{shown(report.path)}: {name} {what}."
        report.damaged(message, code=Code.MANIFEST, file=name, source=listed)
    if not differences:
        report.checked.append(
            f"every file is the one of {listed}, so that all shards come from the save it was "
            "written after"
        )


def _held(report: Report, name: str) -> str:
    """Which tensors lie in the file ``name`` of the checkpoint, in words."""
    if report.checkpoint is None:
        return ""
    inside = name.removeprefix(f"{report.checkpoint.folder}/")
    held = [tensor.name for tensor in report.checkpoint.tensors if inside in tensor.files]
    return f"; it holds {places.some(held)}" if held else ""
