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

from workshop_utils.checkpoints.formats import (
    lora_layout,
    safe_text,
    saved_tensors,
    tokenizer_files,
)
from workshop_utils.checkpoints.formats.architecture import (
    Architecture,
    number,
    section,
    size,
    text,
)
from workshop_utils.checkpoints.formats.decoder_config import FAMILIES
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, Tensor, whole
from workshop_utils.core.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
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


def describe(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the model directory ``path``; a tensor that does not fit its file, or its index,
    goes to ``report``."""
    config = read_json(path / "config.json")
    files = weight_files(path, report=report)
    tensors = read_tensors(files, report)
    _check_index(path, files, tensors, report)
    version = config.get("transformers_version")
    return Checkpoint(
        path=path,
        kind=Kind.HUGGINGFACE,
        detail=str(config.get("model_type")),
        architecture=architecture(config, {tensor.name for tensor in tensors}),
        nbytes=sum(file.stat().st_size for file in files),
        tensors=tuple(tensors),
        tokenizer=tokenizer_files.describe(path),
        adapter=None,
        notes=_code(path) + _quantisation(config),
        version=f"transformers {version}" if isinstance(version, str) else None,
    )


def describe_peft(path: Path, report: Report = stop) -> Checkpoint:
    """Describe the adapter directory ``path``; faults as :func:`describe`."""
    config = read_json(path / "adapter_config.json")
    files = weight_files(path, "adapter_model", "adapter_model", report)
    tensors = read_tensors(files, report)
    version = config.get("peft_version")
    found, notes = adapter(config), ()
    if lora := lora_layout.find(tensors):
        found = dataclasses.replace(
            found,
            rank=found.rank or lora.rank,
            targets=found.targets or lora.targets,
            variant="DoRA" if lora.is_dora else found.variant,
        )
        if len(lora.ranks) > 1:
            notes = (f"its modules have different ranks: {', '.join(map(str, lora.ranks))}",)
    return Checkpoint(
        path=path,
        kind=Kind.PEFT,
        detail=str(config.get("peft_type")),
        architecture=None,
        nbytes=sum(file.stat().st_size for file in files),
        tensors=tuple(tensors),
        tokenizer=tokenizer_files.describe(path),
        adapter=found,
        notes=notes,
        version=f"PEFT {version}" if isinstance(version, str) else None,
    )


def _code(path: Path) -> tuple[str, ...]:
    """A note when the model brings Python files along that ``trust_remote_code`` would run."""
    code = sorted(file.name for file in path.glob("*.py"))
    return (
        (f"brings code along, which trust_remote_code=True would run: {', '.join(code[:5])}",)
        if code
        else ()
    )


def _quantisation(config: Mapping[str, Any]) -> tuple[str, ...]:
    described = section(config, "quantization_config")
    return (f"quantised: {described.get('quant_method')}",) if described else ()


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
    found = []
    for name, entry in header.items():
        try:
            found.append(_tensor(path, name, entry, 8 + header_length, length - 8 - header_length))
        except CheckpointError as fault:
            report(fault)
    return found


def _tensor(path: Path, name: str, entry: Any, data_start: int, available: int) -> Tensor:
    if not isinstance(entry, dict):
        raise DamagedCheckpoint(f"{shown(path)}: {name} has no description.", name)
    shape, offsets, dtype = (
        entry.get("shape"),
        entry.get("data_offsets"),
        _DTYPES.get(str(entry.get("dtype"))),
    )
    sound = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not sound or not all(type(item) is int and 0 <= item < 2**63 for item in shape + offsets):
        raise DamagedCheckpoint(f"{shown(path)}: {name} has no sound shape and byte range.", name)
    tensor = whole(
        name,
        tuple(shape),
        dtype or str(entry.get("dtype")),
        path.name,
        data_start + offsets[0],
        offsets[1] - offsets[0],
    )
    if offsets[1] > available:
        raise DamagedCheckpoint(
            f"{shown(path)} is cut off: {name} ends at byte {offsets[1]:,} of {available:,}. "
            "Copy it again.",
            name,
        )
    if tensor.dtype in DTYPE_BYTES and tensor.nbytes != offsets[1] - offsets[0]:
        raise DamagedCheckpoint(
            f"{shown(path)}: {name} has {offsets[1] - offsets[0]:,} bytes; its shape needs "
            f"{tensor.nbytes:,}.",
            name,
        )
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
        index = path / f"{single}.index.json"
        if index.is_file():
            return _indexed(path, index, report)
    raise DamagedCheckpoint(
        f"{shown(path)} has no weights: neither {stem}.safetensors nor {torch_stem}.bin, nor an "
        "index of parts."
    )


def _indexed(path: Path, index: Path, report: Report) -> list[Path]:
    parts = read_json(index).get("weight_map")
    if (
        not isinstance(parts, dict)
        or not parts
        or not all(isinstance(part, str) for part in parts.values())
    ):
        raise DamagedCheckpoint(f"{shown(index)} has no weight_map.")
    there = []
    for name in sorted(set(parts.values())):
        if not re.fullmatch(r"[\w.\-]+", name) or name.startswith("."):
            report(UnsafeCheckpoint(f"{shown(index)} names {name!r}, which is no file beside it."))
        elif not (path / name).is_file():
            report(
                DamagedCheckpoint(
                    f"{shown(path / name)} is missing; {index.name} lists it. Fetch the model "
                    "again."
                )
            )
        else:
            there.append(path / name)
    return there


def _check_index(path: Path, files: list[Path], tensors: list[Tensor], report: Report) -> None:
    """Every tensor lies in the part that the index names."""
    single = ("model.safetensors", "pytorch_model.bin")
    index = next(
        (path / f"{name}.index.json" for name in single if (path / f"{name}.index.json").is_file()),
        None,
    )
    # transformers looks for the one file first, and then not at the index.
    if index is None or (files and files[0].name in single):
        return
    there = {(tensor.name, tensor.chunks[0].file) for tensor in tensors}
    for name, part in read_json(index)["weight_map"].items():
        if (name, part) not in there:
            report(
                DamagedCheckpoint(
                    f"{shown(index)} says that {name} is in {part}, and it is not. Fetch the "
                    "model again.",
                    name,
                )
            )


def read_tensors(files: list[Path], report: Report = stop) -> list[Tensor]:
    """The tensors of weight files as :func:`weight_files` finds them. A file that cannot be read
    goes to ``report`` too."""
    found: list[Tensor] = []
    for path in files:
        try:
            if path.suffix == ".safetensors":
                found += read_safetensors(path, report)
            else:
                with path.open("rb") as file:
                    found += saved_tensors.read(file, shown(path), path.name, report)
        except CheckpointError as fault:
            report(fault)
    return found


def architecture(config: Mapping[str, Any], names: Collection[str] = ()) -> Architecture | None:
    """The sizes in a ``config.json``, or None when it is not one of a Llama-like decoder.

    ``names`` are those of the tensors, which tell what the configuration leaves out: whether the
    embedding is tied.
    """
    layers, hidden, heads, ffn = (
        size(config, name)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    )
    if not (layers and hidden and heads and ffn):
        return None
    scaling, tied, kind = (
        config.get("rope_scaling"),
        config.get("tie_word_embeddings"),
        str(config.get("model_type")),
    )
    return Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=size(config, "num_key_value_heads", heads),
        head_dim=size(config, "head_dim", hidden // heads),
        ffn=ffn,
        vocabulary=size(config, "vocab_size"),
        # transformers leaves it out where it is the default of the model's class.
        tied=tied
        if isinstance(tied, bool)
        else bool(names) and not any(name.endswith("lm_head.weight") for name in names),
        rope_base=number(config, "rope_theta", 10000.0),
        rope_scaling=_rope_scaling(scaling) if isinstance(scaling, Mapping) else None,
        family=FAMILIES.get(kind, kind),
        experts=next(
            filter(
                None,
                (
                    size(config, name)
                    for name in ("num_local_experts", "num_experts", "n_routed_experts")
                ),
            ),
            None,
        ),
        qk_norm=any(name.endswith(".q_norm.weight") for name in names),
    )


def _rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling under NeMo's names; other kinds as they are."""
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return dict(scaling)
    names = {"scale_factor": "factor", "old_context_len": "original_max_position_embeddings"}
    return {
        name: scaling.get(names.get(name, name))
        for name in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    }


def adapter(config: Mapping[str, Any]) -> Adapter:
    """The settings in an ``adapter_config.json``. A base that is not a path may be a name on the
    Hub: ``base_is_here`` is None."""
    base, targets = text(config, "base_model_name_or_path") or None, config.get("target_modules")
    looks_local = base is not None and (
        os.path.isabs(base) or base.startswith(".") or os.path.isdir(base)
    )
    return Adapter(
        rank=size(config, "r"),
        alpha=number(config, "lora_alpha"),
        targets=tuple(sorted(str(target) for target in targets))
        if isinstance(targets, list)
        else tuple(filter(None, [targets])),
        base=base,
        base_is_here=os.path.isdir(base) if looks_local else None,
        variant="DoRA"
        if config.get("use_dora") is True
        else "LoRA"
        if config.get("peft_type") == "LORA"
        else str(config.get("peft_type")),
    )
