"""What each reader of a LoRA adapter takes: one table.

A row holds for its ``readers``. Its ``check`` says how it is broken, if it is; ``fix`` what to do
about it. ``source`` is the page or public file that it comes from, and the day it was read. NIM's
own loaders are closed: of them the table has what their pages say and what the public engines in
them do, and says so in their notes.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from workshop_utils.adapters.base_id import is_hub_id, is_place
from workshop_utils.adapters.rules.facts import Facts
from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.architecture import number, section, size
from workshop_utils.checkpoints.formats.findings import Severity
from workshop_utils.checkpoints.formats.lora_layout import (
    PEFT_CONFIG,
    PEFT_PREFIX,
    is_peft_key,
    peft_only,
    unknown_to_peft,
)
from workshop_utils.checkpoints.formats.rank_files import rank_files
from workshop_utils.checkpoints.formats.summary import dtypes
from workshop_utils.core.paths import shown


class Source(NamedTuple):
    """The page or file that a rule comes from, and when it was read."""

    where: str
    date: str


class Fault(NamedTuple):
    """How a rule is broken, where its fix or severity depends on how."""

    text: str
    fix: str | None = None
    severity: Severity | None = None


class Reader(NamedTuple):
    """A program. ``usual`` is its largest rank unless ``option`` says otherwise, ``largest`` the
    largest that this may say, ``modes`` how it takes adapters."""

    name: str
    forms: tuple[str, ...]
    option: str = "the largest LoRA rank"
    usual: int | None = None
    largest: int | None = None
    notes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()

    def enough_for(self, rank: int) -> int | None:
        """The smallest value of vLLM's option that allows ``rank``."""
        return next((most for most in VLLM_RANKS if most >= rank), None)


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_CLOSED = "{}'s own loader is closed: these are its pages' rules and those of the public {}"
_NIM_RANK = "NIM_MAX_LORA_RANK"
READERS = {
    "trtllm": Reader("TensorRT-LLM", ("nemo", "hf-peft"), notes=(
        "the largest rank is fixed when an engine is built: give it with --max-rank",)),
    "nemo": Reader("NeMo's script path", ("nemo",)),
    "peft": Reader("PEFT", ("hf-peft",)),
    "vllm": Reader("vLLM", ("hf-peft",), "--max-lora-rank", 16, VLLM_RANKS[-1], (
        "--max-lora-rank of vLLM is 16 unless it is set: "
        f"{', '.join(map(str, VLLM_RANKS[:-1]))} or {VLLM_RANKS[-1]}",)),
    "nim1": Reader("NIM 1.x", ("nemo", "hf-peft"), _NIM_RANK, 32, None, (
        _CLOSED.format("NIM 1.x", "TensorRT-LLM and vLLM"),
        "NVIDIA's tutorial gives NIM 1.0 a .nemo as NeMo wrote it; no NIM was run here",
        "32 is the largest rank of one published profile of NIM 1.x; yours is NIM_MAX_LORA_RANK "
        "(--max-rank)")),
    "nim2": Reader("NIM 2.x", ("hf-peft",), _NIM_RANK, 32, VLLM_RANKS[-1], (
        _CLOSED.format("NIM 2.x", "vLLM"),
        "the pages give no largest rank; 32 is that of NIM 1.x, yours is NIM_MAX_LORA_RANK "
        "(--max-rank)"),
        ("NIM 2.x reads static adapters when it starts; only dynamic ones come and go while it "
         "runs",)),
    "bridge": Reader("Megatron-Bridge", ("iter",)),
    "serve": Reader("this workshop's server", ("nemo", "hf-peft"), "--max-rank"),
}  # fmt: skip
FORMS = {
    "nemo": "a .nemo",
    "hf-peft": "a Hugging Face PEFT directory",
    "iter": "an adapter of its own",
}
#: The way out where the file itself cannot be mended.
TRAINED = "export it again from what the training wrote: workshop export TRAINED_ADAPTER --to ..."


class Ask:
    """``facts`` of an adapter before the reader ``code``, whose largest rank is ``max_rank`` (None:
    what it is unless it is told otherwise). ``copied``: the files go into its store as files."""

    def __init__(self, facts: Facts, code: str, max_rank: float | None, copied: bool) -> None:
        self.facts, self.code, self.copied = facts, code, copied
        self.config, self.tensors, self.keys = facts.config, facts.tensors, facts.keys
        self.reader = READERS[code]
        most = min(max_rank or self.reader.usual or math.inf, self.reader.largest or math.inf)
        self.largest = None if most == math.inf else most

    @cached_property
    def words(self) -> dict[str, Any]:
        """What the titles and fixes of rules name."""
        export = f"workshop export {shlex.quote(shown(self.facts.path))}"
        peft = f"{export} --to hf-peft"
        forms = self.reader.forms
        form = self.facts.form if self.facts.form in forms else forms[-1]
        fused = all(key and key.target == "attention_qkv" for _, key in self.keys)
        fused = fused or self.code != "trtllm"
        nemo = f"{export} --to nemo{' --reader trtllm' if self.code == 'trtllm' else ''}"
        return {
            "takes": " or ".join(FORMS[form] for form in forms),
            "again": nemo if form == "nemo" and fused else peft,
            "peft": peft,
            "merged": f"{export} --to hf-merged --base DIR",
            "nemo2": f"{export} --to nemo2-merged --base DIR",
            "option": self.reader.option,
            "largest": self.largest,
            "even": "alpha" if self.code == "trtllm" else "rank and one alpha",
            "trained": TRAINED,
        }


Answer = Fault | str | None


class Rule(NamedTuple):
    """A row of the table. ``form`` None: of every form. After a broken rule that ``stops`` no other
    is asked. ``values``: it looks at the numbers. ``when``: else it is no question."""

    code: str
    readers: tuple[str, ...]
    form: str | None
    title: str
    check: Callable[[Ask], Answer]
    fix: str
    source: Source
    severity: Severity = Severity.REFUSED
    stops: bool = False
    values: bool = False
    when: Callable[[Ask], bool] = lambda ask: True


def _first(items: Iterable[str]) -> str | None:
    """The first of ``items`` with the number of the others, or None."""
    items = list(items)
    more = f" (and {len(items) - 1} more)" if len(items) > 1 else ""
    return items[0] + more if items else None


def _form(ask: Ask) -> Answer:
    facts = ask.facts
    if facts.form in ask.reader.forms:
        return None
    if facts.several:
        return Fault(facts.what, "give each adapter a directory of its own")
    if ask.code == "bridge":
        return Fault(facts.what, _MERGE_PEFT if peft_only(facts.config) else "merge it: {nemo2}")
    if facts.form == "hf-peft":
        return Fault(facts.what, "{again} --base DIR")
    if not facts.exportable:
        return Fault(
            facts.what,
            "give an adapter: a .nemo or a PEFT directory. A whole model is served as a model",
        )
    return facts.what


def _links(ask: Ask) -> Answer:
    path = ask.facts.path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    links = (f"{file.name} is a link to {os.readlink(file)}" for file in files if file.is_symlink())
    return None if ask.copied else _first(links)


def _alone(ask: Ask) -> Answer:
    path = ask.facts.path
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    kinds = [name for name in names if name == PEFT_CONFIG or name.endswith(".nemo")]
    return f"it holds {', '.join(kinds)}" if len(kinds) > 1 else None


def _readable(ask: Ask) -> Answer:
    if unsafe := _first([*ask.facts.unsafe, *ask.facts.unreadable]):
        fix = "do not load it: its author wants something run" if ask.facts.unsafe else None
        return Fault(unsafe, fix)
    return None


def _parts(ask: Ask) -> Answer:
    files = rank_files(name.removeprefix("./") for name in ask.facts.member_names)
    if len(files) > 1:
        first = _first(sorted(files.values()))
        return f"it holds the parts of {len(files)} model-parallel ranks: {first}"
    return None


def _members(ask: Ask) -> Answer:
    names = sorted(ask.facts.member_names)
    expected = [nemo_archive.CONFIG, nemo_archive.WEIGHTS]
    if names in (expected, [f"./{name}" for name in expected]):
        return None
    if sorted(name.removeprefix("./") for name in names) == expected:
        return f"the prefixes differ: {', '.join(ask.facts.member_names)}"
    more = " ..." if len(names) > 5 else ""
    return f"it holds {', '.join(ask.facts.member_names[:5])}{more}"


def _names(ask: Ask, fits: Callable[[str], bool]) -> Answer:
    """The names of tensors that do not fit."""
    return _first(f"the key {name!r}" for name, _ in ask.keys if not fits(name))


def _silent(check: Callable[[Ask], Answer]) -> Callable[[Ask], Answer]:
    """``check``, whose fault may not matter to NIM 1.x: its loader of a ``.nemo`` is closed, and
    its pages do not speak of it."""

    def ask_it(ask: Ask) -> Answer:
        answer = check(ask)
        if not answer or ask.code != "nim1" or ask.facts.form != "nemo":
            return answer
        fault = answer if isinstance(answer, Fault) else Fault(answer)
        return fault._replace(severity=fault.severity or Severity.NOT_KNOWN)

    return ask_it


def _parallel(ask: Ask) -> Answer:
    sizes = [ask.config.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    return None if all(each in (1, None) for each in sizes) else f"sizes {sizes}"


#: What NeMo's converter reads of the YAML, beside ``peft.lora_tuning``.
_CONVERTER = (
    "hidden_size", "num_attention_heads", "num_query_groups", "num_layers",
    "tensor_model_parallel_size", "pipeline_model_parallel_size",
)  # fmt: skip


def _baked_in(ask: Ask) -> Answer:
    alpha, dim = (ask.config["peft"]["lora_tuning"].get(name) for name in ("alpha", "adapter_dim"))
    right = alpha == (ask.facts.ranks or [dim])[0]
    return None if right else f"alpha is {alpha!r} and adapter_dim {dim!r}"


def _order(ask: Ask) -> str | None:
    return section(ask.config, "workshop").get("qkv_order")


def _rows_in_line(ask: Ask) -> Answer:
    if _order(ask) == "qkv":
        return None
    return f"they are {_order(ask) or 'not stated, and NeMo writes them interleaved by group'}"


def _head_size(ask: Ask) -> Answer:
    names = ("hidden_size", "num_attention_heads", "kv_channels")
    hidden, heads, channels = (size(ask.config, name) or 0 for name in names)
    if not hidden * heads * channels or hidden == heads * channels:
        return None
    return (
        "NeMo's converter takes hidden_size / heads for the head size, and this model's is "
        f"{channels}"
    )


def _stored(ask: Ask) -> Answer:
    """Every tensor has bytes of its own, and the file holds no others."""
    seen: dict[tuple[str, int], str] = {}
    shared = []
    for tensor in ask.tensors:
        for chunk in tensor.chunks:
            other = seen.setdefault((chunk.file, chunk.start), tensor.name)
            if other != tensor.name and chunk.length:
                shared.append(f"{tensor.name} and {other} share their bytes")
    used, stored = sum(tensor.nbytes for tensor in ask.tensors), ask.facts.checkpoint.nbytes
    # A zip has some hundred bytes for each entry.
    if not shared and stored > used + 1024 * len(ask.tensors) + 2**16:
        return (
            f"{stored:,} bytes are stored for {used:,} bytes of tensors: they are views of larger "
            "ones"
        )
    return _first(shared)


def _dtype(ask: Ask) -> Answer:
    kinds = dtypes(ask.tensors)
    if ask.code == "peft" and kinds and all("float" in kind for kind in kinds):
        return None  # it takes each tensor over into the dtype of the layer
    known = {"float32", "bfloat16", "float16"}
    if ask.code in ("trtllm", "nemo", "peft"):
        known.add("float64")
    if len(kinds) == 1 and kinds[0] in known:
        return None
    trust = " --trust" if len(kinds) > 1 else ""
    floating = all("float" in kind for kind in kinds)
    fix = (
        "choose that of the served base (some servers answer like the base when the dtypes "
        f"differ): {{again}} --dtype bfloat16{trust}"
    )
    return Fault(f"it has {', '.join(kinds) or 'no tensors'}", fix if floating else TRAINED)


def _finite(ask: Ask) -> Answer:
    numbers = ask.facts.numbers
    fault = _first(numbers.unread + numbers.infinite)
    return fault and Fault(fault, TRAINED if numbers.unread else None)


def _some_b(ask: Ask) -> Answer:
    zero, count = ask.facts.numbers.zero, ask.facts.numbers.count
    if not zero:
        return None
    if len(zero) == count:
        return f"every B is zero, from {zero[0]!r} on"
    return Fault(f"B is zero in {len(zero)} of {count} modules: {_first(zero)}", "", Severity.NOTE)


def _field(name: str, *allowed: Any) -> Callable[[Ask], Answer]:
    def check(ask: Ask) -> Answer:
        value = ask.config.get(name)
        return None if value in allowed else f"it is {value!r}"

    return check


def _alpha(ask: Ask) -> Answer:
    value = ask.config.get("lora_alpha")
    if ask.code == "peft" and "lora_alpha" not in ask.config:
        return Fault("it is not there: PEFT takes 8", None, Severity.WARNING)
    return None if 0 < (number(ask.config, "lora_alpha") or 0) < 1e9 else f"it is {value!r}"


def _positive(name: str, read: Callable[..., Any]) -> Callable[[Ask], Answer]:
    def check(ask: Ask) -> Answer:
        value = read(ask.config, name)
        return None if value and 0 < value < 1e9 else f"it is {ask.config.get(name)!r}"

    return check


def _weights(ask: Ask) -> Answer:
    if (ask.facts.path / "adapter_model.safetensors").is_file():
        return None
    return (
        f"it has {', '.join(sorted(file.name for file in ask.facts.path.glob('adapter_model*')))}"
    )


def _base(ask: Ask) -> Answer:
    base = ask.config.get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        return "base_model_name_or_path is empty; --base ID records it"
    if is_place(base):
        return f"base_model_name_or_path is {base!r}, a place on the machine of the training"
    if is_hub_id(base):
        return None
    text = f"base_model_name_or_path is {base!r}, without an organisation: the Hub has no such id"
    return Fault(text, "", Severity.NOTE)


_BESIDE = ("bias", "modules_to_save")


def _only_peft(names: Callable[[list[str]], list[str]]) -> Callable[[Ask], Answer]:
    def check(ask: Ask) -> Answer:
        fields, unknown = names(peft_only(ask.config)), unknown_to_peft(ask.config)
        fault = _first(f"{name} is {repr(ask.config[name])[:80]}" for name in fields)
        if fields and set(fields) <= set(unknown):
            fix = (
                "no PEFT up to 0.21 has it: look what it does, or export it with the PEFT it is of"
            )
            return Fault(fault, fix, Severity.NOT_KNOWN)
        return fault

    return check


#: PEFT saves the embedding that it adapts, too, and vLLM's is_base_embedding_weights leaves it out.
_BASE_OF = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
#: What PEFT has beside the matrices: ``lora_bias`` and ``trainable_token_indices``.
_BESIDE_LORA = (".lora_B.bias", ".trainable_tokens_delta")
#: PEFT saves embeddings that were resized.
_OF_THE_BASE = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "layernorm.weight")
_PLAIN_MODULE = re.compile(r"(?:self_attn|mlp)\.\w+")


def _keys(ask: Ask) -> Answer:
    saved = ask.config.get("modules_to_save")
    saved = [f".{name}." for name in saved] if isinstance(saved, list) else []
    lost, beyond, whole = [], [], []
    for name, key in ask.keys:
        if not name.startswith(PEFT_PREFIX) or any(each in name for each in saved):
            continue
        if name.endswith(_BASE_OF) or (ask.code == "peft" and name.endswith(_BESIDE_LORA)):
            continue
        if ask.code == "peft" and not key and name.endswith(_OF_THE_BASE):
            whole.append(f"the key {name!r}")
        elif not key or key.style != "peft" or key.adapter:
            lost.append(f"the key {name!r}")
        elif ask.code == "peft" or (key.half == "magnitude" and ask.config.get("use_dora")):
            continue
        elif key.half == "magnitude" or name.startswith(f"{PEFT_PREFIX}layers."):
            lost.append(f"the key {name!r}")
        elif not (is_peft_key(name) and _PLAIN_MODULE.fullmatch(key.module)):
            beyond.append(f"the key {name!r}")  # experts, the output, or another family's names
    if lost and all(".default" in name for name, _ in ask.keys):
        own = (
            "they still have the adapter's name in them, which only PEFT 0.21 leaves out again: "
            "{again} --trust"
        )
        return Fault(_first(lost), own, Severity.WARNING if ask.code == "peft" else None)
    if beyond and not lost:
        return Fault(
            f"{_first(beyond)}: some families and versions of the server take it, others do not",
            "look it up for your server, or train without these modules",
            Severity.NOT_KNOWN,
        )
    if whole and not lost:
        text = f"{_first(whole)} is a weight of the base's own, which PEFT puts in its place"
        return Fault(text, "servers do not: " + _MERGE_PEFT, Severity.WARNING)
    return _first(lost)


def _magnitudes(ask: Ask) -> Answer:
    lengths = {key.stem for _, key in ask.keys if key and key.half == "magnitude"}
    stems = sorted({key.stem for _, key in ask.keys if key and key.half == "A"} - lengths)
    return _first(f"{stem.removeprefix(PEFT_PREFIX)} has none" for stem in stems)


def _modules(ask: Ask) -> Answer:
    config, faults, odd = ask.config, [], None
    targets = config.get("target_modules")
    if targets is None and (
        ask.code == "peft" or ("target_modules" in config and ask.code != "trtllm")
    ):
        text = "target_modules is null: PEFT takes those that it knows of the base's family"
        severity = Severity.NOTE if ask.code == "peft" else Severity.NOT_KNOWN
        odd = Fault(text, "write the names of the modules that have tensors", severity)
    names = targets if isinstance(targets, list) else [targets]
    if not odd and (not names or not all(name and isinstance(name, str) for name in names)):
        faults.append(f"target_modules is {targets!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name) or {}
        if not isinstance(table, Mapping) or not all(
            (number(table, key) or 0) > 0 for key in table
        ):
            faults.append(f"{name} is {table!r}, no table of positive numbers")
    if fault := _first([*faults, *ask.facts.layout[1]]):
        return fault
    return odd or (Fault(ask.facts.uneven, "", Severity.NOTE) if ask.facts.uneven else None)


def _nulls(ask: Ask) -> Answer:
    names = ("rank_pattern", "alpha_pattern", "bias", "lora_dropout")
    return _first(f"{name} is null" for name in names if ask.config.get(name, ()) is None)


def _uneven(ask: Ask) -> Answer:
    one_rank = ask.code != "trtllm"
    names = ("rank_pattern", "alpha_pattern") if one_rank else ("alpha_pattern",)
    fault = next((f"{name} is set" for name in names if ask.config.get(name)), None)
    if one_rank and len(ask.facts.ranks) > 1:
        fault = f"ranks {ask.facts.ranks}"
    if fault and ask.code == "nim1":
        text = f"{fault}, which TensorRT-LLM takes and vLLM does not: NIM 1.x has both in it"
        return Fault(text, None, Severity.NOT_KNOWN)
    return fault


def _rank(ask: Ask) -> Answer:
    rank = max(ask.facts.ranks, default=None)
    return f"it is {rank}" if rank is None or rank > ask.largest else None


_DAY = "2026-11-27"
_TRTLLM = Source("NVIDIA/TensorRT-LLM: tensorrt_llm/lora_manager.py", _DAY)
_CONVERTS = Source("NVIDIA/NeMo v2.4.1: nemo/export/utils/lora_converter.py", _DAY)
_LOADS = Source("NVIDIA/NeMo v2.4.1: MegatronGPTSFTModel.load_adapters", _DAY)
_PEFT = Source("huggingface/peft 0.21: LoraConfig, set_peft_model_state_dict", _DAY)
_VLLM = Source("vllm-project/vllm: vllm/lora/{lora_model,peft_helper}.py", _DAY)
_NIM = Source("docs.nvidia.com/nim/large-language-models: Parameter-efficient fine-tuning", _DAY)
_TUTORIAL = Source(
    "NVIDIA/NeMo: tutorials/llm/llama-3/{README.rst,llama3-lora-deploy-nim.ipynb}", _DAY
)
_OURS = Source("workshop serve", _DAY)
_SAFE = Source("CVE-2025-23304, CVE-2026-24157: what loading a stranger's file runs", _DAY)

ALL = ("trtllm", "nemo", "peft", "vllm", "nim1", "nim2", "serve")
OFFERED = ALL[:-1]
SERVERS = ("trtllm", "vllm", "nim1", "nim2")
N, W = Severity.NOTE, Severity.WARNING
_UNREADABLE = "fetch it again from where it was made; do not load it"
_MERGE_PEFT = "merge it into its base with PEFT (merge_and_unload)"

RULES = (
    Rule("form", (*ALL, "bridge"), None, "the form: {takes}", _form, "{again}", _NIM, stops=True),
    Rule("links", ("nim1", "nim2"), None, "files, and no links: a container sees only the store",
         _links, "copy the files themselves there (workshop nim stage, or cp -L)", _NIM, W),
    Rule("one-adapter", ("nim1", "nim2", "serve"), None, "one adapter in a directory", _alone,
         "give each adapter a directory of its own; its name is the model's name in the API", _NIM),
    Rule("readable", ALL, None, "it can be read, and nothing in it runs code", _readable,
         _UNREADABLE, _SAFE, stops=True),
    # A .nemo.
    Rule("plain-tar", OFFERED, "nemo", "a plain, uncompressed tar",
         _silent(lambda ask: "it is compressed with gzip"
                 if nemo_archive.is_compressed(ask.facts.file) else None),
         "gunzip it, or: {again}", _TRTLLM),
    Rule("one-part", OFFERED, "nemo", "the weights are in one part", _silent(_parts),
         "put them together: {again}", _TRTLLM, stops=True),
    Rule("members", OFFERED, "nemo",
         "exactly model_config.yaml and model_weights.ckpt, both at the top or both under ./",
         _silent(_members), "{again}", _TRTLLM),
    Rule("plain-lora", OFFERED, "nemo", "a LoRA adapter: peft.peft_scheme lora, variant nemo",
         lambda ask: ask.facts.no_lora,
         "no server reads another kind: train with these two; a whole model is served as a model",
         _CONVERTS, stops=True),
    Rule("qkv-only", ("trtllm",), "nemo", "attention_qkv only",
         lambda ask: _names(
             ask, lambda name: "self_attention.adapter_layer.lora_kqv_adapter" in name),
         "export it for PEFT, which takes every module: {peft}", _TRTLLM),
    Rule("layout", OFFERED, "nemo",
         "every layer has both halves, of one rank, in the shapes that the YAML asks for",
         lambda ask: _first(ask.facts.layout[1]), "{trained}", _TRTLLM),
    # A PEFT directory.
    Rule("safetensors", SERVERS, "hf-peft", "the weights are adapter_model.safetensors", _weights,
         "a .bin is a pickle, which a server unpickles; to be safer: {again}", _NIM, N),
    Rule("lora", ALL, "hf-peft", f"{PEFT_CONFIG}: peft_type is 'LORA'", _field("peft_type", "LORA"),
         "only LoRA adapters are served this way; merge another kind into its base", _PEFT),
    Rule("task", OFFERED, "hf-peft", f"{PEFT_CONFIG}: task_type is 'CAUSAL_LM'",
         _field("task_type", "CAUSAL_LM"),
         "only PEFT's classes that find the model by themselves ask for it; NeMo's exporter leaves "
         "it out", _PEFT, N),
    Rule("rank", OFFERED, "hf-peft", f"{PEFT_CONFIG}: r is a positive whole number",
         _positive("r", size), "write the rank there, the first size of each lora_A", _PEFT),
    Rule("alpha", OFFERED, "hf-peft", f"{PEFT_CONFIG}: lora_alpha is a positive number",
         _alpha,
         "write the alpha of the training there: without it nobody knows the scale", _PEFT),
    Rule("base", OFFERED, "hf-peft", f"{PEFT_CONFIG} names the base", _base,
         "name it: {again} --base ID", _PEFT, W),
    Rule("beside", (*SERVERS, "serve"), "hf-peft",
         "nothing was trained beside the adapter: bias is 'none', modules_to_save empty",
         _only_peft(lambda names: [name for name in names if name in _BESIDE]), _MERGE_PEFT, _VLLM),
    Rule("fields", (*SERVERS, "serve"), "hf-peft",
         f"{PEFT_CONFIG} has no field that only PEFT takes into account",
         _only_peft(lambda names: [name for name in names if name not in _BESIDE]),
         _MERGE_PEFT, _VLLM),
    Rule("fields", ("peft",), "hf-peft",
         f"{PEFT_CONFIG} has no field that only PEFT takes into account",
         _only_peft(lambda names: names), "PEFT does, servers do not", _PEFT, N),
    Rule("no-dora", (*SERVERS, "serve"), "hf-peft", f"{PEFT_CONFIG}: use_dora is False",
         _field("use_dora", False, None, 0, ""), "servers take no DoRA; merge it: {merged}", _VLLM),
    Rule("prefix", OFFERED, "hf-peft", f"keys begin with {PEFT_PREFIX}",
         lambda ask: _names(ask, lambda name: name.startswith(PEFT_PREFIX)),
         "PEFT leaves them out with a warning, and B stays zero: {again} --trust", _PEFT),
    Rule("keys", SERVERS, "hf-peft",
         "keys are base_model.model.model.layers.N.BLOCK.PROJ.lora_A|B.weight", _keys,
         "train without the other modules: servers take these only", _VLLM),
    Rule("keys", ("peft",), "hf-peft", "keys are base_model.model.MODULE.lora_A|B.weight",
         _keys, "look which module they are for: PEFT leaves them out", _PEFT),
    Rule("magnitudes", OFFERED, "hf-peft",
         "every module of a DoRA adapter has its lora_magnitude_vector", _magnitudes, "{trained}",
         _PEFT, when=lambda ask: bool(ask.config.get("use_dora"))),
    Rule("modules", OFFERED, "hf-peft",
         "every module has lora_A [r, in] and lora_B [out, r], and target_modules names it",
         _modules,
         "write target_modules, r and layers_to_transform as the tensors have them; where tensors "
         "are missing, {trained}", _PEFT),
    Rule("nulls", ("peft",), "hf-peft", f"{PEFT_CONFIG} has no null at which PEFT breaks", _nulls,
         'write {{}}, of bias "none", of lora_dropout 0; or take the line out', _PEFT),
    Rule("even", SERVERS, "hf-peft", "one {even} for all modules", _uneven,
         "fill up with zeros: {again}", _VLLM),
    # Both.
    Rule("max-rank", ALL, None, "the rank is at most {largest}", _rank,
         "raise {option} of the server, or train with a rank of {largest} or less", _VLLM,
         when=lambda ask: ask.largest is not None),
    Rule("converter-fields", OFFERED, "nemo",
         "the YAML has every field that NeMo's converter reads",
         _silent(lambda ask: _first(f"{name} is missing" for name in _CONVERTER
                                    if ask.config.get(name) is None)), "{again}", _CONVERTS),
    Rule("parallel", OFFERED, "nemo", "one tensor-parallel and one pipeline-parallel rank",
         _silent(_parallel),
         "write 1 for both into model_config.yaml if the weights are those of the whole model; "
         "else {trained}", _CONVERTS),
    Rule("baked-in", ("trtllm",), "nemo",
         "alpha / rank is multiplied into the weights: alpha equals adapter_dim", _baked_in,
         "this reader applies no scale: {again}", _TRTLLM),
    Rule("row-order", ("trtllm",), "nemo",
         "rows of q, k and v are stated, and one after the other (workshop.qkv_order: qkv)",
         _rows_in_line, "{again}", _TRTLLM),
    Rule("row-order", ("nemo",), "nemo", "rows of q, k and v are interleaved by group",
         lambda ask: "they are one after the other, for TensorRT-LLM" if _order(ask) == "qkv"
         else None, "{again}", _LOADS),
    Rule("as-nemo-wrote-it", ("nim1",), "nemo",
         "as NeMo writes it: rows interleaved by group, alpha not multiplied in",
         lambda ask: "it is in TensorRT-LLM's form, which NIM's pages list beside NeMo's without "
         "saying how one is told from the other" if _order(ask) == "qkv" else None,
         "give NIM the file that NeMo wrote, or a Hugging Face directory: {peft}", _TUTORIAL,
         Severity.NOT_KNOWN),
    Rule("head-size", ("nemo",), "nemo", "the head size is hidden_size / heads", _head_size,
         "use {peft}", _CONVERTS, N),
    Rule("storage", OFFERED, None, "every tensor has storage of its own",
         _silent(_stored),
         "whoever writes the file has to clone() first: {again}", _TRTLLM),
    Rule("dtype", OFFERED, None, "one floating-point dtype, as the base can have it", _dtype,
         "", _VLLM),
    Rule("finite", OFFERED, None, "every number is finite", _finite,
         "train again with a lower rate: these weights are lost", _TRTLLM, values=True),
    Rule("trained", OFFERED, None, "the adapter was trained: some B is not zero", _some_b,
         "this adapter answers like its base. Export a checkpoint after training, and look that no "
         "key was left out when it was loaded", _PEFT, values=True),
)  # fmt: skip
