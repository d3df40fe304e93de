"""Prove exports: load each with the reader that exists on this machine, and compare logits and
weight updates with the trained adapter.

Each export is read by somebody else: PEFT, transformers, NeMo's own converter, NeMo's own exporter
(where that fails, torch's distributed checkpoints). TensorRT-LLM is not here; its file is read by
the rules of ``tensorrt_llm/lora_manager.py``: rows Q|K|V, no scale. So is the trained side, where
somebody else reads it: PEFT its own, NeMo's converter a ``.nemo`` as NeMo wrote it. Of other
adapters it is the base with ``alpha / rank * B A`` added, cut head by head with the code of
:mod:`.check`, not that of the exporters. The weights are compared with the latter in any case.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workshop_utils.adapters import merge
from workshop_utils.adapters.adapter import LoraAdapter, as_tensor
from workshop_utils.adapters.check import ROUNDING, SUM, cut
from workshop_utils.adapters.read import find_adapter, read_adapter
from workshop_utils.adapters.read_peft import base_architecture
from workshop_utils.checkpoints.formats import (
    huggingface,
    huggingface_config,
    nemo_archive,
    values,
)
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.lora_layout import PEFT_CONFIG
from workshop_utils.checkpoints.formats.rank_files import rank_files
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedAdapter, WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.runtime.processes import run_quietly

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

OURS = "this workshop"
_CONVERTER = "NeMo's lora_converter.py, then PEFT"
_EXPORTER = "NeMo's llm.export_ckpt, then transformers"
BY_OTHERS = ("PEFT", "transformers", _CONVERTER, _EXPORTER)
"""Readers in which no code of ours takes part. What torch.distributed.checkpoint reads we cut into
modules, and TensorRT-LLM's rules are as we read them."""

PROMPTS = (
    "The printer on the third floor prints empty pages. Who can help?",
    "Classify this ticket: I cannot log in since this morning.",
    "Return a JSON object with the keys category and priority.",
    "Once upon a time",
)


@dataclass(frozen=True)
class Form:
    """One export under proof.

    ``logits`` is the largest difference of a logit from the trained adapter's, ``agreement`` the
    share of positions with the same most likely token. ``update`` is the largest difference of a
    weight update, relative to the largest trained one, over all modules; ``by_layer`` the same for
    each layer. ``not_checked`` says why it could not be loaded here; the figures are then None.
    """

    name: str
    path: Path
    reader: str
    dtype: str
    logits: float | None = None
    agreement: float | None = None
    update: float | None = None
    by_layer: tuple[float, ...] = ()
    proven: bool | None = None
    not_checked: str | None = None


@dataclass(frozen=True)
class Proof:
    """``effect`` is the largest difference of a logit that the trained adapter, as ``trained_by``
    reads it, makes to the base, over ``tokens`` tokens of prompts."""

    adapter: Path
    base: Path
    effect: float
    tokens: int
    forms: tuple[Form, ...]
    trained_by: str = OURS

    @property
    def proven(self) -> bool:
        """Whether the adapter changes something, and every form that could be loaded computes
        it."""
        return (
            self.effect > 0
            and any(form.proven for form in self.forms)
            and all(form.proven is not False for form in self.forms)
        )

    def table(self) -> str:
        """The figures, one line a form."""
        lines = [
            f"{'form':16} {'dtype':9} {'logits':>9} {'same token':>10} {'update':>9}  "
            f"{'verdict':10} read by"
        ]
        for form in self.forms:
            figures = f"{'':30}"
            if not form.not_checked:
                figures = f"{form.logits:9.1e} {form.agreement:10.1%} {form.update:9.1e}"
            verdict = {True: "equal", False: "DIFFERS", None: "not told"}[form.proven]
            lines.append(
                f"{form.name:16} {form.dtype:9} {figures}  {verdict:10} "
                f"{form.not_checked or form.reader}"
            )
        who = f"The adapter itself, as {self.trained_by} reads it,"
        effect = f"{who} moves a logit by up to {self.effect:.2g}"
        return "\n".join([*lines, f"{effect} ({self.tokens} tokens)."])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {
            "adapter": shown(self.adapter),
            "base": shown(self.base),
            "forms": [dataclasses.asdict(its) | {"path": shown(its.path)} for its in self.forms],
            "proven": self.proven,
        }

    def save(self, target: Path | None = None) -> Path:
        """Write the proof as JSON and return its path: by default ``proof.json`` in the directory
        that holds all exports, or ``NAME.proof.json`` beside the only one."""
        paths_of = [form.path for form in self.forms]
        if not target and len(paths_of) == 1:
            name = paths_of[0].name.removesuffix(".nemo")
            target = paths_of[0].with_name(f"{name}.proof.json")
        elif not target:
            target = Path(os.path.commonpath([path.resolve() for path in paths_of])) / "proof.json"
        return paths.write_text(target, json.dumps(self.as_dict(), indent=2) + "\n")


def prove(
    adapter: Path | str,
    exports: Mapping[str, Path],
    base: Path | str,
    prompts: Sequence[str] = PROMPTS,
    trust: bool = False,
) -> Proof:
    """Compare the ``exports`` (name -> path) of ``adapter`` with it, on the Hugging Face model
    ``base``, in single precision on the CPU.

    One model is in memory at a time. ``trust`` as for
    :func:`workshop_utils.checkpoints.verify.verify.require_sound`.

    Raises:
        UnsupportedAdapter: ``base`` is no Hugging Face model directory, or not the adapter's.
        CheckpointError: one of the parts is unsafe or damaged.
    """
    base = merge.base_directory(base, "hf-merged")
    if (base / PEFT_CONFIG).is_file():
        raise UnsupportedAdapter(
            f"{shown(base)} holds an adapter, too, which transformers loads with it: give the base "
            "without one."
        )
    for path in (base, find_adapter(adapter), *exports.values()):
        require_sound(path, trust)
    trained = read_adapter(adapter, base)
    tokens = _tokens(base, prompts)
    model = load(base)
    plain = logits(model, tokens)
    truth = _Truth(trained, base)
    trained_by, others = _read_by_others(trained.source, base)
    if others:
        model = others
    else:
        for layer, module, _, after in truth.weights():
            _parameter(model, layer, module).data.copy_(after)
    expected = logits(model, tokens)
    del model, others
    effect = compare(expected, plain).largest
    if not math.isfinite(effect):
        raise DamagedCheckpoint(
            f"{shown(base)} with {shown(trained.source)} gives logits that are no numbers. Check "
            "the base's weights."
        )
    forms = [
        _prove_one(name, Path(path), base, truth, tokens, expected, effect)
        for name, path in exports.items()
    ]
    count = sum(map(len, tokens))
    return Proof(trained.source, base, effect, count, tuple(forms), trained_by)


def _read_by_others(adapter: Path, base: Path) -> tuple[str, Any]:
    """Who reads the trained adapter, and the base with it; None where nobody else's reader is
    here."""
    # The converter of NeMo 2.4.1 knows no .nemo in parts, and no .ckpt.
    is_whole = (
        adapter.suffix == ".nemo"
        and len(rank_files(member.name for member in nemo_archive.members(adapter))) == 1
    )
    if is_whole or (adapter / PEFT_CONFIG).is_file():
        reader, reads = _reader(adapter)
        if reads is not _as_trtllm:
            try:
                return reader, reads(adapter, base)
            except UnsupportedAdapter:
                pass
            except _DOES_NOT_LOAD as error:
                raise UnsupportedAdapter(
                    f"{shown(adapter)} does not load onto {shown(base)} ({reader}): "
                    f"{str(error).strip().splitlines()[-1].strip()[:200]}"
                ) from error
    return OURS, None


class Difference(NamedTuple):
    """``largest`` difference of a logit (NaN where one is no number), where the largest that was
    expected is ``scale``; ``agreement`` is the share of tokens with the same likeliest next one."""

    largest: float
    scale: float
    agreement: float


Side = Any
"""Whose logits: a directory of a Hugging Face model, a pair of one and of a PEFT adapter's, a model
that is loaded, or a function of the token ids."""


def logits(side: Side, token_ids: Sequence[Sequence[int]]) -> list[numpy.ndarray]:
    """fp32 logits ``[tokens, vocabulary]`` of each row, all in one pass: what fills up the shorter
    ones comes after them, where it changes nothing."""
    import numpy
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if isinstance(side, (Path, tuple)):
        side = load(*side) if isinstance(side, tuple) else load(side)
    if isinstance(side, torch.nn.Module):
        rows = [torch.tensor(row, device=side.device) for row in token_ids]
        inputs = {"input_ids": pad_sequence(rows, batch_first=True)}
        if len(set(map(len, rows))) > 1:
            ones = [torch.ones_like(row) for row in rows]
            inputs["attention_mask"] = pad_sequence(ones, batch_first=True)
        with torch.inference_mode():
            rows = side(**inputs).logits.float().cpu().numpy()
    else:
        rows = numpy.asarray(side(token_ids))
    return [row[: len(ids)] for row, ids in zip(rows, token_ids, strict=True)]


def compare(some: Sequence[numpy.ndarray], expected: Sequence[numpy.ndarray]) -> Difference:
    """What :func:`logits` gave for two sides. The vocabulary of one may be padded at its end."""
    import numpy

    words = min(some[0].shape[-1], expected[0].shape[-1])
    one, other = (numpy.concatenate(side)[..., :words] for side in (some, expected))
    return Difference(
        float(abs(one - other).max()),
        float(abs(other).max()),
        float((one.argmax(-1) == other.argmax(-1)).mean()),
    )


#: What PEFT raises for a file that is not as it should be.
_DOES_NOT_LOAD = (RuntimeError, UserWarning, ValueError, TypeError, AttributeError, LookupError)


def load(model: Path, adapter: Path | None = None) -> Any:
    """The Hugging Face model, with the PEFT adapter if there is one, in single precision; what PEFT
    warns of (keys that are missing) is an error here."""
    import torch
    from transformers import AutoModelForCausalLM

    with huggingface_config.readable(model) as place, huggingface_config.loading(model):
        loaded = AutoModelForCausalLM.from_pretrained(
            place, torch_dtype=torch.float32, trust_remote_code=False
        )
    if adapter:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            loaded = PeftModel.from_pretrained(loaded, str(adapter))
    return loaded.eval()


class _Truth:
    """What the trained adapter does to each module of the base."""

    def __init__(self, adapter: LoraAdapter, base: Path) -> None:
        self.adapter = adapter
        self._checkpoint = huggingface.describe(base)
        self._stored = {tensor.name: tensor for tensor in self._checkpoint.tensors}
        self.layers = 1 + max(layer for layer, _ in adapter.weights)

    def weights(self) -> Iterator[tuple[int, str, Tensor, Tensor]]:
        """Layer, Hugging Face module, and its weight in the base and trained, fp32 ``[out,
        in]``."""
        sizes, order = self.adapter.architecture, self.adapter.qkv_order
        for (layer, target), (a, b) in self.adapter.weights.items():
            update = self.adapter.scale * (b.float() @ a.float())
            magnitude = self.adapter.magnitudes.get((layer, target))
            columns = update if magnitude is None else magnitude.float()[:, None]
            lengths = cut(columns, target, sizes, order)
            for module, rows in cut(update, target, sizes, order).items():
                before = self._base(f"model.layers.{layer}.{module}.weight")
                after = before + rows
                if magnitude is not None:
                    after *= lengths[module] / after.norm(dim=1, keepdim=True)
                yield layer, module, before, after

    def _base(self, name: str) -> Tensor:
        if name not in self._stored:
            raise UnsupportedAdapter(
                f"{shown(self._checkpoint.path)} has no {name}: it is not the base of "
                f"{shown(self.adapter.source)}."
            )
        return as_tensor(values.read_tensor(self._checkpoint, self._stored[name])).float()


def _prove_one(
    name: str,
    path: Path,
    base: Path,
    truth: _Truth,
    tokens: list[list[int]],
    expected: list[numpy.ndarray],
    effect: float,
) -> Form:
    reader, reads = _reader(path)
    form = Form(name, path, reader, identify(path).dtype or "unknown")
    try:
        try:
            model = reads(path, base)
        except WorkshopError:
            if reads is not _as_nemo_exports:
                raise
            form = dataclasses.replace(form, reader="torch.distributed.checkpoint")
            model = _as_torch_dist(path, base)
    except UnsupportedAdapter as error:
        return dataclasses.replace(form, not_checked=str(error))
    except _DOES_NOT_LOAD as error:
        why = f"it does not load: {str(error).splitlines()[0]}"
        return dataclasses.replace(form, proven=False, not_checked=why)
    comparison = compare(logits(model, tokens), expected)
    if not effect:
        why = "the adapter changes no logit: there is nothing to prove"
        return dataclasses.replace(form, not_checked=why)
    if not math.isfinite(comparison.largest):
        return dataclasses.replace(form, proven=False, not_checked="its logits are no numbers")
    merged = not path.is_file() and not (path / PEFT_CONFIG).is_file()
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    rounding = ROUNDING.get(form.dtype, 0.0)
    layers, fits = [0.0] * truth.layers, True
    for layer, module, before, after in truth.weights():
        difference = (_parameter(model, layer, module).data.float() - after).abs()
        largest = (after - before).abs().max()
        # Of an adapter, relative to the largest update: A has its rounding, and so has B; each is
        # added up over the rank.
        allowed = rounding * after.abs() if merged else 4 * rounding * largest
        fits &= bool((difference <= allowed + SUM * after.abs().max()).all())
        share = difference.max() / largest if largest else difference.max()
        layers[layer] = max(layers[layer], share.item())
    # Half precision rounds every weight of a merged model: the logits then differ by a part of the
    # effect, and the weights decide.
    enough = effect * (1e-3 if form.dtype == "float32" else 0.5)
    return dataclasses.replace(
        form,
        logits=comparison.largest,
        agreement=comparison.agreement,
        update=max(layers),
        by_layer=tuple(layers),
        proven=fits and comparison.largest <= enough,
    )


def _reader(path: Path) -> tuple[str, Callable[[Path, Path], Any]]:
    """Who reads the export at ``path``, in words, and a function of it and the base that returns a
    model."""
    if path.is_file():
        if section(nemo_archive.read_config(path), "workshop").get("alpha_baked_in"):
            return "TensorRT-LLM's rules", _as_trtllm
        return _CONVERTER, _as_nemo_converts
    if (path / PEFT_CONFIG).is_file():
        return "PEFT", _as_peft
    if (path / "config.json").is_file():
        return "transformers", lambda path, _: load(path)
    return _EXPORTER, _as_nemo_exports


def _as_peft(path: Path, base: Path) -> Any:
    return load(base, path)


def _as_trtllm(path: Path, base: Path) -> Any:
    """The base with what TensorRT-LLM takes from the file: ``B A`` without a scale, all q rows, all
    k rows, all v rows."""
    import torch

    with tarfile.open(path, "r:") as archive:
        names = [name for name in archive.getnames() if name.endswith("model_weights.ckpt")]
        file = archive.extractfile(names[0])
        state = torch.load(file, map_location="cpu", weights_only=True)
    model = load(base)
    for key, a in state.items():
        if not key.endswith("linear_in.weight"):
            continue
        attention = model.model.layers[int(re.match(r".*\.layers\.(\d+)\..*", key)[1])].self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        update = state[key.replace("linear_in", "linear_out")].float() @ a.float()
        parts = update.split([module.out_features for module in projections])
        for module, rows in zip(projections, parts, strict=True):
            module.weight.data += rows
    return model


def _as_nemo_converts(path: Path, base: Path) -> Any:
    """What NeMo's own converter makes of the file, loaded by PEFT."""
    config = nemo_archive.read_config(path)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("kv_channels", hidden // heads) * heads != hidden:
        raise UnsupportedAdapter(
            "NeMo's converter takes hidden_size / heads for the head size; this model's is "
            f"{config['kv_channels']}"
        )
    targets = config["peft"]["lora_tuning"]["target_modules"]
    if config.get("activation") == "squared-relu" and "mlp_fc1" in targets:
        raise UnsupportedAdapter(
            "NeMo's converter halves mlp_fc1 into gate and up, and this model has no gate"
        )
    with tempfile.TemporaryDirectory() as folder:
        _converter().convert_lora_nemo_to_canonical(str(path), folder, hf_format=True)
        return load(base, Path(folder))


def _converter() -> Any:
    """``nemo/export/utils/lora_converter.py`` alone: the package around it takes a minute to
    import."""
    nemo = Path(importlib.util.find_spec("nemo").submodule_search_locations[0])
    for name, file in (
        ("nemo.export.tarutils", "export/tarutils.py"),
        ("workshop_lora_converter", "export/utils/lora_converter.py"),
    ):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, nemo / file)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    return sys.modules["workshop_lora_converter"]


def _as_nemo_exports(directory: Path, base: Path) -> Any:
    """What NeMo's own exporter makes of a NeMo 2.0 checkpoint, in a process of its own: it starts
    Megatron's groups."""
    with paths.temporary_directory("workshop-proof-") as folder:
        made = folder / "model"
        run_quietly(
            "import", "--to-huggingface", str(directory.resolve()), "--out", str(made), "--trust"
        )
        return load(made)


def _as_torch_dist(directory: Path, base: Path) -> Any:
    """The base with the linear layers of a NeMo 2.0 checkpoint, which torch itself reads."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(directory / "weights")
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        for name in merge.FUSED
        if name in stored
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    model, sizes = load(base), base_architecture(base)
    for name, stacked in state.items():
        for layer, weight in enumerate(stacked):
            parts = cut(weight.float(), merge.FUSED[name], sizes, "interleaved")
            for module, rows in parts.items():
                _parameter(model, layer, module).data.copy_(rows)
    return model


def _parameter(model: Any, layer: int, module: str) -> Any:
    return model.model.layers[layer].get_submodule(module).weight


def _tokens(base: Path, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt; without a tokenizer beside the model, fixed random ones."""
    if (base / "tokenizer_config.json").is_file():
        tokenizer = huggingface_config.load_tokenizer(base)
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    import torch

    vocabulary = huggingface_config.with_defaults(read_json(base / "config.json"))["vocab_size"]
    seed = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (len(prompts), 16), generator=seed).tolist()
