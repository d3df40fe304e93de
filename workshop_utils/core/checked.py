"""Dataclasses that pydantic checks: types as annotated and not converted, limits as the metadata of
a field has them (``field(metadata={"limits": {"ge": 1}})``). Pydantic is imported at the first
check: its import takes longer than all of ``workshop --help``."""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from workshop_utils.core.errors import WorkshopError

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "none",
    tuple: "a list of names",
    dict: "a mapping",
    Callable: "a function",
}


def check(instance: Any, error: type[WorkshopError] = WorkshopError) -> None:
    """Check each field of ``instance``, a dataclass, and set it to what pydantic makes of it: a
    whole number where a float is wanted becomes one, a list a tuple. For ``__post_init__``.

    Raises:
        WorkshopError: of the class ``error``, with field, value and what the field takes.
    """
    from pydantic import ValidationError

    try:
        checked = _model(type(instance))(**vars(instance))
    except ValidationError as failed:
        name = str(failed.errors(include_url=False)[0]["loc"][0])
        field = type(instance).__dataclass_fields__[name]
        bounds = " and ".join(
            f"{_BOUNDS[limit]} {value:g}"
            for limit, value in field.metadata.get("limits", {}).items()
            if limit in _BOUNDS
        )
        raise error(
            f"{name} is {getattr(instance, name)!r}; it must be "
            f"{takes(hints(type(instance))[name])}{bounds and f', {bounds}'}."
        ) from None
    for name in type(instance).__dataclass_fields__:
        object.__setattr__(instance, name, getattr(checked, name))


@functools.cache
def hints(kind: type) -> Mapping[str, Any]:
    """The types of the fields of the dataclass ``kind``."""
    return typing.get_type_hints(kind)


def alternatives(hint: Any) -> tuple:
    """The members of a union, or the type alone."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def takes(hint: Any) -> str:
    """A type in words: "a whole number", "a text or none", "one of lora, dora, full_ft"."""
    words = []
    for kind in alternatives(hint):
        origin = typing.get_origin(kind) or kind
        words.append(
            f"one of {', '.join(typing.get_args(kind))}" if origin is Literal else _WORDS[origin]
        )
    return " or ".join(words)


@functools.cache
def _model(kind: type) -> type:
    from pydantic import ConfigDict, Field, create_model

    fields = {}
    for field in dataclasses.fields(kind):
        hint, limits = hints(kind)[field.name], field.metadata.get("limits", {})
        if hint in (str, str | None):
            limits = {"pattern": r"\S"} | limits
        fields[field.name] = (hint, Field(**limits))
    return create_model(
        kind.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields
    )
