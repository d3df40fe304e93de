"""Is each value of the composed configuration of the kind that the script expects? Asked before
anything computes with it."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

LEAST = {
    "devices": 1,
    "num_nodes": 1,
    "max_steps": 1,
    "log_every_n_steps": 1,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "seed": 0,
    "num_workers": 0,
    "memmap_workers": 1,
    "max_seq_length": 1,
    "min_seq_length": 1,
    "adapter_dim": 1,
    "virtual_tokens": 1,
    "bottleneck_dim": 1,
    "embedding_dim": 1,
    "save_top_k": -1,
    "patience": 1,
    "warmup_steps": 0,
    "constant_steps": 0,
    "tokens_to_generate": 1,
}
"""The smallest whole number that each key, by its last part, can take."""

ABOVE_ZERO = ("lr", "alpha", "init_std")
SHARES = ("adapter_dropout", "hidden_dropout", "attention_dropout", "ffn_dropout")
PART_OR_STEPS = {"val_check_interval": False, "limit_val_batches": True}
"""A whole number, or a part of the whole up to 1.0; whether it may be 0."""

LISTS = {
    "file_names": str,
    "names": str,
    "target_modules": str,
    "concat_sampling_probabilities": float,
    "layer_selection": int,
}
CHOICES = {
    "truncation_method": ("left", "right"),
    "mode": ("min", "max"),
    "variant": ("nemo", "canonical"),
}
NULL = (
    "gradient_clip_val",
    "max_epochs",
    "truncation_field",
    "warmup_steps",
    "file_names",
    "concat_sampling_probabilities",
)
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
    judged there."""
    for name, value in given.items():
        if str(written[name]).startswith("${"):
            continue
        default = defaults.get(name)
        if isinstance(default, dict) and not isinstance(value, dict):
            yield (
                f"{prefix}{name} is {value!r}; it has keys of its own, for example "
                f"{prefix}{name}.{next(iter(default))}."
            )
        elif isinstance(value, dict):
            yield from _wrong(
                value,
                written[name],
                default if isinstance(default, dict) else {},
                f"{prefix}{name}.",
            )
        elif name not in OWN_CHECK and (wanted := _wanted(name, value, default)):
            yield f"{prefix}{name} is {value!r}; it has to be {wanted}."


def _wanted(name: str, value: Any, default: Any) -> str | None:
    """What the value of a key ending in ``name`` has to be, if ``value`` is not that."""
    if value == "???" or (value is None and (default is None or name in NULL)):
        return None
    if name in CHOICES:
        return None if value in CHOICES[name] else " or ".join(CHOICES[name])
    if name in LISTS:
        kind = (int, float) if LISTS[name] is float else (LISTS[name],)
        right = isinstance(value, list) and all(type(item) in kind for item in value)
        return (
            None
            if right
            else (
                f"a list of {'texts' if LISTS[name] is str else 'numbers'}, as in "
                f"[{'a,b' if LISTS[name] is str else '1,2'}]"
            )
        )
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a text"
    return (
        _wanted_number(name, value, default)
        if name in LEAST or isinstance(default, (int, float))
        else None
    )


def _wanted_number(name: str, value: Any, default: Any) -> str | None:
    number = type(value) in (int, float) and math.isfinite(value)
    if name in PART_OR_STEPS:
        right = number and (
            0 < value <= 1
            or (value > 0 and type(value) is int)
            or (value == 0 and PART_OR_STEPS[name])
        )
        return None if right else "a whole number, or a part of the whole up to 1.0"
    if name in ABOVE_ZERO:
        return None if number and value > 0 else "a number above 0"
    if name in SHARES:
        return None if number and 0 <= value < 1 else "at least 0 and below 1"
    if name in LEAST:
        return (
            None
            if type(value) is int and value >= LEAST[name]
            else f"a whole number of at least {LEAST[name]}"
        )
    whole = isinstance(default, int)
    return None if number and (type(value) is int or not whole) else f"a {'whole ' * whole}number"
