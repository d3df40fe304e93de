"""Hugging Face model and PEFT adapter directories: ``config.json`` and the headers of the safetensors files.

A safetensors file begins with the length of its header (8 bytes, little-endian), then the header: JSON that maps each tensor to
dtype, shape and byte range in the rest of the file. Source: the safetensors format description, and transformers' names of files.
"""

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.formats import safe_text, torch_archive
from workshop_utils.formats.architecture import Architecture, number, size
from workshop_utils.formats.safe_text import read_json
from workshop_utils.formats.summary import Adapter
from workshop_utils.formats.tensor import DTYPE_BYTES, Tensor, whole
from workshop_utils.paths import shown

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def read_safetensors(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, from its header. Raises :class:`DamagedCheckpoint` when they do not fit the file."""
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        (header_length,) = struct.unpack("<Q", start) if len(start) == 8 else (length,)
        if header_length > min(length - 8, safe_text.MAX_BYTES):
            raise DamagedCheckpoint(f"{shown(path)} is no safetensors file, or it is cut off.")
        header = safe_text.parse_json(file.read(header_length), f"{shown(path)} (header)")
    header.pop("__metadata__", None)
    return [_tensor(path, name, entry, 8 + header_length, length - 8 - header_length) for name, entry in header.items()]


def _tensor(path: Path, name: str, entry: Any, data_start: int, available: int) -> Tensor:
    if not isinstance(entry, dict):
        raise DamagedCheckpoint(f"{shown(path)}: {name} has no description.")
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), _DTYPES.get(str(entry.get("dtype")))
    sound = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not sound or not all(type(item) is int and 0 <= item < 2**63 for item in shape + offsets):
        raise DamagedCheckpoint(f"{shown(path)}: {name} has no sound shape and byte range.")
    tensor = whole(name, tuple(shape), dtype or str(entry.get("dtype")), path.name, data_start + offsets[0], offsets[1] - offsets[0])
    if offsets[1] > available:
        raise DamagedCheckpoint(f"{shown(path)} is cut off: {name} ends at byte {offsets[1]:,} of {available:,}. Copy it again.")
    if tensor.dtype in DTYPE_BYTES and tensor.nbytes != offsets[1] - offsets[0]:
        raise DamagedCheckpoint(f"{shown(path)}: {name} has {offsets[1] - offsets[0]:,} bytes; its shape needs {tensor.nbytes:,}.")
    return tensor


def weight_files(path: Path, stem: str = "model", torch_stem: str = "pytorch_model") -> list[Path]:
    """The files with the weights in the directory ``path``, in the order in which transformers looks for them.

    That is ``model.safetensors``, ``model.safetensors.index.json``, ``pytorch_model.bin`` and its index. Raises
    :class:`DamagedCheckpoint` when there is none or an indexed one is missing, :class:`UnsafeCheckpoint` for an indexed name that
    leaves the directory.
    """
    for single in (f"{stem}.safetensors", f"{torch_stem}.bin"):
        if (path / single).is_file():
            return [path / single]
        index = path / f"{single}.index.json"
        if index.is_file():
            return _indexed(path, index)
    raise DamagedCheckpoint(f"{shown(path)} has no weights: neither {stem}.safetensors nor {torch_stem}.bin, nor an index of parts.")


def _indexed(path: Path, index: Path) -> list[Path]:
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise DamagedCheckpoint(f"{shown(index)} has no weight_map.")
    names = sorted(set(parts.values()))
    for name in names:
        if not re.fullmatch(r"[\w.\-]+", name) or name.startswith("."):
            raise UnsafeCheckpoint(f"{shown(index)} names {name!r}, which is no file beside it.")
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"{shown(path / name)} is missing; {index.name} lists it. Fetch the model again.")
    return [path / name for name in names]


def read_tensors(files: list[Path]) -> list[Tensor]:
    """The tensors of weight files as :func:`weight_files` finds them."""
    found: list[Tensor] = []
    for path in files:
        if path.suffix == ".safetensors":
            found += read_safetensors(path)
            continue
        with path.open("rb") as file:
            saved = torch_archive.read_tensors(file, shown(path))
        found += [whole(name, tensor.shape, tensor.dtype, path.name, 0, 0) for name, tensor in saved.items()]
    return found


def architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The sizes in a ``config.json``, or None when it is not one of a Llama-like decoder."""
    layers, hidden, heads, ffn = (
        size(config, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    )
    if not (layers and hidden and heads and ffn):
        return None
    scaling = config.get("rope_scaling")
    return Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=size(config, "num_key_value_heads", heads),
        head_dim=size(config, "head_dim", hidden // heads),
        ffn=ffn,
        vocabulary=size(config, "vocab_size"),
        tied=config.get("tie_word_embeddings", False) is True,
        rope_base=number(config, "rope_theta", 10000.0),
        rope_scaling=_rope_scaling(scaling) if isinstance(scaling, Mapping) else None,
    )


def _rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling under NeMo's names; other kinds as they are."""
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return dict(scaling)
    names = {"scale_factor": "factor", "old_context_len": "original_max_position_embeddings"}
    return {name: scaling.get(names.get(name, name)) for name in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")}


def adapter(config: Mapping[str, Any]) -> Adapter:
    """The settings in an ``adapter_config.json``. A base that is not a path may be a name on the Hub: ``base_is_here`` is None."""
    base, targets = config.get("base_model_name_or_path"), config.get("target_modules")
    base = base if isinstance(base, str) and base else None
    looks_local = base is not None and (os.path.isabs(base) or base.startswith(".") or os.path.isdir(base))
    return Adapter(
        rank=size(config, "r"),
        alpha=number(config, "lora_alpha"),
        targets=tuple(sorted(str(target) for target in targets)) if isinstance(targets, list) else tuple(filter(None, [targets])),
        base=base,
        base_is_here=os.path.isdir(base) if looks_local else None,
    )
