"""The architecture fields of a ``context/model.yaml``, complete, for every family of
:mod:`.gpt_classes`."""

from collections.abc import Mapping
from typing import Any

from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.gpt_classes import (
    BASE,
    FAMILIES,
    FEATURES,
    MUST_BE_DEFAULT,
    ROPE_SCALING,
    Family,
)
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint


def family_of(model: Mapping[str, Any], where: str) -> Family:
    """The family of the model described by ``model`` (a ``context/model.yaml``; ``where`` names
    it); errors as :func:`read_fields`."""
    target = model.get("_target_")
    family = next((family for family in FAMILIES.values() if target in family.models), None)
    if family is None:
        raise _unknown_class(target, "_target_", where)
    return family


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
    fields = typed(config, family.configs[kind], f"{where}: config.")
    check(fields, family, f"{where}: config.", kind.rpartition(".")[2])
    return fields


def typed(stated: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The fields of ``defaults``, each as ``stated`` or else by default, and of its type;
    ``prefix`` begins each message."""
    return {
        name: _value(name, stated.get(name, default), prefix) for name, default in defaults.items()
    }


def check(fields: dict[str, Any], family: Family, prefix: str, kind: str) -> None:
    """Fill in the sizes that follow from others, and refuse fields that ``family`` cannot have;
    ``prefix`` begins each message."""
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if not fields[name]:
            raise DamagedCheckpoint(f"{prefix}{name} is missing, and {kind} has no default for it.")
    for name in MUST_BE_DEFAULT:
        # The experts' own FFN size may be said twice.
        if fields[name] not in (None, BASE[name]) and not (
            name == "moe_ffn_hidden_size" and fields[name] == fields["ffn_hidden_size"]
        ):
            raise UnsupportedCheckpoint(
                f"{prefix}{name} is {fields[name]!r}; no family that is supported here has that."
            )
    for name in FEATURES:
        if fields[name] and name not in family.features:
            raise UnsupportedCheckpoint(
                f"{prefix}{name} is {fields[name]!r}, which is not a plain {family.name} model."
            )
    _fill_in(fields, prefix)


def architecture(fields: Mapping[str, Any], vocabulary: int | None = None) -> Architecture:
    """The sizes in ``fields`` (of :func:`read_fields`); ``vocabulary`` is the number of rows of the
    embedding, where known."""
    scaled = all(name in fields for name in ROPE_SCALING)
    return Architecture(
        layers=fields["num_layers"],
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        groups=fields["num_query_groups"],
        head_dim=fields["kv_channels"],
        ffn=fields["ffn_hidden_size"],
        vocabulary=vocabulary or fields["vocab_size"],
        tied=fields["share_embeddings_and_output_weights"],
        rope_base=fields["rotary_base"],
        rope_scaling={name: fields[name] for name in ROPE_SCALING} if scaled else None,
    )


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


def _fill_in(fields: dict[str, Any], prefix: str) -> None:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    fields["ffn_hidden_size"] = fields["ffn_hidden_size"] or 4 * hidden
    fields["num_query_groups"] = fields["num_query_groups"] or heads
    if not fields["kv_channels"]:
        if hidden % heads:
            raise DamagedCheckpoint(
                f"{prefix}hidden_size {hidden} is no multiple of num_attention_heads {heads}."
            )
        fields["kv_channels"] = hidden // heads
    if heads % fields["num_query_groups"]:
        raise DamagedCheckpoint(
            f"{prefix}num_attention_heads {heads} is no multiple of num_query_groups "
            f"{fields['num_query_groups']}."
        )


_MAY_BE_ABSENT = {
    "ffn_hidden_size": int,
    "num_query_groups": int,
    "kv_channels": int,
    "vocab_size": int,
    "num_moe_experts": int,
    "seq_len_interpolation_factor": float,
    "window_size": list,
}


def _value(name: str, value: Any, prefix: str) -> Any:
    """``value`` as the type of its field; a class or function is reduced to its name
    (``torch.nn.functional.silu`` -> ``silu``)."""
    if name in MUST_BE_DEFAULT:
        return value
    if value is None and name in _MAY_BE_ABSENT:
        return None
    wanted = _MAY_BE_ABSENT.get(name, type((BASE | ROPE_SCALING)[name]))
    if name == "activation_func":
        value = str(value.get("_target_") if isinstance(value, Mapping) else value).rpartition(".")[
            2
        ]
    elif name in ("moe_aux_loss_coeff", "rotary_base") or wanted is float:
        wanted = float
        if isinstance(value, str):
            # PyYAML reads 1e-05, without a point, as text.
            value = _number(value)
    if not _is_sound(value, wanted):
        raise DamagedCheckpoint(f"{prefix}{name} is {value!r}, which is no {wanted.__name__}.")
    return int(value) if wanted is int else value


def _is_sound(value: Any, wanted: type) -> bool:
    if wanted is bool or wanted is str:
        return isinstance(value, wanted)
    if wanted is list:
        return (
            isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
        )
    sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
    return sound and (wanted is float or value == int(value))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
