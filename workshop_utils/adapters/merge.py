"""Merge an adapter into its base: a Hugging Face model, or a NeMo 2.0 checkpoint, that needs no
adapter any more.

The base is read and written tensor by tensor, and never as a whole in memory. The sum is made in
single precision and then rounded once, to the base's dtype. Neither transformers nor NeMo is
needed.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters import read_nemo2
from workshop_utils.adapters.adapter import LoraAdapter, as_tensor
from workshop_utils.adapters.modules import separated, updated
from workshop_utils.checkpoints.convert import readers, weights
from workshop_utils.checkpoints.formats import huggingface, nemo2, values
from workshop_utils.checkpoints.formats.lora_layout import TARGETS, Place, features, modules_of
from workshop_utils.checkpoints.formats.qkv import Heads, join, split
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, DTYPES, Chunk, Tensor
from workshop_utils.core.errors import UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    import torch

_SAFETENSORS = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64",
    "int32": "I32", "uint8": "U8", "int16": "I16", "int8": "I8", "bool": "BOOL",
}  # fmt: skip
_COPIED = (".json", ".txt", ".model", ".jinja")
#: Names of the linear layers in a NeMo 2.0 checkpoint, which stacks the layers of the model, and
#: the targets that they are.
FUSED = {f"module.decoder.layers.{target.nemo2}.weight": name for name, target in TARGETS.items()}
_BASES = {
    "hf-merged": (
        "config.json",
        "Hugging Face model directory",
        "workshop import --to-huggingface NEMO2_DIR --out DIR",
    ),
    "nemo2-merged": (
        "context/model.yaml",
        "NeMo 2.0 checkpoint",
        "workshop import HF_DIR --out DIR",
    ),
}


def base_directory(base: Path | str | None, to: str) -> Path:
    """``base`` as a directory of the kind that merging ``to`` needs.

    Raises:
        UnsupportedAdapter: it is not here, or of another kind; the message says how to get one.
    """
    file, kind, how = _BASES[to]
    if base and (Path(base) / file).is_file():
        return Path(base)
    given = "name one with --base DIR"
    if base:
        given = f"{shown(base)} is none" if Path(base).exists() else f"{base} is not here"
    raise UnsupportedAdapter(f"Merging needs the base as a {kind}: {given}. To make one: {how}")


def merge_huggingface(
    adapter: LoraAdapter, base: Path, directory: Path, dtype: str | None = None
) -> None:
    """Fill the empty ``directory`` with the Hugging Face model ``base`` and ``adapter`` in one.
    ``dtype`` replaces the base's.

    Raises:
        UnsupportedAdapter: the base is another model, or quantised.
        DamagedCheckpoint: see :func:`workshop_utils.checkpoints.formats.values.read_tensor`.
    """
    import torch

    checkpoint, apart = huggingface.describe(base), separated(adapter)
    config = read_json(base / "config.json")
    if "quantization_config" in config:
        raise UnsupportedAdapter(
            f"{shown(base)} is quantised: merge into the model that it was made from."
        )
    places = {
        f"model.layers.{layer}.{module}.weight": (layer, module) for layer, module in apart.weights
    }
    _fit(apart, {tensor.name: tensor.shape for tensor in checkpoint.tensors}, places, base)

    def stored_as(tensor: Tensor) -> str:
        return dtype if dtype and tensor.dtype in DTYPES else tensor.dtype

    def merged(tensor: Tensor) -> torch.Tensor:
        weight = as_tensor(values.read_tensor(checkpoint, tensor))
        if tensor.name in places:
            weight = updated(weight, apart, *places[tensor.name])
        return weight.to(getattr(torch, stored_as(tensor)))

    parts: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors:
        file = tensor.files[0].replace("pytorch_model", "model")
        file = file.removesuffix(".bin").removesuffix(".safetensors") + ".safetensors"
        parts.setdefault(file, []).append(tensor)
    with weights.progress(checkpoint.nbytes, "merging") as bar:
        for file, tensors in parts.items():
            _write_safetensors(directory / file, tensors, stored_as, merged, bar)
    if len(parts) > 1:
        index = {tensor.name: file for file, tensors in parts.items() for tensor in tensors}
        total = sum(each.elements * DTYPE_BYTES[stored_as(each)] for each in checkpoint.tensors)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    if dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")


def merge_nemo2(adapter: LoraAdapter, base: Path, directory: Path) -> None:
    """Fill the empty ``directory`` with the NeMo 2.0 checkpoint ``base`` and ``adapter`` in one;
    errors as :func:`merge_huggingface`."""
    import torch

    source, checkpoint, apart = readers.read(base), nemo2.describe(base), separated(adapter)
    sizes = read_nemo2.base_architecture(source.fields)
    shapes = {
        f"{module} of layer {layer}": features(sizes, module)[::-1]
        for target in TARGETS
        # An mlp_fc1 with a gate and one without have not even up_proj in common.
        if target != "mlp_fc1" or sizes.gated == apart.architecture.gated
        for module in modules_of(target, sizes)
        for layer in range(sizes.layers)
    }
    places = {f"{module} of layer {layer}": (layer, module) for layer, module in apart.weights}
    _fit(apart, shapes, places, base)

    def change(tensor: Tensor, chunk: Chunk, held: torch.Tensor) -> torch.Tensor:
        """The ``chunk`` of the base, layer by layer, with what the adapter adds to that part of
        each."""
        if tensor.name not in FUSED:
            return held
        whole = chunk.shape[1:] == tensor.shape[1:]
        region = tuple(
            slice(start, start + size)
            for start, size in zip(chunk.offsets[1:], chunk.shape[1:], strict=True)
        )
        rows = []
        for at, layer in enumerate(range(chunk.offsets[0], chunk.offsets[0] + chunk.shape[0])):
            # A part of a matrix says nothing of the length of its rows (DoRA), nor where a head
            # begins.
            weight = held[at] if whole else as_tensor(values.read_tensor(checkpoint, tensor, layer))
            merged = merged_fused(weight, apart, layer, FUSED[tensor.name], sizes.qkv)
            rows.append(merged.to(held.dtype) if whole else merged.to(held.dtype)[region])
        return torch.stack(rows)

    folder = directory / "weights"
    folder.mkdir()
    with (folder / weights.FILE).open("wb") as written:
        tensors, objects = weights.write(source, written, None, change)
    weights.write_index(source, tensors, objects, folder, "module.")
    shutil.copytree(base / "context", directory / "context")


def merged_fused(
    weight: torch.Tensor, apart: LoraAdapter, layer: int, target: str, heads: Heads
) -> torch.Tensor:
    """NeMo's fused ``weight`` ``[out, in]`` of ``target``, rows interleaved, with what ``apart``
    adds to its parts; fp32."""
    import torch

    modules = modules_of(target, apart.architecture)
    if not any((layer, module) in apart.weights for module in modules):
        return weight
    weight, qkv = weight.float(), target == "attention_qkv"
    parts = split(weight, heads, "interleaved") if qkv else weight.chunk(len(modules))
    parts = [
        updated(part, apart, layer, module) if (layer, module) in apart.weights else part
        for module, part in zip(modules, parts, strict=True)
    ]
    return join(*parts, heads, "interleaved") if qkv else torch.cat(parts)


def _fit(
    apart: LoraAdapter,
    shapes: Mapping[str, tuple[int, ...]],
    places: Mapping[str, Place],
    base: Path,
) -> None:
    """The base has every layer that the adapter adapts, in its shape."""
    for name, place in places.items():
        a, b = apart.weights[place]
        shape = b.shape[0], a.shape[1]
        if shapes.get(name) != shape:
            has = f"there it is {list(shapes[name])}" if name in shapes else "which it lacks"
            trained_on = f" ({apart.base})" if apart.base else ""
            raise UnsupportedAdapter(
                f"{shown(base)} is not the base of {shown(apart.source)}: the adapter is for "
                f"{name} {list(shape)}; {has}. Give --base the model that it was trained "
                f"on{trained_on}."
            )


def _write_safetensors(
    file: Path,
    tensors: Sequence[Tensor],
    stored_as: Callable[[Tensor], str],
    merged: Callable[[Tensor], torch.Tensor],
    bar: Any,
) -> None:
    """The safetensors ``file``, one tensor at a time: the length of the header, the header, and the
    bytes of each.

    The library's own writer wants all tensors in memory. Source of the format: the description in
    the safetensors repository.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.elements * DTYPE_BYTES[stored_as(tensor)]
        header[tensor.name] = {
            "dtype": _SAFETENSORS[stored_as(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            flat = merged(tensor).contiguous().reshape(-1).view(torch.uint8)
            written.write(memoryview(flat.numpy()))
            bar.update(tensor.nbytes)
