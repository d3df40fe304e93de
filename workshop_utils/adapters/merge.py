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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters import read_nemo2
from workshop_utils.adapters.adapter import LoraAdapter, as_tensor
from workshop_utils.adapters.modules import MODULES, modules_of, separated, updated
from workshop_utils.checkpoints.convert import readers, weights
from workshop_utils.checkpoints.formats import huggingface, nemo2, values
from workshop_utils.checkpoints.formats.qkv import Heads, join, split
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES, DTYPES, Chunk, Tensor
from workshop_utils.core.errors import UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    import torch

_SAFETENSORS = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "int16": "I16",
    "int8": "I8",
    "bool": "BOOL",
}
_COPIED = (".json", ".txt", ".model", ".jinja")
#: Names of the linear layers in a NeMo 2.0 checkpoint, which stacks the layers of the model, and
#: the targets that they are.
FUSED = {
    f"module.decoder.layers.{name}.weight": target for name, target in read_nemo2.LAYERS.items()
}


def base_directory(base: Path | str | None, to: str) -> Path:
    """``base`` as a directory of the kind that merging ``to`` needs.

    Raises:
        UnsupportedAdapter: it is not here, or of another kind; the message says how to get one.
    """
    file, kind, how = {
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
    }[to]
    if base is None or not (Path(base) / file).is_file():
        given = (
            f"{shown(base)} is none"
            if base and Path(base).exists()
            else f"{base} is not here"
            if base
            else "name one with --base DIR"
        )
        raise UnsupportedAdapter(f"Merging needs the base as a {kind}: {given}. To make one: {how}")
    return Path(base)


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

    def made(tensor: Tensor) -> torch.Tensor:
        """``tensor`` as it is written: with what the adapter adds to it, in the dtype that is
        wanted."""
        weight = as_tensor(values.read_tensor(checkpoint, tensor))
        wanted = _wanted(tensor, dtype)
        found = updated(weight, apart, *places[tensor.name]) if tensor.name in places else weight
        return found.to(getattr(torch, wanted))

    parts: dict[str, list[Tensor]] = {}
    with weights.progress(checkpoint.nbytes, "merging") as bar:
        for tensor in checkpoint.tensors:
            parts.setdefault(_part(tensor.files[0]), []).append(tensor)
        for name, tensors in parts.items():
            _write_safetensors(directory / name, tensors, made, dtype, bar)
    if len(parts) > 1:
        index = {tensor.name: name for name, tensors in parts.items() for tensor in tensors}
        total = sum(
            tensor.elements * DTYPE_BYTES[_wanted(tensor, dtype)] for tensor in checkpoint.tensors
        )
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    if dtype:
        field = "dtype" if "dtype" in config else "torch_dtype"
        (directory / "config.json").write_text(
            json.dumps(config | {field: dtype}, indent=2) + "\n", encoding="utf-8"
        )


def merge_nemo2(adapter: LoraAdapter, base: Path, directory: Path) -> None:
    """Fill the empty ``directory`` with the NeMo 2.0 checkpoint ``base`` and ``adapter`` in one;
    errors as :func:`merge_huggingface`."""
    import torch

    source, checkpoint, apart = readers.read(base), nemo2.describe(base), separated(adapter)
    sizes = read_nemo2.base_architecture(source.fields)
    # An mlp_fc1 with a gate and one without have not even up_proj in common.
    targets = [
        target
        for target in MODULES
        if target != "mlp_fc1" or sizes.gated == apart.architecture.gated
    ]
    shapes = {
        f"{module} of layer {layer}": sizes.features(module)[::-1]
        for target in targets
        for module in modules_of(target, sizes)
        for layer in range(sizes.num_layers)
    }
    _fit(
        apart,
        shapes,
        {f"{module} of layer {layer}": (layer, module) for layer, module in apart.weights},
        base,
    )

    def change(tensor: Tensor, chunk: Chunk, held: torch.Tensor) -> torch.Tensor:
        """The ``chunk`` of the base, layer by layer, with what the adapter adds to that part of
        each."""
        if tensor.name not in FUSED:
            return held
        layers = range(chunk.offsets[0], chunk.offsets[0] + chunk.shape[0])
        whole = chunk.shape[1:] == tensor.shape[1:]
        region = tuple(
            slice(start, start + size)
            for start, size in zip(chunk.offsets[1:], chunk.shape[1:], strict=True)
        )
        rows = []
        for at, layer in enumerate(layers):
            # A part of a matrix says nothing of the length of its rows (DoRA), nor where a head
            # begins.
            weight = held[at] if whole else as_tensor(values.read_tensor(checkpoint, tensor, layer))
            merged = merged_fused(weight, apart, layer, FUSED[tensor.name], sizes.heads)
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
    if target == "attention_qkv":
        parts = split(weight.float(), heads, "interleaved")
    else:
        parts = weight.float().chunk(len(modules))
    made = [
        updated(part, apart, layer, module) if (layer, module) in apart.weights else part
        for module, part in zip(modules, parts, strict=True)
    ]
    return join(*made, heads, "interleaved") if target == "attention_qkv" else torch.cat(made)


def _fit(
    apart: LoraAdapter,
    shapes: dict[str, tuple[int, ...]],
    places: dict[str, tuple[int, str]],
    base: Path,
) -> None:
    """The base has every layer that the adapter adapts, in its shape."""
    for name, place in places.items():
        a, b = apart.weights[place]
        wanted = b.shape[0], a.shape[1]
        if shapes.get(name) != wanted:
            has = f"there it is {list(shapes[name])}" if name in shapes else "which it lacks"
            raise UnsupportedAdapter(
                f"{shown(base)} is not the base of {shown(apart.source)}: the adapter is for "
                f"{name} {list(wanted)}; {has}. Give --base the model that it was trained "
                f"on{f' ({apart.base})' if apart.base else ''}."
            )


def _part(file: str) -> str:
    """The name of the safetensors file for what ``file`` of the base holds."""
    return (
        file.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors")
        + ".safetensors"
    )


def _wanted(tensor: Tensor, dtype: str | None) -> str:
    return dtype if dtype and tensor.dtype in DTYPES else tensor.dtype


def _write_safetensors(
    file: Path,
    tensors: Iterable[Tensor],
    made: Callable[[Tensor], torch.Tensor],
    dtype: str | None,
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
    tensors = list(tensors)
    for tensor in tensors:
        wanted = _wanted(tensor, dtype)
        size = tensor.elements * DTYPE_BYTES[wanted]
        header[tensor.name] = {
            "dtype": _SAFETENSORS[wanted],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written.write(
                memoryview(made(tensor).contiguous().reshape(-1).view(torch.uint8).numpy())
            )
            bar.update(tensor.nbytes)
