"""Is an export what its reader accepts, and does it do what the adapter does? Asked of every export
before it gets its name.

The rules of the readers are those of :mod:`workshop_utils.adapters.rules`. Then the files are read
back from the disk, and the weight update is compared head by head on random inputs (of a merged
model weight by weight), with other code than the code that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.adapters.adapter import LoraAdapter, as_tensor
from workshop_utils.adapters.merge import FUSED
from workshop_utils.adapters.modules import MODULES, separated
from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.record import Record
from workshop_utils.adapters.rules.judge import judge
from workshop_utils.adapters.rules.rules import Judgement
from workshop_utils.checkpoints.formats import huggingface, nemo2, values
from workshop_utils.checkpoints.formats.lora_layout import Architecture
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.tensor import Tensor as Stored
from workshop_utils.core.errors import ConformanceFailed, WorkshopError

if TYPE_CHECKING:
    from torch import Tensor

#: Largest difference of the update, relative to its largest value: a rounding of each weight to the
#: dtype.
_TOLERANCE = {
    "torch.float64": 1e-6,
    "torch.float32": 1e-5,
    "torch.float16": 4e-3,
    "torch.bfloat16": 3e-2,
}
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}
"""The largest difference that one rounding to the dtype makes: of a merged model, relative to the
weight itself."""
SUM = 2**-20
"""And that of the sum, in single precision and made in another order, relative to the largest
weight of the matrix."""
_PROBES = 4
_SAME = "each module's update equals the trained one"
_REST = "every other tensor is the base's"


def check_nemo(path: Path, adapter: LoraAdapter, record: Record) -> list[str]:
    """Judge the ``.nemo`` at ``path``, an export of ``adapter`` for the reader in ``record``, and
    return the rules it keeps.

    Raises:
        ConformanceFailed: a rule is broken; the message names the rule and the key.
    """
    # NIM's list is TensorRT-LLM's and that of the store.
    reader = "nim1" if record.for_servers else "trtllm" if record.alpha_baked_in else "nemo"
    held = _held(judge(path, reader, record.rank))
    written = _read_back(path)
    # TensorRT-LLM applies no scale at all; NeMo the one in the configuration.
    return [
        *held,
        *_same_updates(written, adapter, 1.0 if record.alpha_baked_in else written.scale),
    ]


def check_hf_peft(directory: Path, adapter: LoraAdapter, record: Record) -> list[str]:
    """Judge the PEFT adapter in ``directory``, an export of ``adapter`` for the readers in
    ``record``, and return the rules it keeps.

    Raises:
        ConformanceFailed: a rule is broken; the message names the rule and the key.
    """
    # NIM 2's list is PEFT's, TensorRT-LLM's, vLLM's and that of the store.
    held = _held(judge(directory, "nim2" if record.for_servers else "peft", record.rank))
    written = _read_back(directory)
    return [*held, *_same_updates(written, adapter, written.scale)]


def check_merged(directory: Path, base: Path, adapter: LoraAdapter, to: str) -> list[str]:
    """Compare the merged model in ``directory`` with ``base`` and ``adapter``, and return the rules
    it keeps.

    Every tensor is read once, one at a time. Raises :class:`ConformanceFailed`.
    """
    describe = huggingface.describe if to == "hf-merged" else nemo2.describe
    made, before = describe(directory), describe(base)
    tensors, apart = {tensor.name: tensor for tensor in made.tensors}, separated(adapter)
    if [(tensor.name, tensor.shape) for tensor in before.tensors] != [
        (tensor.name, tensor.shape) for tensor in made.tensors
    ]:
        raise ConformanceFailed(
            "The merged model breaks the rule 'the tensors of the base, in their shapes', so it "
            "is not used."
        )
    adapted = {f"model.layers.{layer}.{module}.weight" for layer, module in apart.weights}
    for tensor in before.tensors:
        if tensor.name in adapted:
            layer, _, module = (
                tensor.name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            )
            sides = (
                {module: _read(*one).float()}
                for one in ((before, tensor), (made, tensors[tensor.name]))
            )
            _same_merged(*sides, apart, int(layer), tensors[tensor.name].dtype)
        elif tensor.name in FUSED:
            for layer in range(tensor.shape[0]):
                sides = (
                    cut(
                        _read(*one, layer).float(),
                        FUSED[tensor.name],
                        apart.architecture,
                        "interleaved",
                    )
                    for one in ((before, tensor), (made, tensors[tensor.name]))
                )
                _same_merged(*sides, apart, layer, tensors[tensor.name].dtype)
        else:
            now, was = _read(made, tensors[tensor.name]), _read(before, tensor)
            if not (now == was.to(now.dtype)).all():
                _fail(_REST, f"{tensor.name} differs")
    return ["the tensors of the base, in their shapes", _SAME, _REST]


def _read(checkpoint: Checkpoint, tensor: Stored, layer: int | None = None) -> Tensor:
    return as_tensor(values.read_tensor(checkpoint, tensor, layer))


def _held(judged: Judgement) -> list[str]:
    """The rules that ``judged`` found kept; raises :class:`ConformanceFailed` for the first that is
    not."""
    for rule in judged.broken:
        _fail(rule.rule, rule.fault)
    return [rule.rule for rule in judged.rules]


def _fail(rule: str, fault: str) -> None:
    raise ConformanceFailed(f"The export breaks the rule '{rule}': {fault}, so it is not used.")


def _read_back(path: Path) -> LoraAdapter:
    rule = "it reads back, every layer with both halves in shapes that fit"
    try:
        return read_adapter(path)
    except WorkshopError as error:
        raise ConformanceFailed(
            f"The export breaks the rule '{rule}': {error} So it is not used."
        ) from error


def _same_updates(written: LoraAdapter, adapter: LoraAdapter, scale: float) -> list[str]:
    """Compare what both add to each Hugging Face module; what one lacks has to be zero in the
    other."""
    for layer in range(adapter.layers):
        trained, found = (
            _updates(adapter, layer, adapter.scale),
            _updates(written, layer, scale, adapter.architecture),
        )
        largest = max((tensor.abs().max().item() for tensor, _ in trained.values()), default=0.0)
        for module in {**trained, **found}:
            (one, dtype), (other, other_dtype) = (
                side.get(module, (0 * (trained.get(module) or found[module])[0], ""))
                for side in (found, trained)
            )
            if one.shape != other.shape:
                _fail(
                    "lora_B is [out, r]",
                    f"layer {layer}, {module}: lora_B is for {one.shape[0]} rows, not "
                    f"{other.shape[0]}",
                )
            difference = (one - other).abs().max().item()
            if difference > _TOLERANCE.get(dtype or other_dtype, 3e-2) * largest:
                _fail(
                    _SAME,
                    f"layer {layer}, {module}: off by {difference:.2g} where the largest value "
                    f"is {largest:.2g}",
                )
    for place, magnitude in separated(adapter).magnitudes.items() if adapter.magnitudes else ():
        if (
            place not in written.magnitudes
            or not (
                written.magnitudes[place] == magnitude.to(written.magnitudes[place].dtype)
            ).all()
        ):
            _fail("DoRA's magnitudes are the trained ones", f"layer {place[0]}, {place[1]}")
    return [_SAME]


def _updates(
    adapter: LoraAdapter, layer: int, scale: float, sizes: Architecture | None = None
) -> dict[str, tuple[Tensor, str]]:
    """What ``adapter`` adds to each Hugging Face module's output ``[out, n]`` for random inputs,
    with the dtype it is stored in."""
    found = {}
    for target in adapter.targets:
        if (layer, target) in adapter.weights:
            a, b = adapter.weights[layer, target]
            update = scale * (b.double() @ (a.double() @ _probes(a.shape[1])))
            parts = (
                cut(update, target, sizes or adapter.architecture, adapter.qkv_order)
                if target in MODULES
                else {target: update}
            )
            found |= {module: (part, str(b.dtype)) for module, part in parts.items()}
    return found


def _probes(features: int) -> Tensor:
    """Random inputs ``[features, 4]``, the same every time, in double precision."""
    import torch

    return torch.randn(
        features, _PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def cut(update: Tensor, target: str, sizes: Architecture, order: str) -> dict[str, Tensor]:
    """Cut a fused layer's output ``[out, n]`` into the modules of Hugging Face, one head after the
    other."""
    import torch

    modules = MODULES[target]
    if target == "attention_qkv":
        nh, ng, hd = sizes.heads
        size = nh // ng
        if order == "interleaved":
            first = [
                [(head // size) * (size + 2) + head % size for head in range(nh)],
                [group * (size + 2) + size for group in range(ng)],
                [group * (size + 2) + size + 1 for group in range(ng)],
            ]
        else:
            first = [list(range(nh)), list(range(nh, nh + ng)), list(range(nh + ng, nh + 2 * ng))]
        cut = [
            torch.cat([update[slot * hd : (slot + 1) * hd] for slot in slots]) for slots in first
        ]
    elif target == "mlp_fc1" and sizes.gated:
        cut = [update[: sizes.ffn_hidden_size], update[sizes.ffn_hidden_size :]]
    else:
        return {modules[-1]: update}  # without a gate, up_proj alone
    return dict(zip(modules, cut, strict=True))


def _same_merged(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    apart: LoraAdapter,
    layer: int,
    dtype: str,
) -> None:
    """Every weight of ``after`` (Hugging Face's modules of one matrix) against ``before`` plus what
    the adapter adds; ``dtype``: as stored.

    Weight by weight: the update may be smaller than the rounding of the large ones, which would
    hide that it is wrong.
    """
    for module, expected in before.items():
        if (layer, module) in apart.weights:
            a, b = apart.weights[layer, module]
            expected = expected + apart.scale * (b.float() @ a.float())
        if (layer, module) in apart.magnitudes:
            expected = (
                expected * (apart.magnitudes[layer, module].float() / expected.norm(dim=1))[:, None]
            )
        difference, largest = (expected - after[module]).abs(), expected.abs().max().item()
        if not (difference <= ROUNDING.get(dtype, 0.0) * expected.abs() + SUM * largest).all():
            off = difference.max().item()
            _fail(
                _SAME,
                f"layer {layer}, {module}: a weight is off by {off:.2g} where the largest is "
                f"{largest:.2g}",
            )
