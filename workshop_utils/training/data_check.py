"""Will NeMo take this data file, and what will it make of it? Counted as NeMo's ``GPTSFTDataset``
does, without torch.

Source of the rules: ``nemo/collections/nlp/data/language_modeling/megatron/gpt_sft_dataset.py``
(NeMo 2.4.1). The prompt template is cut at its ``{fields}``, each piece is tokenised by itself, and
what is too long is taken from the truncation fields first.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core import chat_data, paths
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError

WHOLE = 10_000
"""Files of up to so many rows are read whole."""

SAMPLE = 2_000
"""Of a larger file so many lines, drawn at random, are read as rows and stand for it."""


@dataclass(frozen=True)
class Template:
    """How a row becomes tokens: the settings of ``model.data.train_ds`` that decide it. ``extra``
    counts bos, sep and eos.

    ``cut_from`` is ``truncation_method``: the side from which tokens go.
    """

    text: str
    label: str
    truncation_fields: tuple[str, ...]
    max_seq_length: int
    extra: int
    cut_from: str = "right"

    @property
    def fields(self) -> list[str]:
        """The columns that a row needs, in the template's order."""
        return re.findall(r"{(.*?)}", self.text)


@dataclass(frozen=True)
class Counted:
    """``rows`` of the file, and of the ``sampled`` ones: tokens (mean, longest), how many are too
    long, how many lose answer tokens.

    Without a tokenizer the tokens are 0.
    """

    path: Path
    rows: int
    sampled: int
    mean_tokens: float
    longest: int
    truncated: int
    answers_cut: int

    def __str__(self) -> str:
        of = (
            f" (of a sample of {self.sampled:,}; the other rows are not read)"
            if self.sampled < self.rows
            else ""
        )
        tokens = (
            f"{self.mean_tokens:.0f} tokens a row, longest {self.longest:,}"
            if self.longest
            else "tokens are not counted"
        )
        return f"{paths.shown(self.path)}: {self.rows:,} rows; {tokens}{of}"


def check_template(template: Template) -> Iterator[str]:
    """A sentence for each reason why NeMo would refuse or spoil ``template``."""
    where = "model.data.train_ds.prompt_template"
    if not template.fields:
        yield (
            f"{where} is {template.text!r}: it names no column. Write for instance '{{input}} "
            "{output}'."
        )
    elif not template.text.endswith(f"{{{template.label}}}"):
        yield (
            f"{where} has to end with {{{template.label}}}, the answer (label_key); it is "
            f"{template.text!r}. What follows the answer would never be learnt."
        )
    for field in template.truncation_fields:
        # NeMo renames "context", its old default, to the first field.
        if (
            template.fields
            and field not in template.fields
            and not (field == "context" and template.fields[0] == "input")
        ):
            yield (
                f"model.data.train_ds.truncation_field names {field!r}; the template has "
                f"{', '.join(template.fields)}."
            )
    if not template.text.isascii():
        # NeMo decodes the template with unicode_escape, which takes every byte of UTF-8 for a
        # character.
        yield (
            f"{where} holds characters outside ASCII, which NeMo garbles. Put them into the "
            "rows, or write \\u escapes."
        )


def count(path: Path, template: Template, tokenizer: ChatTokenizer | None) -> Counted:
    """Read ``path`` and count what NeMo would see; of a file of more than ``WHOLE`` rows, a sample.

    Raises:
        DataError: a row is no JSON object, lacks a column of the template, or has one that is no
            text; file, line and field named.
    """
    path = Path(path)
    total, rows = _rows(path, template)
    if tokenizer is None:
        return Counted(path, total, len(rows), 0, 0, 0, 0)
    lengths, answers = [], []
    pieces = [text for row in rows for text in _pieces(row, template)]
    counts = iter(tokenizer.count(pieces))
    for row in rows:
        found = [next(counts) for _ in _pieces(row, template)]
        lengths.append(sum(found) + template.extra)
        answers.append(_answer_is_cut(found, lengths[-1] - template.max_seq_length, template))
    longer = sum(length > template.max_seq_length for length in lengths)
    return Counted(
        path, total, len(rows), sum(lengths) / len(lengths), max(lengths), longer, sum(answers)
    )


def _answer_is_cut(sizes: list[int], over: int, template: Template) -> bool:
    """Whether a row that is ``over`` tokens too long loses tokens of its answer, the last of the
    pieces with these ``sizes``.

    Every truncation field gives up an equal share; what a short one cannot give is taken from the
    end (or the beginning).
    """
    if over <= 0:
        return False
    fields = [
        (name, size)
        for name, size in zip(_names(template), sizes, strict=True)
        if name in _given_away(template)
    ]
    left = over
    for number, (name, size) in enumerate(fields):
        share = over // len(fields) + (number < over % len(fields))
        if name == template.label and share:
            return True
        left -= min(share, size)
    return left > 0 if template.cut_from == "right" else left > sum(sizes[:-1])


def common_rows(first: Path, second: Path, template: Template) -> int:
    """Rows of ``second`` that stand in ``first`` as well, answer included. Where one of them has
    more than ``WHOLE`` rows, their lines are compared as they are written.
    """
    one, other = _lines(first), _lines(second)
    if max(len(one), len(other)) > WHOLE:
        seen = set(one)
        return sum(line in seen for line in other)
    seen = {_key(row, template) for row in _rows(first, template)[1]}
    return sum(_key(row, template) in seen for row in _rows(second, template)[1])


def _key(row: dict, template: Template) -> tuple[str, ...]:
    return tuple(row[field] for field in template.fields)


def _lines(path: Path) -> list[str]:
    lines = chat_data.lines(path)
    while lines and not lines[-1]:
        lines.pop()  # as NeMo does; in between it fails on an empty line
    if not lines:
        raise DataError(f"{paths.shown(path)} holds no rows: write one JSON object a line.")
    return lines


def _rows(path: Path, template: Template) -> tuple[int, list[dict]]:
    """How many rows ``path`` has; all of them, or a sample."""
    lines = _lines(path)
    chosen = (
        range(len(lines))
        if len(lines) <= WHOLE
        else sorted(random.Random(0).sample(range(len(lines)), SAMPLE))
    )
    return len(lines), [
        _row(lines[number], template, f"{paths.shown(path)}, line {number + 1}")
        for number in chosen
    ]


def _row(line: str, template: Template, where: str) -> dict:
    row = chat_data.json_object(line, where)
    for field in template.fields:
        if not isinstance(row.get(field), str):
            has = ", ".join(sorted(row)) or "nothing"
            raise DataError(
                f"{where}: the template needs a text in {field!r}; the row has {has}. Set "
                "prompt_template and label_key."
            )
    return row


def _parts(template: Template) -> list[str]:
    """The template cut as NeMo cuts it: fields with the spaces before them, and the text
    between."""
    text = template.text.encode().decode("unicode_escape")
    return [part for part in re.split(r"( *?{.+?})", text) if part]


def _names(template: Template) -> list[str]:
    """The field of each part, "" for text."""
    return [
        part.strip(" ")[1:-1] if part.lstrip(" ").startswith("{") else ""
        for part in _parts(template)
    ]


def _given_away(template: Template) -> Sequence[str]:
    return [
        template.fields[0] if field == "context" else field for field in template.truncation_fields
    ]


def _pieces(row: dict, template: Template) -> Iterator[str]:
    for part, name in zip(_parts(template), _names(template), strict=True):
        yield " " * (len(part) - len(part.lstrip(" "))) + row[name].strip(" ") if name else part
