"""Is each value of the composed configuration of the kind that the script expects? Asked before
anything computes with it."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

# fmt: off
LEAST = {
    "devices": 1, "num_nodes": 1, "max_steps": 1, "log_every_n_steps": 1,
    "micro_batch_size": 1, "global_batch_size": 1, "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1, "context_parallel_size": 1, "seed": 0, "num_workers": 0,
    "memmap_workers": 1, "max_seq_length": 1, "min_seq_length": 1, "adapter_dim": 1,
    "virtual_tokens": 1, "bottleneck_dim": 1, "embedding_dim": 1, "save_top_k": -1, "patience": 1,
    "warmup_steps": 0, "constant_steps": 0, "tokens_to_generate": 1,
}
"""The smallest whole number that each key, by its last part, can take."""

LISTS = {
    "file_names": str, "names": str, "target_modules": str, "layer_selection": int,
    "concat_sampling_probabilities": float,
}
# fmt: on
ABOVE_ZERO = ("lr", "alpha", "init_std")
SHARES = ("adapter_dropout", "hidden_dropout", "attention_dropout", "ffn_dropout")
PART_OR_STEPS = {"val_check_interval": False, "limit_val_batches": True}
"""A whole number, or a part of the whole up to 1.0; whether it may be 0."""

CHOICES = {
    "truncation_method": ("left", "right"),
    "mode": ("min", "max"),
    "variant": ("nemo", "canonical"),
}
NULL = ("gradient_clip_val", "max_epochs", "truncation_field", "warmup_steps", "file_names")
NULL += ("concat_sampling_probabilities",)
OWN_CHECK = ("precision", "peft_scheme")


def wrong_values(config: "DictConfig", defaults: "DictConfig") -> Iterator[str]:
    """A sentence for each value of ``config`` that is of another kind than in ``defaults``, or that
    no run can have."""
    from omegaconf import OmegaConf

    return _wrong(
        OmegaConf.to_container(config, resolve=True),
        OmegaConf.to_container(config),
        OmegaConf.to_container(defaults, resolve=True),
    )


def _wrong(
    given: dict[str, Any], written: dict[str, Any], defaults: dict[str, Any], prefix: str = ""
) -> Iterator[str]:
    """``written`` is ``given`` with its interpolations: a value that is taken from another key is
    looked at there."""
    for name, value in given.items():
        key, default = f"{prefix}{name}", defaults.get(name)
        if str(written[name]).startswith("${"):
            continue
        if isinstance(value, dict):
            below = default if isinstance(default, dict) else {}
            yield from _wrong(value, written[name], below, f"{key}.")
        elif isinstance(default, dict):
            example = next(iter(default))
            yield f"{key} is {value!r}; it has keys of its own, for example {key}.{example}."
        elif name not in OWN_CHECK:
            expected, is_right = _rule(name, value, default)
            if not is_right:
                yield f"{key} is {value!r}; it has to be {expected}."


def _rule(name: str, value: Any, default: Any) -> tuple[str, bool]:
    """What the value of a key ending in ``name`` has to be, and whether ``value`` is that."""
    number = type(value) in (int, float) and math.isfinite(value)
    whole = type(value) is int
    if value == "???" or (value is None and (default is None or name in NULL)):
        return "", True
    if name in CHOICES:
        return " or ".join(CHOICES[name]), value in CHOICES[name]
    if name in LISTS:
        kinds = (int, float) if LISTS[name] is float else (LISTS[name],)
        what = "texts, as in [a,b]" if LISTS[name] is str else "numbers, as in [1,2]"
        is_right = isinstance(value, list) and all(type(item) in kinds for item in value)
        return f"a list of {what}", is_right
    if isinstance(default, bool):
        return "true or false", isinstance(value, bool)
    if isinstance(default, str):
        return "a text", isinstance(value, str)
    if name not in LEAST and not isinstance(default, (int, float)):
        return "", True
    if name in PART_OR_STEPS:
        is_right = (
            number and value >= 0 and (whole or value <= 1) and (value or PART_OR_STEPS[name])
        )
        return "a whole number, or a part of the whole up to 1.0", bool(is_right)
    if name in ABOVE_ZERO:
        return "a number above 0", number and value > 0
    if name in SHARES:
        return "at least 0 and below 1", number and 0 <= value < 1
    if name in LEAST:
        return f"a whole number of at least {LEAST[name]}", whole and value >= LEAST[name]
    if isinstance(default, int):
        return "a whole number", whole
    return "a number", number
