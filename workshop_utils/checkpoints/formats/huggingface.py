"""Hugging Face model and PEFT adapter directories: ``config.json`` and the headers of the
safetensors files.

A safetensors file begins with the length of its header (8 bytes, little-endian), then the header:
JSON that maps each tensor to dtype, shape and byte range in the rest of the file. Source: the
safetensors format description, and transformers' names of files.
"""

import dataclasses
import os
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import architecture as shape
from workshop_utils.checkpoints.formats import (
    huggingface_config,
    lora_layout,
    safe_text,
    saved_tensors,
    tokenizer_files,
)
from workshop_utils.checkpoints.formats.architecture import Architecture, number, size
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.gpt_classes import ROPE_SCALING, TITLES
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Tensor, whole
from workshop_utils.core.errors import (
    CheckpointError,
    DamagedCheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)
from workshop_utils.core.paths import shown

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """A tensor that does not fit its file, or its index, goes to ``report``."""
    config, notes = read_json(path / "config.json"), []
    try:
        config = huggingface_config.spelled(config, shown(path / "config.json"))
    except UnsupportedCheckpoint as error:
        notes.append(str(error))
    except DamagedCheckpoint as fault:
        report(fault)
    files = weight_files(path, report=report)
    tensors = read_tensors(files, report)
    _check_index(path, files, tensors, report)
    if code := ", ".join(sorted(file.name for file in path.glob("*.py"))[:5]):
        notes.append(f"brings code along, which trust_remote_code=True would run: {code}")
    if method := huggingface_config.quantised(config):
        notes.append(f"quantised: {method}")
    return _checkpoint(
        path,
        Kind.HUGGINGFACE,
        str(config.get("model_type")),
        files,
        tensors,
        architecture=architecture(config, {tensor.name for tensor in tensors}),
        adapter=None,
        notes=tuple(notes),
        version=_version("transformers", config),
    )


def describe_peft(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the adapter directory ``path``; faults as :func:`describe`."""
    config = read_json(path / "adapter_config.json")
    files = weight_files(path, "adapter_model", "adapter_model", report)
    tensors = read_tensors(files, report)
    stated, notes = adapter(config), ()
    if lora := lora_layout.find(tensors):
        stated = dataclasses.replace(
            stated,
            rank=stated.rank or lora.rank,
            targets=stated.targets or lora.targets,
            variant="DoRA" if lora.is_dora else stated.variant,
        )
        if len(lora.ranks) > 1:
            notes = (f"its modules have different ranks: {', '.join(map(str, lora.ranks))}",)
    return _checkpoint(
        path,
        Kind.PEFT,
        str(config.get("peft_type")),
        files,
        tensors,
        architecture=None,
        adapter=stated,
        notes=notes,
        version=_version("PEFT", config),
    )


def _checkpoint(
    path: Path, kind: Kind, detail: str, files: list[Path], tensors: list[Tensor], **more: Any
) -> Checkpoint:
    return Checkpoint(
        path=path,
        kind=kind,
        detail=detail,
        nbytes=sum(file.stat().st_size for file in files),
        tensors=tuple(tensors),
        tokenizer=tokenizer_files.describe(path),
        **more,
    )


def _version(library: str, config: Mapping[str, Any]) -> str | None:
    version = shape.text(config, f"{library.lower()}_version")
    return None if version is None else f"{library} {version}"


def read_safetensors(path: Path, report: Report = stop) -> list[Tensor]:
    """The tensors of one safetensors file, from its header. A tensor that does not fit the file
    goes to ``report``.

    Raises :class:`DamagedCheckpoint` when the header cannot be read.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        (header_length,) = struct.unpack("<Q", start) if len(start) == 8 else (length,)
        if header_length > min(length - 8, safe_text.MAX_BYTES):
            raise DamagedCheckpoint(f"{shown(path)} is no safetensors file, or it is cut off.")
        header = safe_text.parse_json(file.read(header_length), f"{shown(path)} (header)")
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        try:
            tensors.append(_tensor(path, name, entry, 8 + header_length, length))
        except CheckpointError as fault:
            report(fault)
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    """``data`` is where the tensors begin in the file of ``size`` bytes."""

    def damaged(why: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{shown(path)}{why}", name)

    if not isinstance(entry, dict):
        raise damaged(f": {name} has no description.")
    dims, offsets, kind = entry.get("shape"), entry.get("data_offsets"), str(entry.get("dtype"))
    sound = isinstance(dims, list) and isinstance(offsets, list) and len(offsets) == 2
    if not sound or not all(type(item) is int and 0 <= item < 2**63 for item in dims + offsets):
        raise damaged(f": {name} has no sound shape and byte range.")
    start, end = offsets
    place = path.name, data + start, end - start
    tensor = whole(name, tuple(dims), _DTYPES.get(kind, kind), *place)
    if end > size - data:
        raise damaged(
            f" is cut off: {name} ends at byte {end:,} of {size - data:,}. Copy it again."
        )
    if tensor.dtype in DTYPE_BYTES and tensor.nbytes != end - start:
        raise damaged(f": {name} has {end - start:,} bytes; its shape needs {tensor.nbytes:,}.")
    return tensor


def weight_files(
    path: Path, stem: str = "model", torch_stem: str = "pytorch_model", report: Report = stop
) -> list[Path]:
    """The files with the weights in the directory ``path``, in the order in which transformers
    looks for them.

    That is ``model.safetensors``, ``model.safetensors.index.json``, ``pytorch_model.bin`` and its
    index. Raises :class:`DamagedCheckpoint` when there is none. An indexed one that is missing, or
    whose name leaves the directory, goes to ``report``.
    """
    for single in (f"{stem}.safetensors", f"{torch_stem}.bin"):
        if (path / single).is_file():
            return [path / single]
        if (path / f"{single}.index.json").is_file():
            return _indexed(path, path / f"{single}.index.json", report)
    raise DamagedCheckpoint(
        f"{shown(path)} has no weights: neither {stem}.safetensors nor {torch_stem}.bin, nor an "
        "index of parts."
    )


def _indexed(path: Path, index: Path, report: Report) -> list[Path]:
    parts = shape.section(read_json(index), "weight_map")
    if not parts or not all(isinstance(part, str) for part in parts.values()):
        raise DamagedCheckpoint(f"{shown(index)} has no weight_map.")
    there = []
    for name in sorted(set(parts.values())):
        file = path / name
        if not re.fullmatch(r"[\w.\-]+", name) or name.startswith("."):
            report(UnsafeCheckpoint(f"{shown(index)} names {name!r}, which is no file beside it."))
        elif not file.is_file():
            missing = f"{shown(file)} is missing; {index.name} lists it. Fetch the model again."
            report(DamagedCheckpoint(missing))
        else:
            there.append(file)
    return there


def _check_index(path: Path, files: list[Path], tensors: list[Tensor], report: Report) -> None:
    indexes = [path / f"{name}.index.json" for name in _SINGLE]
    index = next((file for file in indexes if file.is_file()), None)
    # transformers looks for the one file first, and then not at the index.
    if index is None or (files and files[0].name in _SINGLE):
        return
    there = {(tensor.name, tensor.chunks[0].file) for tensor in tensors}
    for name, part in read_json(index)["weight_map"].items():
        if (name, part) not in there:
            says = f"{shown(index)} says that {name} is in {part}, and it is not."
            report(DamagedCheckpoint(f"{says} Fetch the model again.", name))


def read_tensors(files: list[Path], report: Report = stop) -> list[Tensor]:
    """Of :func:`weight_files`; one that cannot be read goes to ``report`` too."""
    tensors: list[Tensor] = []
    for path in files:
        try:
            if path.suffix == ".safetensors":
                tensors += read_safetensors(path, report)
            else:
                with path.open("rb") as file:
                    tensors += saved_tensors.read(file, shown(path), path.name, report)
        except CheckpointError as fault:
            report(fault)
    return tensors


def architecture(config: Mapping[str, Any], names: Collection[str] = ()) -> Architecture | None:
    """The sizes in a ``config.json`` (:func:`.huggingface_config.spelled`), or None when it is not
    one of a Llama-like decoder.

    ``names`` are those of the tensors, which tell what the configuration leaves out: whether the
    embedding is tied.
    """
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    tied, config = config.get("tie_word_embeddings"), huggingface_config.with_defaults(config)
    scaling = config.get("rope_scaling")
    if not isinstance(tied, bool):
        # transformers leaves it out where it is the default of the model's class.
        tied = bool(names) and not any(name.endswith("lm_head.weight") for name in names)
    kind = str(config.get("model_type"))
    return shape.read(
        config,
        (*sizes, "num_key_value_heads", "head_dim"),
        vocabulary=size(config, "vocab_size"),
        tied=tied,
        rope_base=number(config, "rope_theta", 10000.0),
        rope_scaling=_rope_scaling(scaling) if isinstance(scaling, Mapping) else None,
        family=TITLES.get(kind, kind),
        experts=next((count for name in _EXPERTS if (count := size(config, name))), None),
        qk_norm=any(name.endswith(".q_norm.weight") for name in names),
    )


def _rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling under NeMo's names; other kinds as they are."""
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return dict(scaling)
    names = {"scale_factor": "factor", "old_context_len": "original_max_position_embeddings"}
    return {name: scaling.get(names.get(name, name)) for name in ROPE_SCALING}


def adapter(config: Mapping[str, Any]) -> Adapter:
    """A base that is not a path may be a name on the Hub: ``base_is_here`` is None."""
    base, targets = shape.text(config, "base_model_name_or_path"), config.get("target_modules")
    here = bool(base) and os.path.isdir(base)
    looks_local = base and (here or os.path.isabs(base) or base.startswith("."))
    kind = "LoRA" if config.get("peft_type") == "LORA" else str(config.get("peft_type"))
    targets = sorted(map(str, targets)) if isinstance(targets, list) else filter(None, [targets])
    return Adapter(
        rank=size(config, "r"),
        alpha=number(config, "lora_alpha"),
        targets=tuple(targets),
        base=base or None,
        base_is_here=here if looks_local else None,
        variant="DoRA" if config.get("use_dora") is True else kind,
    )
