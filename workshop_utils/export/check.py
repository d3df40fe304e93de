"""Is an export what its reader accepts, and does it do what the adapter does? Asked of every export before it gets its name.

The rules are those of the public readers: TensorRT-LLM (``tensorrt_llm/lora_manager.py``), PEFT (``LoraConfig``,
``set_peft_model_state_dict``) and vLLM (``lora_model.py``, ``peft_helper.py``). The files are read back from the disk, and the
weight update is compared head by head on random inputs, with other code than the code that wrote it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.errors import ConformanceFailed, WorkshopError
from workshop_utils.export import hf_peft
from workshop_utils.export.adapter import LoraAdapter, read_adapter
from workshop_utils.export.modules import MODULES
from workshop_utils.export.record import Record

if TYPE_CHECKING:
    from torch import Tensor

_TRTLLM_LAYER = re.compile(r".*\.layers\.(\d+)\..*")
_TRTLLM_ADAPTER = "self_attention.adapter_layer.lora_kqv_adapter"
_PEFT_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.((?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")
#: What NeMo's converter reads of the YAML, beside ``peft.lora_tuning``.
_CONVERTER_FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_layers",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)
#: Largest difference of the update, relative to its largest value: a rounding of each weight to the dtype.
_TOLERANCE = {"torch.float64": 1e-6, "torch.float32": 1e-5, "torch.float16": 4e-3, "torch.bfloat16": 3e-2}
_PROBES = 4


class Rules:
    """Rules that held so far; the first that does not raises."""

    def __init__(self) -> None:
        self.held: list[str] = []

    def require(self, rule: str, fault: str | None) -> None:
        """Note ``rule`` as held when ``fault`` is empty, else raise :class:`ConformanceFailed` with both."""
        if fault:
            raise ConformanceFailed(f"The export breaks the rule '{rule}': {fault}, so it is not used.")
        if rule not in self.held:
            self.held.append(rule)


def check_nemo(path: Path, adapter: LoraAdapter, record: Record) -> list[str]:
    """Judge the ``.nemo`` at ``path``, an export of ``adapter`` for the reader in ``record``, and return the rules it keeps.

    Raises:
        ConformanceFailed: a rule is broken; the message names the rule and the key.
    """
    rules = Rules()
    _check_archive(rules, path)
    written = _read_back(rules, path)
    state = _load_flat(rules, path)
    if record.alpha_baked_in:
        _check_trtllm_keys(rules, state)
    _check_nemo_config(rules, written.config, adapter, record)
    _check_trained(rules, {f"layer {layer}, {target} linear_out": b for (layer, target), (_, b) in written.weights.items()})
    for (layer, target), (linear_in, linear_out) in written.weights.items():
        probes = _probes(linear_in.shape[1])
        # TensorRT-LLM applies no scale at all; NeMo the one in the configuration.
        scale = 1.0 if record.alpha_baked_in else written.scale
        update = _update(linear_in, linear_out, probes, scale)
        parts = _parts(update, target, adapter, record.qkv_order)
        _same_update(rules, parts, _expected(adapter, layer, target, probes), linear_out, f"layer {layer}")
    return rules.held


def check_hf_peft(directory: Path, adapter: LoraAdapter) -> list[str]:
    """Judge the PEFT adapter in ``directory``, an export of ``adapter``, and return the rules it keeps.

    Raises:
        ConformanceFailed: a rule is broken; the message names the rule and the key.
    """
    rules = Rules()
    config, state = _load_peft(rules, directory)
    _check_peft_config(rules, config, adapter)
    places = _check_peft_keys(rules, state, config, adapter)
    _check_finite(rules, state)
    _check_trained(rules, {key: tensor for key, tensor in state.items() if ".lora_B." in key})
    for layer in range(adapter.architecture.num_layers):
        for target in adapter.targets:
            probes = _probes(adapter.architecture.features(target)[0])
            expected = _expected(adapter, layer, target, probes)
            for module in expected:
                a, b = places[layer, module]
                fault = (
                    None if tuple(a.shape) == (config["r"], probes.shape[0]) else f"{list(a.shape)} in layer {layer}, {module}"
                )
                rules.require("lora_A is [r, in]", fault)
                fault = None if tuple(b.shape) == (expected[module].shape[0], config["r"]) else f"{list(b.shape)} in {module}"
                rules.require("lora_B is [out, r]", fault)
                update = {module: _update(a, b, probes, config["lora_alpha"] / config["r"])}
                _same_update(rules, update, {module: expected[module]}, b, f"layer {layer}")
    return rules.held


def _check_archive(rules: Rules, path: Path) -> None:
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
    except tarfile.ReadError as error:
        rules.require("a plain, uncompressed tar", str(error))
        return
    rules.require("a plain, uncompressed tar", None)
    odd = [member.name for member in members if not member.isreg()]
    rules.require("regular members only", f"{odd[0]} is not a file" if odd else None)
    names = sorted(member.name for member in members)
    wanted = ["model_config.yaml", "model_weights.ckpt"]
    accepted = (wanted, [f"./{name}" for name in wanted])
    rules.require(
        "exactly model_config.yaml and model_weights.ckpt, under one prefix", None if names in accepted else f"it holds {names}"
    )


def _load_flat(rules: Rules, path: Path) -> dict[str, Tensor]:
    import torch

    with tarfile.open(path, "r:") as archive:
        member = next(member for member in archive.getmembers() if member.name.endswith("model_weights.ckpt"))
        state = torch.load(archive.extractfile(member), map_location="cpu", weights_only=True)
    odd = [
        key
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.ndim == 2)
    ]
    rules.require("a flat dictionary of two-dimensional tensors", f"the key {odd[0]!r}" if odd else None)
    storages: dict[int, str] = {}
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        shared = storages.setdefault(storage.data_ptr(), key) != key
        rules.require("every tensor has storage of its own", None if whole and not shared else f"the key {key!r}")
    return state


def _read_back(rules: Rules, path: Path) -> LoraAdapter:
    """The export as the workshop's own reader sees it, which checks shapes, ranks, layers, halves and finite numbers."""
    rule = "every layer has both halves, of one rank, in the shapes of the base, and finite"
    try:
        written = read_adapter(path)
    except WorkshopError as error:
        raise ConformanceFailed(f"The export breaks the rule '{rule}': {error} So it is not used.") from error
    rules.require(rule, None)
    return written


def _check_trtllm_keys(rules: Rules, state: Mapping[str, Tensor]) -> None:
    for key in state:
        fault = None if _TRTLLM_ADAPTER in key and _TRTLLM_LAYER.match(key) else f"the key {key!r}"
        rules.require("attention_qkv only, with the layer's number in the key", fault)
        ends = key.endswith(("linear_in.weight", "linear_out.weight"))
        rules.require("keys end in linear_in.weight or linear_out.weight", None if ends else f"the key {key!r}")


def _check_nemo_config(rules: Rules, config: Mapping[str, Any], adapter: LoraAdapter, record: Record) -> None:
    absent = [field for field in _CONVERTER_FIELDS if config.get(field) is None]
    rules.require("the YAML has every field that NeMo's converter reads", f"{absent[0]} is missing" if absent else None)
    sizes = config["tensor_model_parallel_size"], config["pipeline_model_parallel_size"]
    rules.require("one tensor-parallel and one pipeline-parallel rank", None if sizes == (1, 1) else f"sizes {sizes}")
    lora = config["peft"]["lora_tuning"]
    rules.require("variant nemo", None if lora.get("variant") == "nemo" else f"variant is {lora.get('variant')!r}")
    alpha = adapter.rank if record.alpha_baked_in else adapter.alpha
    rules.require(
        "alpha equals adapter_dim where it is baked in, else the trained alpha",
        None if lora["alpha"] == alpha else f"peft.lora_tuning.alpha is {lora['alpha']}",
    )
    stated = config.get("workshop", {})
    fault = next((f"workshop.{field} is missing" for field in ("reader", "qkv_order") if not stated.get(field)), None)
    rules.require("the intended reader and the row order are stated", fault)


def _load_peft(rules: Rules, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    rule = f"{hf_peft.CONFIG} is a JSON object and {hf_peft.WEIGHTS} a safetensors file"
    try:
        config = json.loads((directory / hf_peft.CONFIG).read_text(encoding="utf-8"))
        state = load_file(directory / hf_peft.WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConformanceFailed(f"The export breaks the rule '{rule}': {error}, so it is not used.") from error
    rules.require(rule, None if isinstance(config, dict) else f"{hf_peft.CONFIG} holds a {type(config).__name__}")
    return config, state


def _check_peft_config(rules: Rules, config: Mapping[str, Any], adapter: LoraAdapter) -> None:
    exact = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
    }
    for field, value in exact.items():
        fault = None if config.get(field) == value else f"it is {config.get(field)!r}"
        rules.require(f"adapter_config.json: {field} is {value!r}", fault)
    base = config.get("base_model_name_or_path")
    rules.require("adapter_config.json names the base", None if base else "base_model_name_or_path is empty; give --base")


def _check_peft_keys(
    rules: Rules, state: Mapping[str, Tensor], config: Mapping[str, Any], adapter: LoraAdapter
) -> dict[tuple[int, str], list[Tensor]]:
    """The tensors [A, B] by (layer, module), after checking that nothing is missing, surplus or misnamed."""
    matches = {key: _PEFT_KEY.fullmatch(key) for key in state}
    odd = [key for key, match in matches.items() if not match]
    rules.require("keys are base_model.model.model.layers.N.BLOCK.PROJ.lora_A|B.weight", f"the key {odd[0]!r}" if odd else None)
    stated = config.get("target_modules") or []
    named = {match[3] for match in matches.values()}
    rules.require(
        "target_modules equals the modules in the keys",
        None if sorted(named) == sorted(stated) else f"{sorted(named)} in the keys, {stated} named",
    )
    modules = [module for target in adapter.targets for module in MODULES[target]]
    wanted = {
        hf_peft.key(layer, module, matrix)
        for layer in range(adapter.architecture.num_layers)
        for module in modules
        for matrix in "AB"
    }
    differing = sorted(wanted ^ set(state))
    rules.require(
        "every module of every layer has A and B, and nothing else", f"the key {differing[0]!r}" if differing else None
    )
    return {
        (layer, module): [state[hf_peft.key(layer, module, matrix)] for matrix in "AB"]
        for layer in range(adapter.architecture.num_layers)
        for module in modules
    }


def _check_finite(rules: Rules, state: Mapping[str, Tensor]) -> None:
    import torch

    bad = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    rules.require("every number is finite", f"the key {bad[0]!r}" if bad else None)


def _check_trained(rules: Rules, outs: Mapping[str, Tensor]) -> None:
    """B starts at zero. All zero means that nothing was learnt, and that the adapter answers like its base."""
    zero = all(not tensor.any() for tensor in outs.values())
    rules.require("the adapter was trained", f"every B is zero, from {next(iter(outs))!r} on" if zero else None)


def _probes(features: int) -> Tensor:
    """Random inputs ``[features, 4]``, the same every time, in double precision."""
    import torch

    return torch.randn(features, _PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _update(a: Tensor, b: Tensor, probes: Tensor, scale: float) -> Tensor:
    """``scale * B (A x)`` in double precision: ``[r, in]``, ``[out, r]``, ``[in, n]`` to ``[out, n]``."""
    return scale * (b.double() @ (a.double() @ probes))


def _expected(adapter: LoraAdapter, layer: int, target: str, probes: Tensor) -> dict[str, Tensor]:
    """What the trained adapter adds to each Hugging Face module's output ``[out, n]``, from the adapter as it was read."""
    linear_in, linear_out = adapter.weights[layer, target]
    return _parts(_update(linear_in, linear_out, probes, adapter.scale), target, adapter, adapter.qkv_order)


def _parts(update: Tensor, target: str, adapter: LoraAdapter, order: str) -> dict[str, Tensor]:
    """Cut a fused layer's output ``[out, n]`` into the modules of Hugging Face, one head after the other."""
    import torch

    modules = MODULES[target]
    if target == "attention_qkv":
        nh, ng, hd = adapter.architecture.heads
        size = nh // ng
        if order == "interleaved":
            first = [
                [(head // size) * (size + 2) + head % size for head in range(nh)],
                [group * (size + 2) + size for group in range(ng)],
                [group * (size + 2) + size + 1 for group in range(ng)],
            ]
        else:
            first = [list(range(nh)), list(range(nh, nh + ng)), list(range(nh + ng, nh + 2 * ng))]
        cut = [torch.cat([update[slot * hd : (slot + 1) * hd] for slot in slots]) for slots in first]
    elif target == "mlp_fc1" and adapter.architecture.gated:
        half = adapter.architecture.ffn_hidden_size
        cut = [update[:half], update[half:]]
    else:
        return {modules[0]: update}
    return dict(zip(modules, cut, strict=True))


def _same_update(rules: Rules, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], b: Tensor, where: str) -> None:
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for module, tensor in found.items():
        difference = (tensor - expected[module]).abs().max().item()
        fits = difference <= _TOLERANCE.get(str(b.dtype), 3e-2) * largest
        fault = None if fits else f"{where}, {module}: off by {difference:.2g} where the largest value is {largest:.2g}"
        rules.require("each module's update equals the trained one", fault)
