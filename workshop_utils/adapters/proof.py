"""Prove exports: load each with the reader that exists on this machine, and compare logits and
weight updates with the trained adapter.

The trained side is the base with ``alpha / rank * B A`` added, cut head by head with the code of
:mod:`.check`, not that of the exporters. Each export is read by somebody else: PEFT, transformers,
torch's distributed checkpoints, NeMo's own converter. TensorRT-LLM is not here; its file is read by
the rules of ``tensorrt_llm/lora_manager.py``: rows Q|K|V, no scale.
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
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters import merge
from workshop_utils.adapters.adapter import LoraAdapter, as_tensor
from workshop_utils.adapters.check import ROUNDING, SUM, cut
from workshop_utils.adapters.modules import MODULES
from workshop_utils.adapters.read import find_adapter, read_adapter
from workshop_utils.adapters.read_peft import base_architecture
from workshop_utils.checkpoints.formats import huggingface, nemo_archive, values
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

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
    each layer. ``untold`` says why it could not be loaded here; the figures are then None.
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
    untold: str | None = None


@dataclass(frozen=True)
class Proof:
    """``effect`` is the largest difference of a logit that the trained adapter makes to the base,
    over ``tokens`` tokens of prompts."""

    adapter: Path
    base: Path
    effect: float
    tokens: int
    forms: tuple[Form, ...]

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
            (
                f"{'form':16} {'dtype':9} {'logits':>9} {'same token':>10} {'update':>9}  "
                f"{'verdict':10} read by"
            )
        ]
        for form in self.forms:
            figures = (
                ""
                if form.untold
                else f"{form.logits:9.1e} {form.agreement:10.1%} {form.update:9.1e}"
            )
            verdict = "equal" if form.proven else "not told" if form.proven is None else "DIFFERS"
            lines.append(
                f"{form.name:16} {form.dtype:9} {figures:30}  {verdict:10} "
                f"{form.untold or form.reader}"
            )
        return "\n".join(
            [
                *lines,
                (
                    f"The adapter itself moves a logit by up to {self.effect:.2g} ({self.tokens} "
                    "tokens)."
                ),
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        forms = [dataclasses.asdict(form) | {"path": shown(form.path)} for form in self.forms]
        return dataclasses.asdict(self) | {
            "adapter": shown(self.adapter),
            "base": shown(self.base),
            "forms": forms,
            "proven": self.proven,
        }

    def save(self, target: Path | None = None) -> Path:
        """Write the proof as JSON, by default beside the exports, and return its path."""
        return paths.write_text(
            target or _beside([form.path for form in self.forms]),
            json.dumps(self.as_dict(), indent=2) + "\n",
        )


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
    for path in (base, find_adapter(adapter), *exports.values()):
        require_sound(path, trust)
    trained = read_adapter(adapter, base)
    tokens = _tokens(base, prompts)
    model = _load(base)
    plain = _logits(model, tokens)
    truth = _Truth(trained, base)
    truth.add_to(model)
    wanted = _logits(model, tokens)
    del model
    effect = _difference(wanted, plain)
    if not math.isfinite(effect):
        raise DamagedCheckpoint(
            f"{shown(base)} with {shown(trained.source)} gives logits that are no numbers. Check "
            "the base's weights."
        )
    forms = [
        _prove_one(name, Path(path), base, truth, tokens, wanted, effect)
        for name, path in exports.items()
    ]
    return Proof(trained.source, base, effect, sum(map(len, tokens)), tuple(forms))


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
            if target in MODULES:
                updates, lengths = (cut(rows, target, sizes, order) for rows in (update, columns))
            else:
                updates, lengths = {target: update}, {target: columns}
            for module, rows in updates.items():
                before = self._base(layer, module)
                after = before + rows
                if magnitude is not None:
                    after *= lengths[module] / after.norm(dim=1, keepdim=True)
                yield layer, module, before, after

    def _base(self, layer: int, module: str) -> Tensor:
        name = f"model.layers.{layer}.{module}.weight"
        if name not in self._stored:
            raise UnsupportedAdapter(
                f"{shown(self._checkpoint.path)} has no {name}: it is not the base of "
                f"{shown(self.adapter.source)}."
            )
        return as_tensor(values.read_tensor(self._checkpoint, self._stored[name])).float()

    def add_to(self, model: PreTrainedModel) -> None:
        """Give ``model``, the base, the trained weights."""
        for layer, module, _, after in self.weights():
            _parameter(model, layer, module).data.copy_(after)


def _prove_one(
    name: str,
    path: Path,
    base: Path,
    truth: _Truth,
    tokens: list[list[int]],
    wanted: list[Tensor],
    effect: float,
) -> Form:
    reader, load = _reader(path)
    form = Form(name, path, reader, _dtype(path))
    try:
        model = load(path, base)
    except UnsupportedAdapter as error:
        return dataclasses.replace(form, untold=str(error))
    except (UserWarning, RuntimeError) as error:
        return dataclasses.replace(
            form, proven=False, untold=f"it does not load: {str(error).splitlines()[0]}"
        )
    found = _logits(model, tokens)
    logits = _difference(found, wanted)
    if not effect:
        return dataclasses.replace(
            form, untold="the adapter changes no logit: there is nothing to prove"
        )
    if not math.isfinite(logits):
        return dataclasses.replace(form, proven=False, untold="its logits are no numbers")
    merged = not path.is_file() and not (path / "adapter_config.json").is_file()
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
    same = [
        bool(pair)
        for one, other in zip(found, wanted, strict=True)
        for pair in one.argmax(-1) == other.argmax(-1)
    ]
    # Half precision rounds every weight of a merged model: the logits then differ by a part of the
    # effect, and the weights decide.
    enough = effect * (1e-3 if form.dtype == "float32" else 0.5)
    return dataclasses.replace(
        form,
        logits=logits,
        agreement=sum(same) / len(same),
        update=max(layers),
        by_layer=tuple(layers),
        proven=fits and logits <= enough,
    )


def _difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of a logit; NaN where one of them is no number."""
    import torch

    return (torch.cat(some) - torch.cat(others)).abs().max().item()


def _reader(path: Path) -> tuple[str, Callable[[Path, Path], Any]]:
    """Who reads the export at ``path``, in words, and a function of it and the base that returns a
    model."""
    if path.is_file():
        section = nemo_archive.read_config(path).get("workshop")
        baked = isinstance(section, dict) and section.get("alpha_baked_in")
        return (
            ("TensorRT-LLM's rules", _as_trtllm)
            if baked
            else ("NeMo's lora_converter.py, then PEFT", _as_nemo_converts)
        )
    if (path / "adapter_config.json").is_file():
        return "PEFT", _with_peft
    if (path / "config.json").is_file():
        return "transformers", lambda path, _: _load(path)
    return "torch.distributed.checkpoint", _as_torch_dist


def _load(directory: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, trust_remote_code=False
    ).eval()


def _with_peft(directory: Path, base: Path) -> Any:
    """PEFT's model; what it warns of (keys that are missing) is an error here."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(_load(base), str(directory)).eval()


def _as_trtllm(path: Path, base: Path) -> PreTrainedModel:
    """The base with what TensorRT-LLM takes from the file: ``B A`` without a scale, all q rows, all
    k rows, all v rows."""
    import torch

    with tarfile.open(path, "r:") as archive:
        member = next(
            member for member in archive.getmembers() if member.name.endswith("model_weights.ckpt")
        )
        state = torch.load(archive.extractfile(member), map_location="cpu", weights_only=True)
    model = _load(base)
    for key, a in state.items():
        if not key.endswith("linear_in.weight"):
            continue
        attention = model.model.layers[int(re.match(r".*\.layers\.(\d+)\..*", key)[1])].self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        update = state[key.replace("linear_in", "linear_out")].float() @ a.float()
        for module, rows in zip(
            projections, update.split([one.out_features for one in projections]), strict=True
        ):
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
    if (
        config.get("activation") == "squared-relu"
        and "mlp_fc1" in config["peft"]["lora_tuning"]["target_modules"]
    ):
        raise UnsupportedAdapter(
            "NeMo's converter halves mlp_fc1 into gate and up, and this model has no gate"
        )
    with tempfile.TemporaryDirectory() as folder:
        _converter().convert_lora_nemo_to_canonical(str(path), folder, hf_format=True)
        return _with_peft(Path(folder), base)


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


def _as_torch_dist(directory: Path, base: Path) -> PreTrainedModel:
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
    model = _load(base)
    sizes = base_architecture(base)
    for name, stacked in state.items():
        for layer, weight in enumerate(stacked):
            for module, rows in cut(
                weight.float(), merge.FUSED[name], sizes, "interleaved"
            ).items():
                _parameter(model, layer, module).data.copy_(rows)
    return model


def _parameter(model: Any, layer: int, module: str) -> Any:
    block, name = module.split(".")
    return getattr(getattr(model.model.layers[layer], block), name).weight


def _dtype(path: Path) -> str:
    from workshop_utils.checkpoints.formats.identify import identify

    return identify(path).dtype or "unknown"


def _tokens(base: Path, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt; without a tokenizer beside the model, fixed random ones."""
    from transformers import AutoConfig, AutoTokenizer

    if (base / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    import torch

    vocabulary = AutoConfig.from_pretrained(base, trust_remote_code=False).vocab_size
    return torch.randint(
        vocabulary, (len(prompts), 16), generator=torch.Generator().manual_seed(0)
    ).tolist()


def _logits(model: Any, tokens: list[list[int]]) -> list[Tensor]:
    """The logits of each prompt, all in one pass: what fills up the shorter ones comes after them,
    where it changes nothing."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, mask = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        for rows in (tokens, [[1] * len(row) for row in tokens])
    )
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=mask).logits.float()
    return [row[: len(ids)] for row, ids in zip(found, tokens, strict=True)]


def _beside(exports: list[Path]) -> Path:
    """``proof.json`` in the directory that holds all exports, or ``NAME.proof.json`` beside the
    only one."""
    if len(exports) == 1:
        return exports[0].with_name(f"{exports[0].name.removesuffix('.nemo')}.proof.json")
    return Path(os.path.commonpath([path.resolve() for path in exports])) / "proof.json"
