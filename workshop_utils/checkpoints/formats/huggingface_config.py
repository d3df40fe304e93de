"""``config.json`` and ``tokenizer_config.json`` of transformers 4 and 5: one spelling, the defaults
of what is left out, and which fields NeMo's importers do not take over.

:func:`replaced` gives the files in the spelling of the installed transformers (4.51), which would
pass over ``rope_parameters`` and compute with a base of 10,000; :func:`readable` a directory with
them, for everything that is loaded by transformers.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.findings import Code, Finding, Severity
from workshop_utils.checkpoints.formats.gpt_classes import FAMILIES
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.tensor import DTYPES
from workshop_utils.core import chat_template, terminal
from workshop_utils.core.errors import (
    CheckpointError,
    DamagedCheckpoint,
    UnsupportedCheckpoint,
    WorkshopError,
)
from workshop_utils.core.paths import shown

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
GENERATION = "generation_config.json"

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # num_attention_heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_NO_BIAS = {name: value for name, value in _LLAMA.items() if not name.endswith("_bias")}
_MISTRAL = _NO_BIAS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN = _NO_BIAS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL
    | {
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
    "nemotron": {name: value for name, value in _LLAMA.items() if name != "rms_norm_eps"}
    | {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 48,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
}
"""``model_type`` -> the fields that a result depends on, with what transformers' class takes where
``config.json`` has none. A test compares them with the installed classes."""

CHANGES_NOTHING = {
    # What it is, and where it comes from
    *("model_type", "architectures", "transformers_version", "torch_dtype", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "_commit_hash"),
    *("is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed"),
    # Training, speed, and how an answer is made
    *("use_cache", "attention_dropout", "hidden_dropout", "initializer_range", "pretraining_tp"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
    *("top_k", "top_p", "repetition_penalty", "length_penalty", "return_dict", "id2label"),
    *("label2id", "num_return_sequences", "diversity_penalty", "num_beam_groups", "typical_p"),
    # Looked at by themselves
    *("auto_map", "quantization_config", "layer_types"),
}
"""Fields of ``config.json`` that no result depends on, or that are looked at by themselves."""

_DTYPE_NAMES = {"float": "float32", "half": "float16", "double": "float64"}
_SAME = {"silu": ("silu", "swish")}


def _said(value: Any) -> str:
    return terminal.plain(json.dumps(value), 80)


def spelled(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The ``config.json`` ``where`` as transformers 4 writes it. Raises :class:`DamagedCheckpoint`
    for a field of another type or said twice, :class:`UnsupportedCheckpoint` for RoPE that differs
    from layer to layer."""
    config = dict(config)
    dtype = config.pop("dtype", None) or config.get("torch_dtype")
    if dtype not in (None, "auto"):
        name = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
        if name not in (*DTYPES, *_DTYPE_NAMES) and not str(name).startswith("float8_"):
            raise DamagedCheckpoint(
                f"{where}: dtype (torch_dtype) is {_said(dtype)}, and no name of one."
            )
        config["torch_dtype"] = _DTYPE_NAMES.get(name, name)
    elif dtype:
        config["torch_dtype"] = None
    _one_rope(config, where)
    defaults = DEFAULTS.get(str(config.get("model_type")), {})
    for name, default in defaults.items():
        value = config.get(name, default)
        if not _is_like(name, value, default):
            kind = "true or false" if isinstance(default, bool) else "number of that kind"
            kind = {str: "name", dict: "mapping"}.get(type(_LIKE.get(name, default)), kind)
            raise DamagedCheckpoint(
                f"{where}: {name} is {_said(value)}, which is no {kind}. Get the file again."
            )
    return config


_LIKE = {"rope_scaling": {}, "sliding_window": 1, "head_dim": 1, "num_key_value_heads": 1}
_MAY_BE_NULL = {*_LIKE}


def _is_like(name: str, value: Any, default: Any) -> bool:
    like = _LIKE.get(name, default)
    if value is None:
        return default is None or name in _MAY_BE_NULL
    if isinstance(like, bool | str | dict):
        return isinstance(value, type(like))
    if isinstance(like, float):
        return type(value) in (int, float) and 0 <= value < 1e300
    return type(value) is int and 0 < value < 2**53


def _one_rope(config: dict[str, Any], where: str) -> None:
    """``rope_parameters`` (transformers 5), or what of it stands in ``rope_scaling``, as
    ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), Mapping | None):
            held = _said(config[name])
            raise DamagedCheckpoint(f"{where}: {name} is {held}, which is no mapping.")
    stated = config.pop("rope_parameters", None)
    name = "rope_parameters" if stated else "rope_scaling"
    rope = dict(stated or config.get("rope_scaling") or {})
    if rope and all(isinstance(each, Mapping | None) for each in rope.values()):
        layers = config.get("layer_types")
        layers = layers if isinstance(layers, list) else []
        used = {kind for kind in rope if kind in layers} or {*rope}
        each = [dict(rope[kind] or {}) for kind in sorted(used)]
        if any(other != each[0] for other in each):
            raise UnsupportedCheckpoint(
                f"{where}: {name} differs between {' and '.join(sorted(used))} layers. The "
                "installed transformers (4.51) has one for all layers and would pass it over; use "
                "transformers 5."
            )
        rope = each[0] if each else {}
    if not rope:
        return
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None and stated:
        kind = "default"
    if not isinstance(kind, str):
        raise DamagedCheckpoint(f"{where}: {name}.rope_type is {_said(kind)}, and no name.")
    for field in ("rope_theta", "partial_rotary_factor"):
        value = rope.pop(field, None)
        if value is None:
            continue
        if config.get(field) not in (None, value):
            raise DamagedCheckpoint(
                f"{where}: {field} is {_said(config[field])}, and in {name} "
                f"{_said(value)}. Only one can be right: take the other out."
            )
        if type(value) not in (int, float):
            raise DamagedCheckpoint(f"{where}: {name}.{field} is {_said(value)}, no number.")
        config[field] = value
    rope.pop("type", None)
    scaling = None if kind == "default" else {"rope_type": kind} | rope
    if stated and config.get("rope_scaling") and dict(config["rope_scaling"]) != scaling:
        raise DamagedCheckpoint(
            f"{where}: rope_scaling and rope_parameters differ. Only one can be right: take the "
            "other out."
        )
    config["rope_scaling"] = scaling


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with what transformers takes for the fields that it leaves out."""
    stated = {name: value for name, value in config.items() if value is not None}
    return DEFAULTS.get(str(config.get("model_type")), {}) | dict(config) | stated


def for_nemo(
    config: Mapping[str, Any], where: str, rope_field: str = "rope_scaling"
) -> list[Finding]:
    """What of ``config`` (:func:`spelled`; it had its RoPE in ``rope_field``) NeMo's importer would
    pass over: refused where a result depends on it, not known where nobody can tell."""
    kind = str(config.get("model_type"))
    if (method := quantised(config)) is not None:
        why = (
            f"{where}: quantization_config says {method}: its weights are quantised, which NeMo's "
            "importer does not take. Give the model that it was made from."
        )
        return [Finding(Code.UNSUPPORTED, Severity.REFUSED, why, file=where)]
    if kind not in FAMILIES:
        return []
    family, full, found = FAMILIES[kind], with_defaults(config), []

    def refuse(name: str, value: Any, expected: Any) -> None:
        message = (
            f"{where}: {name} is {_said(value)}. NeMo's {family.importer[1]} takes "
            f"{_said(expected)} for granted: the converted model would compute something else."
        )
        source = family.importer[0].replace(".", "/") + ".py"
        found.append(
            Finding(Code.UNSUPPORTED, Severity.REFUSED, message, file=where, source=source)
        )

    fixed = {"hidden_act": family.activation} | dict(family.fixed)
    if kind != "nemotron":
        fixed["partial_rotary_factor"] = 1.0
    for name, expected in fixed.items():
        value = full.get(name)
        if value is not None and value not in _SAME.get(expected, (expected,)):
            refuse(rope_field if name == "rope_scaling" else name, value, expected)
    rope = section(full, "rope_scaling").get("rope_type", "default")
    if "rope_scaling" not in fixed and rope not in ("default", "llama3"):
        refuse(f"{rope_field}.rope_type", rope, "default")
    layers = config.get("layer_types")
    if layers and (not isinstance(layers, list) or set(map(str, layers)) != {"full_attention"}):
        refuse("layer_types", layers[:8] if isinstance(layers, list) else layers, "full_attention")
    known = {*DEFAULTS.get(kind, config), *CHANGES_NOTHING, *fixed, "rope_scaling"}
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}):
            message = (
                f"{where}: {name} is {_said(value)}. It is no field of "
                f"transformers' {family.title}Config, and nothing here reads it; whether a program "
                "computes something else by it is not known."
            )
            found.append(Finding(Code.ARCHITECTURE, Severity.NOT_KNOWN, message, file=where))
    return found


def findings(directory: Path, dtype: str | None = None) -> list[Finding]:
    """:func:`for_nemo` of the model in ``directory``, whose weights are ``dtype`` where that is
    known; a file that cannot be read is one too."""
    file = directory / CONFIG
    try:
        config = read_json(file)
        rope = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        found = for_nemo(spelled(config, shown(file)), shown(file), rope)
    except CheckpointError as error:
        return [Finding.of(error)]
    kind = (dtype or "float32").partition(",")[0]
    if kind not in ("float64", "float32", "float16", "bfloat16") and not any(
        finding.severity is Severity.REFUSED for finding in found
    ):
        why = (
            f"{shown(directory)}: its weights are quantised ({kind}), which NeMo's importer does "
            "not take. Give the model that it was made from."
        )
        found.append(Finding(Code.UNSUPPORTED, Severity.REFUSED, why, file=shown(directory)))
    return found


def quantised(config: Mapping[str, Any]) -> str | None:
    """How the weights are quantised, or None."""
    stated = config.get("quantization_config")
    if not stated:
        return None
    method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
    bits = stated.get("bits") if isinstance(stated, Mapping) else None
    bits = 4 if isinstance(stated, Mapping) and stated.get("load_in_4bit") is True else bits
    return f"{method}{f' with {bits} bits' if bits else ''}"


_READ_AS_FAST = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")


def replaced(directory: Path) -> dict[str, dict[str, Any]]:
    """The files of a model's or tokenizer's ``directory`` that the installed transformers would
    read otherwise than meant, as they are to be: name -> content."""
    files: dict[str, dict[str, Any]] = {}
    if (directory / CONFIG).is_file():
        config = read_json(directory / CONFIG)
        files[CONFIG] = spelled(config, shown(directory / CONFIG))
        _check_rotated(files[CONFIG], shown(directory / CONFIG))
        if files[CONFIG] == config and _is_plain(directory / CONFIG):
            del files[CONFIG]
    for file in filter(Path.is_file, (directory / CONFIG, directory / GENERATION)):
        _check_tokens(read_json(file), shown(file))
    return files | replaced_tokenizer(directory)


def replaced_tokenizer(directory: Path) -> dict[str, dict[str, Any]]:
    """Of :func:`replaced` the file of the tokenizer."""
    if not (directory / TOKENIZER).is_file():
        return {}
    config = read_json(directory / TOKENIZER)
    tokenizer = _tokenizer(config, directory)
    same = tokenizer == config and _is_plain(directory / TOKENIZER)
    return {} if same else {TOKENIZER: tokenizer}


def _check_tokens(config: Mapping[str, Any], where: str) -> None:
    """What transformers fails at while it generates: ids that are none, a version that is none."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(it) is int and abs(it) < 2**31 for it in ids):
            raise DamagedCheckpoint(
                f"{where}: {name} is {_said(value)}; it has to be a token's number"
                f"{', or a list of them' if name == 'eos_token_id' else ''}. Get the file again."
            )
    version = config.get("transformers_version", "4")
    if not (isinstance(version, str) and re.match(r"\d+(\.\w+)*$", version)):
        raise DamagedCheckpoint(
            f"{where}: transformers_version is {_said(version)}, no version. Take the line out."
        )


def _check_rotated(config: Mapping[str, Any], where: str) -> None:
    kind, part = str(config.get("model_type")), config.get("partial_rotary_factor")
    defaults = DEFAULTS.get(kind)
    if defaults and "partial_rotary_factor" not in defaults and part not in (None, 1):
        raise UnsupportedCheckpoint(
            f"{where}: partial_rotary_factor is {_said(part)}, and the installed transformers "
            f"(4.51) rotates the whole head of a {kind}. Use transformers 5."
        )


def _is_plain(file: Path) -> bool:
    """Whether transformers can read it: UTF-8 without a mark in front."""
    return file.read_bytes()[:1] == b"{" or file.read_bytes().lstrip()[:1] == b"{"


def _tokenizer(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    config, where = dict(config), shown(directory / TOKENIZER)
    fast = (directory / "tokenizer.json").is_file()
    if config.get("tokenizer_class") in _READ_AS_FAST and fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if type(most := config.get("model_max_length")) not in (int, float, type(None)):
        raise DamagedCheckpoint(
            f"{where}: model_max_length is {_said(most)}; it has to be a number of tokens."
        )
    named = config.pop("model_specific_special_tokens", None)
    if isinstance(extra := config.get("extra_special_tokens"), list):
        more = config.get("additional_special_tokens") or []
        if not isinstance(more, list):
            raise DamagedCheckpoint(f"{where}: additional_special_tokens is no list.")
        config["additional_special_tokens"] = more + [token for token in extra if token not in more]
        config["extra_special_tokens"] = {}
    if isinstance(named, dict):
        config["extra_special_tokens"] = named
    if (directory / "additional_chat_templates").is_dir():
        found = chat_template.templates(directory, config)
        if isinstance(found, dict):
            both = [{"name": name, "template": text} for name, text in found.items()]
            config["chat_template"] = both
    return config


@contextlib.contextmanager
def readable(directory: Path, more: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """``directory`` for the installed transformers: itself, or links to its files with those of
    :func:`replaced`, and ``more``, beside them."""
    directory = Path(directory)
    files = replaced(directory) | dict(more or {})
    if not files:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="workshop-readable-") as folder:
        place = Path(folder) / directory.resolve().name
        place.mkdir()
        for file in directory.resolve().iterdir():
            hides = file.name == "chat_template.jinja" and TOKENIZER in files
            if file.name not in files and not (hides and _named(files[TOKENIZER])):
                (place / file.name).symlink_to(file)
        for name, content in files.items():
            (place / name).write_text(json.dumps(content), encoding="utf-8")
        yield place


def _named(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("chat_template"), list)


def load_tokenizer(directory: Path, place: Path | None = None, **options: Any) -> Any:
    """transformers' tokenizer of ``directory`` (whose :func:`readable` ``place`` may be at hand).
    Raises :class:`DamagedCheckpoint`, naming the file, where transformers cannot read it."""
    directory = Path(directory)
    if (file := directory / "tokenizer.json").is_file():
        # transformers fails at a broken one without naming it.
        chat_template.read_tokenizer(file)
    if (directory / TOKENIZER).is_file():
        chat_template.templates(directory, read_json(directory / TOKENIZER))
    with contextlib.ExitStack() as stack:
        place = place or stack.enter_context(readable(directory))
        from transformers import AutoTokenizer

        try:
            # Without trust_remote_code said, transformers asks the user when the model brings code.
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
        except Exception as error:
            raise DamagedCheckpoint(_no_tokenizer(directory, error)) from None
    tokenizer.name_or_path = str(directory)
    return tokenizer


def _no_tokenizer(directory: Path, error: Exception) -> str:
    said = terminal.plain(str(error).partition("\n")[0], 200) or type(error).__name__
    stated, fast = directory / TOKENIZER, (directory / "tokenizer.json").is_file()
    if not fast and not stated.is_file():
        return f"{shown(directory)} has no tokenizer: put tokenizer.json and {TOKENIZER} there."
    kind = read_json(stated).get("tokenizer_class") if stated.is_file() else None
    fix = "copy tokenizer.json, which is missing, from where the model came from"
    if fast:
        fix = 'tokenizer_class "PreTrainedTokenizerFast" reads a tokenizer.json that is whole'
    return (
        f"{shown(stated)}: the installed transformers cannot make the tokenizer (tokenizer_class "
        f"{_said(kind)}): {said} Remedy: {fix}."
    )


@contextlib.contextmanager
def loading(directory: Path) -> Iterator[None]:
    """DamagedCheckpoint, which names ``directory``, for what a library fails with while it reads a
    model there."""
    try:
        yield
    except (WorkshopError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        said = terminal.plain(str(error).partition("\n")[0], 300) or type(error).__name__
        file = directory / CONFIG
        method = quantised(read_json(file)) if file.is_file() else None
        why = f"its weights are quantised ({method}): " if method else ""
        raise DamagedCheckpoint(
            f"{shown(directory)} cannot be loaded by the installed libraries: {why}"
            f"{said.rstrip('.')}. See {CONFIG} there, and: workshop verify {shown(directory)}"
        ) from error
