"""Is an export what its reader accepts, and does it do what the adapter does? Asked of every export
before it gets its name.

The rules of the readers are those of :mod:`workshop_utils.adapters.rules`. Then the files are read
back from the disk, and the weight update is compared head by head on random inputs (of a merged
model weight by weight), with other code than the code that wrote it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.adapters.adapter import LoraAdapter, as_tensor
from workshop_utils.adapters.merge import FUSED
from workshop_utils.adapters.modules import separated
from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.record import Record
from workshop_utils.adapters.rules import check
from workshop_utils.checkpoints.formats import huggingface, nemo2, values
from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.lora_layout import TARGETS
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.tensor import Tensor as Stored
from workshop_utils.core.errors import ConformanceFailed, WorkshopError

if TYPE_CHECKING:
    from torch import Tensor

#: Largest difference of the update, relative to its largest value: a rounding of each weight to the
#: dtype.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}
"""The largest difference that one rounding to the dtype makes: of a merged model, relative to the
weight itself."""
SUM = 2**-20
"""And that of the sum, in single precision and made in another order, relative to the largest
weight of the matrix."""
_SAME = "each module's update equals the trained one"
_REST = "every other tensor is the base's"
_TENSORS = "the tensors of the base, in their shapes"


def check_export(
    path: Path, adapter: LoraAdapter, record: Record, base: Path | None = None
) -> list[str]:
    """Check the export of ``adapter`` at ``path`` for the readers in ``record``, and return the
    rules it keeps. ``base`` is that of a merged model, which is compared tensor by tensor.

    Raises:
        ConformanceFailed: a rule is broken; the message names the rule and the key.
    """
    if base and record.to.endswith("-merged"):
        return _check_merged(path, base, adapter, record.to)
    if record.to == "nemo":
        reader = "trtllm" if record.alpha_baked_in else "nemo"
    else:
        # NIM 2's list is PEFT's, TensorRT-LLM's, vLLM's and that of the store.
        reader = "nim2" if record.for_servers else "peft"
    result = check(path, reader, record.rank)
    for verdict in result.faults:
        _fail(verdict.rule, verdict.fault)
    try:
        written = read_adapter(path)
    except WorkshopError as error:
        _fail("it reads back, every layer with both halves in shapes that fit", str(error))
    # TensorRT-LLM applies no scale at all; NeMo the one in the configuration.
    _compare(written, adapter, 1.0 if record.alpha_baked_in else written.scale)
    return [*(verdict.rule for verdict in result.rules), _SAME]


def _fail(rule: str, fault: str) -> None:
    raise ConformanceFailed(f"The export breaks the rule '{rule}': {fault}, so it is not used.")


def _check_merged(directory: Path, base: Path, adapter: LoraAdapter, to: str) -> list[str]:
    """Every tensor is read once, one at a time."""
    describe = huggingface.describe if to == "hf-merged" else nemo2.describe
    merged, before = describe(directory), describe(base)
    apart = separated(adapter)
    after = {tensor.name: tensor for tensor in merged.tensors}
    if [(each.name, each.shape) for each in before.tensors] != [
        (each.name, each.shape) for each in merged.tensors
    ]:
        _fail(_TENSORS, "they differ")
    adapted = {
        f"model.layers.{layer}.{module}.weight": (layer, module) for layer, module in apart.weights
    }
    for tensor in before.tensors:
        sides = (before, tensor), (merged, after[tensor.name])
        dtype = after[tensor.name].dtype
        if tensor.name in adapted:
            layer, module = adapted[tensor.name]
            was, now = (_read(*side).float() for side in sides)
            _compare_merged({module: was}, {module: now}, apart, layer, dtype)
        elif target := FUSED.get(tensor.name):
            for layer in range(tensor.shape[0]):
                was, now = (
                    cut(_read(*side, layer).float(), target, apart.architecture, "interleaved")
                    for side in sides
                )
                _compare_merged(was, now, apart, layer, dtype)
        else:
            was, now = (_read(*side) for side in sides)
            if not (now == was.to(now.dtype)).all():
                _fail(_REST, f"{tensor.name} differs")
    return [_TENSORS, _SAME, _REST]


def _read(checkpoint: Checkpoint, tensor: Stored, layer: int | None = None) -> Tensor:
    return as_tensor(values.read_tensor(checkpoint, tensor, layer))


def _compare_merged(
    before: dict[str, Tensor], after: dict[str, Tensor], apart: LoraAdapter, layer: int, dtype: str
) -> None:
    """Every weight of ``after`` (Hugging Face's modules of one matrix) against ``before`` plus what
    the adapter adds; ``dtype``: as stored.

    Weight by weight: the update may be smaller than the rounding of the large ones, which would
    hide that it is wrong.
    """
    for module, expected in before.items():
        place = layer, module
        if place in apart.weights:
            a, b = apart.weights[place]
            expected = expected + apart.scale * (b.float() @ a.float())
        if place in apart.magnitudes:
            lengths = apart.magnitudes[place].float() / expected.norm(dim=1)
            expected = expected * lengths[:, None]
        difference, largest = (expected - after[module]).abs(), expected.abs().max().item()
        if not (difference <= ROUNDING.get(dtype, 0.0) * expected.abs() + SUM * largest).all():
            off = difference.max().item()
            _fail(
                _SAME,
                f"layer {layer}, {module}: a weight is off by {off:.2g} where the largest is "
                f"{largest:.2g}",
            )


def _compare(written: LoraAdapter, adapter: LoraAdapter, scale: float) -> None:
    """Compare what both add to each Hugging Face module; what one lacks has to be zero in the
    other."""
    for layer in range(adapter.layers):
        trained = _updates(adapter, layer, adapter.scale)
        again = _updates(written, layer, scale, adapter.architecture)
        largest = max((tensor.abs().max().item() for tensor, _ in trained.values()), default=0.0)
        for module in trained | again:
            nothing = 0 * (again.get(module) or trained[module])[0], ""
            (one, dtype), (other, trained_in) = (
                side.get(module, nothing) for side in (again, trained)
            )
            if one.shape != other.shape:
                _fail(
                    "lora_B is [out, r]",
                    f"layer {layer}, {module}: lora_B is for {one.shape[0]} rows, not "
                    f"{other.shape[0]}",
                )
            difference = (one - other).abs().max().item()
            if difference > _TOLERANCE.get(dtype or trained_in, 3e-2) * largest:
                _fail(
                    _SAME,
                    f"layer {layer}, {module}: off by {difference:.2g} where the largest value is "
                    f"{largest:.2g}",
                )
    for place, lengths in separated(adapter).magnitudes.items() if adapter.magnitudes else ():
        its = written.magnitudes.get(place)
        if its is None or not (its == lengths.to(its.dtype)).all():
            _fail("DoRA's magnitudes are the trained ones", f"layer {place[0]}, {place[1]}")


def _updates(
    adapter: LoraAdapter, layer: int, scale: float, sizes: Architecture | None = None
) -> dict[str, tuple[Tensor, str]]:
    """What ``adapter`` adds to each Hugging Face module's output ``[out, 4]`` for four random
    inputs, the same every time, in double precision; with the dtype it is stored in."""
    import torch

    updates = {}
    for target in adapter.targets:
        if (layer, target) not in adapter.weights:
            continue
        a, b = adapter.weights[layer, target]
        seed = torch.Generator().manual_seed(0)
        inputs = torch.randn(a.shape[1], 4, dtype=torch.float64, generator=seed)
        rows = scale * (b.double() @ (a.double() @ inputs))
        parts = cut(rows, target, sizes or adapter.architecture, adapter.qkv_order)
        dtype = str(b.dtype).removeprefix("torch.")
        updates |= {module: (part, dtype) for module, part in parts.items()}
    return updates


def cut(rows: Tensor, target: str, sizes: Architecture | None, order: str) -> dict[str, Tensor]:
    """Cut a fused layer's ``rows`` ``[out, n]`` into the modules of Hugging Face, one head after
    the other. A module of Hugging Face's is whole."""
    import torch

    modules = TARGETS[target].modules if target in TARGETS else (target,)
    if target == "attention_qkv":
        nh, ng, hd = sizes.qkv
        size = nh // ng
        if order == "interleaved":
            slots = [
                [(head // size) * (size + 2) + head % size for head in range(nh)],
                [group * (size + 2) + size for group in range(ng)],
                [group * (size + 2) + size + 1 for group in range(ng)],
            ]
        else:
            slots = [list(range(nh)), list(range(nh, nh + ng)), list(range(nh + ng, nh + 2 * ng))]
        parts = [torch.cat([rows[slot * hd : (slot + 1) * hd] for slot in each]) for each in slots]
    elif target == "mlp_fc1" and sizes.gated:
        parts = [rows[: sizes.ffn], rows[sizes.ffn :]]
    else:
        return {modules[-1]: rows}  # without a gate, up_proj alone
    return dict(zip(modules, parts, strict=True))
