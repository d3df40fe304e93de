"""``config.json`` and ``tokenizer_config.json`` of a Hugging Face model: the spellings of
transformers 4 and 5, and the fields that NeMo's importers would leave out of account.

transformers 5 writes ``rope_parameters`` (theta and scaling in one, or one for each kind of layer),
``dtype``, the tokenizer class ``TokenizersBackend`` and lists of ``extra_special_tokens``; the
installed version 4 passes over the first two without a word, and fails at the others. Source:
huggingface/transformers v5: MIGRATION_GUIDE_V5.md, modeling_rope_utils.py (2026-11-27).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.gpt_classes import Family
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.core import paths
from workshop_utils.core.errors import NotACheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"

#: Fields of the configuration classes of our families in transformers; a test compares.
OF_MODELS = frozenset({
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim",
    "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "norm_eps", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "output_router_logits", "pad_token_id", "partial_rotary_factor", "pretraining_tp",
    "rms_norm_eps", "rope_scaling", "rope_theta", "router_aux_loss_coef", "router_jitter_noise",
    "sliding_window", "tie_word_embeddings", "use_cache", "use_sliding_window", "vocab_size",
})  # fmt: skip
#: Beside them, those of every model (text generation, labels, outputs), and of other versions.
OF_ALL = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
    "auto_map", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder",
    "is_encoder_decoder", "label2id", "layer_types", "length_penalty", "max_length", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type",
    "pruned_heads", "quantization_config", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "rope_parameters", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16",
})  # fmt: skip


def read(directory: Path) -> dict[str, Any]:
    """``config.json`` in the spelling of transformers 4. Errors as :func:`.safe_text.read_json`."""
    return in_spelling_4(read_json(directory / CONFIG))


def in_spelling_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``rope_theta``, ``rope_scaling`` and ``torch_dtype``. Parameters that differ
    from one kind of layer to the other stay where they are: version 4 has no words for them."""
    config = dict(config)
    if config.get("torch_dtype") is None and config.get("dtype") is not None:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and rope and all(isinstance(v, Mapping) for v in rope.values()):
        first, *others = rope.values()
        rope = first if all(other == first for other in others) else None
    if isinstance(rope, Mapping):
        rope = dict(rope)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                config[name] = rope.pop(name)
        plain = rope.get("rope_type", "default") == "default"
        config["rope_scaling"] = None if plain else rope
        del config["rope_parameters"]
    return config


def _tokenizer_in_spelling_4(config: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        more = config.pop("extra_special_tokens")
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *more]
    return config


@contextmanager
def readable(directory: Path) -> Iterator[Path]:
    """``directory``, or, where a file of it is in transformers 5's spelling, a temporary one with
    links to its files and these files in that of the installed version."""
    changed = {}
    for name, spelling in ((CONFIG, in_spelling_4), (TOKENIZER, _tokenizer_in_spelling_4)):
        if (directory / name).is_file():
            written = read_json(directory / name)
            if (read := spelling(written)) != written:
                changed[name] = read
    if not changed:
        yield directory
        return
    with paths.temporary_directory("workshop-model-") as folder:
        for file in directory.iterdir():
            if file.name not in changed:
                (folder / file.name).symlink_to(file.resolve())
        for name, content in changed.items():
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        yield folder


def load_tokenizer(directory: Path, **options: Any) -> Any:
    """transformers' tokenizer of ``directory``, in whatever spelling. Raises
    :class:`NotACheckpoint` where transformers cannot read it."""
    from transformers import AutoTokenizer

    with readable(Path(directory)) as folder:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        # Whatever its files hold comes out as another kind of error.
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise NotACheckpoint(
                f"{shown(Path(directory) / TOKENIZER)}: the installed transformers cannot read "
                f"this tokenizer: {said[0][:200]} Get it again from where the model comes from."
            ) from error


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields that no model of our families looks at in the installed transformers."""
    return sorted(
        name
        for name, value in config.items()
        if name not in OF_MODELS | OF_ALL and value not in (None, False)
    )


def require_importable(config: Mapping[str, Any], family: Family, file: Path) -> None:
    """Raise :class:`UnsupportedCheckpoint` where ``config`` (see :func:`in_spelling_4`) of ``file``
    has a field that changes what is computed and that NeMo's importer leaves out of account."""
    importer, wrong = family.importer[1], "the converted model would compute something else."
    if method := section(config, "quantization_config").get("quant_method"):
        raise UnsupportedCheckpoint(
            f"{shown(file)}: quantization_config is of {method}: its weights are quantised, which "
            f"NeMo's {importer} does not take. Give the model that it was made from."
        )
    if "rope_parameters" in config:
        raise UnsupportedCheckpoint(
            f"{shown(file)}: rope_parameters differ from one kind of layer to the other, or are no "
            f"mapping; NeMo's {importer} knows one rope for all layers."
        )
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UnsupportedCheckpoint(
            f"{shown(file)}: layer_types has more than full_attention, which NeMo's {importer} "
            f"takes for granted: {wrong}"
        )
    taken = {"hidden_act": family.activation} | dict(family.fixed)
    if family.name != "nemotron":
        taken["partial_rotary_factor"] = 1.0
    for name, value in taken.items():
        if config.get(name) not in (None, value):
            raise UnsupportedCheckpoint(
                f"{shown(file)}: {name} is {json.dumps(config[name])}. NeMo's {importer} takes "
                f"{json.dumps(value)} for granted: {wrong}"
            )
    scaling = section(config, "rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedCheckpoint(
            f"{shown(file)}: rope_scaling.rope_type is {kind!r}; NeMo's importer knows only "
            f"'llama3' and would ignore it: {wrong}"
        )
