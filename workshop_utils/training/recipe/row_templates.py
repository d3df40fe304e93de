r"""Templates such as ``"Question: {question}\n"``: what they name, and a row put into them.

A name in braces is a column, ``{answers[text][0]}`` a value inside one; ``{{`` and ``}}`` are
braces. A template from a command line or a YAML file holds its new lines as ``\n``: the escapes
below are read wherever the template comes from, any other is an error.
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workshop_utils.core.errors import DataError
from workshop_utils.core.nearest import did_you_mean, nearest

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.|$)", re.DOTALL)
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


def unescape(text: str, where: str) -> str:
    r"""``text`` with ``\n``, ``\t``, ``\r``, ``\\``, ``\"``, ``\'``, ``\xNN`` and ``\uNNNN``
    replaced by what they stand for.

    Raises :class:`DataError` for any other escape; ``where`` begins the message.
    """

    def replaced(escape: re.Match) -> str:
        code = escape[1]
        if len(code) > 1:
            return chr(int(code[1:], 16))
        if code not in ESCAPES:
            known = " ".join(f"\\{name}" for name in ESCAPES)
            raise DataError(
                f"{where}: \\{code} at character {escape.start() + 1} is no escape. Known are "
                f"{known} \\xNN \\uNNNN; a backslash is written \\\\."
            )
        return ESCAPES[code]

    try:
        # Two \uNNNN may be the halves of one character, as in JSON.
        return _ESCAPE.sub(replaced, text).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise DataError(
            f"{where}: {text!r} holds half of a character (a \\uD800 to \\uDFFF without its "
            "other half)."
        ) from None


@dataclass(frozen=True)
class RowTemplate:
    """A parsed template: ``pieces`` are ``(text, field or None, keys inside the field)``; ``where``
    begins messages about it."""

    where: str
    pieces: tuple[tuple[str, str | None, tuple[str, ...]], ...]

    @property
    def fields(self) -> list[str]:
        """The names in braces, without what stands in brackets."""
        return [field for _, field, _ in self.pieces if field is not None]

    def require_columns(self, mapping: Mapping[str, str], present: list[str]) -> None:
        """Raise :class:`DataError` unless each field, or the column that ``mapping`` gives it, is
        among the columns ``present``; all of them and the nearest stand in the message."""
        for field in self.fields:
            column = mapping.get(field, field)
            if column not in present:
                mapped = f" (from field_mapping, for {{{field}}})" if field in mapping else ""
                hint = did_you_mean(nearest(column, present, cutoff=0.5))
                raise DataError(
                    f"{self.where}: the data set has no column {column!r}{mapped}.{hint} Its "
                    f"columns are: {', '.join(present)}. field_mapping gives a field another "
                    "column."
                )

    def render(self, row: Mapping[str, Any], mapping: Mapping[str, str]) -> str | None:
        """The template with the values of ``row``; None when one of them is null. Raises
        :class:`DataError` for one that is no text or number."""
        texts = []
        for text, field, keys in self.pieces:
            value = "" if field is None else self._value(row, mapping.get(field, field), keys)
            if value is None:
                return None
            texts += [text, value]
        return "".join(texts)

    def _value(self, row: Mapping[str, Any], column: str, keys: tuple[str, ...]) -> str | None:
        value, path = row[column], column
        for key in keys:
            if value is None:
                return None
            try:
                value = value[int(key) if isinstance(value, list) else key]
            except (KeyError, ValueError, IndexError, TypeError):
                raise DataError(
                    f"{self.where}: {path} has no [{key}]; it is {_short(value)}."
                ) from None
            path += f"[{key}]"
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int | float):
            return str(value)
        key = next(iter(value), "key") if isinstance(value, dict) else 0
        raise DataError(
            f"{self.where}: {path} is no text but {_short(value)}. Take a value out of it, as in "
            f"{{{path}[{key}]}}, or give a custom_converter."
        )


def parse(template: str, where: str) -> RowTemplate:
    """``template`` taken apart, escapes read. Raises :class:`DataError` for bad braces, and for
    formats (``{name:>5}``) and attributes."""
    try:
        parsed = list(string.Formatter().parse(unescape(template, where)))
    except ValueError as error:
        raise DataError(
            f"{where}: {template!r} has unbalanced braces ({error}). A brace that is text is "
            "written {{ or }}."
        ) from None
    pieces = []
    for text, field, form, conversion in parsed:
        if field is None:
            pieces.append((text, None, ()))
            continue
        name = _FIELD.fullmatch(field)
        if not name or form or conversion:
            written = (
                field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            )
            raise DataError(
                f"{where}: {{{written}}} is no column. Write {{column}} or {{column[key]}}; a "
                "brace that is text is written {{ or }}."
            )
        pieces.append((text, name[1], tuple(re.findall(r"\[([^\[\]]+)\]", name[2]))))
    if not any(field for _, field, _ in pieces):
        raise DataError(
            f"{where}: {template!r} names no column in braces: every row would be the same."
        )
    return RowTemplate(where, tuple(pieces))


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
