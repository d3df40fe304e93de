"""The architecture fields of a ``context/model.yaml``, complete, for every family of
:mod:`.gpt_classes`."""

import contextlib
from collections.abc import Mapping
from typing import Any

from workshop_utils.checkpoints.formats.gpt_classes import (
    BASE,
    FAMILIES,
    FEATURES,
    FOREIGN,
    MUST_BE_DEFAULT,
    ROPE_SCALING,
    Family,
)
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint


def family_of(model: Mapping[str, Any], where: str) -> Family:
    """The family of the model described by ``model`` (a ``context/model.yaml``; ``where`` names
    it); errors as :func:`read_fields`."""
    target = model.get("_target_")
    for family in FAMILIES.values():
        if target in family.models:
            return family
    raise _unknown_class(target, "_target_", where)


def read_fields(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every field of :mod:`.gpt_classes` for the model described by ``model`` (a
    ``context/model.yaml``; ``where`` names it).

    Sizes that follow from others are filled in. The rope scaling fields are there only for Llama
    3.1 and later. Raises :class:`UnsupportedCheckpoint` (another family, or a feature that its
    family does not have), :class:`UnsafeCheckpoint` (a class that is not NeMo's) and
    :class:`DamagedCheckpoint` (a field that is missing or makes no sense); each names the field.
    """
    family = family_of(model, where)
    config = model.get("config")
    if not isinstance(config, Mapping):
        raise DamagedCheckpoint(f"{where}: the field config is missing.")
    kind = config.get("_target_")
    if not isinstance(kind, str | None):
        raise DamagedCheckpoint(f"{where}: config._target_ is {kind!r}, which is no name.")
    if kind not in family.configs:
        if any(kind in other.configs for other in FAMILIES.values()):
            raise UnsupportedCheckpoint(
                f"{where}: config._target_ is {kind!r}, which is no configuration of "
                f"{model['_target_']!r}."
            )
        raise _unknown_class(kind, "config._target_", where)
    check_foreign(config, f"{where}: config.")
    fields = typed(config, family.configs[kind], f"{where}: config.")
    check(fields, family, f"{where}: config.", kind.rpartition(".")[2])
    return fields


def check_foreign(stated: Mapping[str, Any], prefix: str) -> None:
    """Refuse what is ``stated`` and would be lost; ``prefix`` begins the message."""
    for name, default in FOREIGN.items():
        if stated.get(name) not in (None, default):
            raise UnsupportedCheckpoint(
                f"{prefix}{name} is {stated[name]!r}; no family that is supported here has that."
            )


def typed(stated: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Each as ``stated`` or by default, of its type; ``prefix`` begins each message."""
    return {name: _value(name, stated.get(name, value), prefix) for name, value in defaults.items()}


def check(fields: dict[str, Any], family: Family, prefix: str, kind: str) -> None:
    """Fill in the sizes that follow from others, and refuse fields that ``family`` cannot have;
    ``prefix`` begins each message."""
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if not fields[name]:
            raise DamagedCheckpoint(f"{prefix}{name} is missing, and {kind} has no default for it.")
    for name in MUST_BE_DEFAULT:
        # The experts' own FFN size may be said twice.
        twice = name == "moe_ffn_hidden_size" and fields[name] == fields["ffn_hidden_size"]
        if fields[name] not in (None, BASE[name]) and not twice:
            raise UnsupportedCheckpoint(
                f"{prefix}{name} is {fields[name]!r}; no family that is supported here has that."
            )
    for name in FEATURES:
        if fields[name] and name not in family.features:
            raise UnsupportedCheckpoint(
                f"{prefix}{name} is {fields[name]!r}, which is not a plain {family.name} model."
            )
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    fields["ffn_hidden_size"] = fields["ffn_hidden_size"] or 4 * hidden
    groups = fields["num_query_groups"] = fields["num_query_groups"] or heads
    whole = [("num_attention_heads", heads, "num_query_groups", groups)]
    if not fields["kv_channels"]:
        whole.insert(0, ("hidden_size", hidden, "num_attention_heads", heads))
        fields["kv_channels"] = hidden // heads
    for name, value, part, divisor in whole:
        if value % divisor:
            raise DamagedCheckpoint(f"{prefix}{name} {value} is no multiple of {part} {divisor}.")


def _unknown_class(target: Any, field: str, where: str) -> Exception:
    if isinstance(target, str) and not target.startswith("nemo.collections."):
        return UnsafeCheckpoint(
            f"{where}: {field} names {target!r}, which is not a class of NeMo's; loading it "
            "would import and call it. Nothing was executed."
        )
    return UnsupportedCheckpoint(
        f"{where}: {field} is {target!r}; the families that are supported are "
        f"{', '.join(FAMILIES)}."
    )


_MAY_BE_ABSENT = {
    **dict.fromkeys(("ffn_hidden_size", "num_query_groups", "kv_channels", "vocab_size"), int),
    "num_moe_experts": int,
    "seq_len_interpolation_factor": float,
    "window_size": list,
}


def _value(name: str, value: Any, prefix: str) -> Any:
    """``value`` as the type of its field; a class or function is reduced to its name
    (``torch.nn.functional.silu`` -> ``silu``)."""
    if name in MUST_BE_DEFAULT or (value is None and name in _MAY_BE_ABSENT):
        return value
    expected = _MAY_BE_ABSENT.get(name, type((BASE | ROPE_SCALING)[name]))
    if name == "activation_func":
        target = value.get("_target_") if isinstance(value, Mapping) else value
        value = str(target).rpartition(".")[2]
    elif name in ("moe_aux_loss_coeff", "rotary_base") or expected is float:
        expected = float
        if isinstance(value, str):  # PyYAML reads 1e-05, without a point, as text.
            with contextlib.suppress(ValueError):
                value = float(value)
    if not _is_sound(value, expected):
        raise DamagedCheckpoint(f"{prefix}{name} is {value!r}, which is no {expected.__name__}.")
    return int(value) if expected is int else value


def _is_sound(value: Any, expected: type) -> bool:
    if expected in (bool, str):
        return isinstance(value, expected)
    if expected is list:
        return isinstance(value, list) and [type(side) for side in value] == [int, int]
    sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
    return sound and (expected is float or value == int(value))
