"""Will NeMo take this data file, and what will it make of it? Counted as NeMo's ``GPTSFTDataset``
does, without torch.

Source of the rules: ``nemo/collections/nlp/data/language_modeling/megatron/gpt_sft_dataset.py``
(NeMo 2.4.1). The prompt template is cut at its ``{fields}``, each piece is tokenised by itself, and
what is too long is taken from the truncation fields first.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workshop_utils.core import data_files, paths
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError

WHOLE = 10_000
"""Files of up to so many rows are read whole."""

SAMPLE = 2_000
"""Of a larger file so many lines, drawn at random, are read as rows and stand for it."""


@dataclass(frozen=True)
class Template:
    """How a row becomes tokens: the settings of ``model.data.train_ds`` that decide it. ``extra``
    counts bos, sep and eos; ``cut_from`` is ``truncation_method``: the side from which tokens go.
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

    @cached_property
    def parts(self) -> list[tuple[str, str]]:
        """The template cut as NeMo cuts it: for each piece the spaces before it and its field, or
        its text and nothing."""
        text = self.text.encode().decode("unicode_escape")
        pieces = [part for part in re.split(r"( *?{.+?})", text) if part]
        cut = [re.fullmatch(r"( *){(.+)} *", part) for part in pieces]
        return [
            (field[1], field[2]) if field else (part, "")
            for part, field in zip(pieces, cut, strict=True)
        ]

    def pieces(self, row: dict[str, str]) -> Iterator[str]:
        for text, field in self.parts:
            yield text + row[field].strip(" ") if field else text

    def cuts_the_answer(self, sizes: list[int], over: int) -> bool:
        """Whether a row that is ``over`` tokens too long loses tokens of its answer, the last of
        the pieces with these ``sizes``.

        Every truncation field gives up an equal share; what a short one cannot give is taken from
        the end (or the beginning).
        """
        if over <= 0:
            return False
        # NeMo renames "context", its old default, to the first field.
        given_away = [self.fields[0] if n == "context" else n for n in self.truncation_fields]
        names = [name for _, name in self.parts]
        pieces = zip(names, sizes, strict=True)
        fields = [(name, size) for name, size in pieces if name in given_away]
        left = over
        for number, (name, size) in enumerate(fields):
            share = over // len(fields) + (number < over % len(fields))
            if name == self.label and share:
                return True
            left -= min(share, size)
        return left > 0 if self.cut_from == "right" else left > sum(sizes[:-1])


@dataclass(frozen=True)
class Counted:
    """``rows`` of the file, and of the ``sampled`` ones: tokens (mean, longest), how many are too
    long, how many lose answer tokens. Without a tokenizer the tokens are 0."""

    path: Path
    rows: int
    sampled: int
    mean_tokens: float = 0
    longest: int = 0
    truncated: int = 0
    answers_cut: int = 0
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        tokens = "tokens are not counted"
        if self.longest:
            tokens = f"{self.mean_tokens:.0f} tokens a row, longest {self.longest:,}"
        of = f" (of a sample of {self.sampled:,}; the other rows are not read)"
        of *= self.sampled < self.rows
        rest = f"; columns that the template does not use: {', '.join(self.unused)}"
        rest *= bool(self.unused)
        return f"{paths.shown(self.path)}: {self.rows:,} rows; {tokens}{of}{rest}"


def check_template(template: Template) -> Iterator[str]:
    """A sentence for each reason why NeMo would refuse or spoil ``template``."""
    where, fields = "model.data.train_ds.prompt_template", template.fields
    if not fields:
        yield (
            f"{where} is {template.text!r}: it names no column. Write for instance '{{input}} "
            "{output}'."
        )
    elif not template.text.endswith(f"{{{template.label}}}"):
        yield (
            f"{where} has to end with {{{template.label}}}, the answer (label_key); it is "
            f"{template.text!r}. What follows the answer would never be learnt."
        )
    for field in template.truncation_fields if fields else ():
        if field not in fields and not (field == "context" and fields[0] == "input"):
            yield (
                f"model.data.train_ds.truncation_field names {field!r}; the template has "
                f"{', '.join(fields)}."
            )
    if not template.text.isascii():
        # NeMo decodes the template with unicode_escape, which takes every byte of UTF-8 for a
        # character.
        yield (
            f"{where} holds characters outside ASCII, which NeMo garbles. Put them into the "
            "rows, or write \\u escapes."
        )


def count(
    path: Path, template: Template, tokenizer: ChatTokenizer | None, lines: list[str] | None = None
) -> Counted:
    """What NeMo would see in the ``lines`` of ``path`` (read where they are not given); of more
    than ``WHOLE`` rows, a sample. Raises DataError, with file, line and field, for a row without
    the texts that the template needs."""
    path = Path(path)
    lines = read_lines(path) if lines is None else lines
    rows = _rows(path, lines, template)
    used = template.fields
    unused = tuple(dict.fromkeys(name for row in rows for name in row if name not in used))
    if tokenizer is None:
        return Counted(path, len(lines), len(rows), unused=unused)
    lengths, cut = measured(rows, template, tokenizer)
    return Counted(
        path,
        len(lines),
        len(rows),
        sum(lengths) / len(lengths),
        max(lengths),
        sum(length > template.max_seq_length for length in lengths),
        sum(cut),
        unused,
    )


def measured(
    rows: list[dict], template: Template, tokenizer: ChatTokenizer
) -> tuple[list[int], list[bool]]:
    """For each row its tokens, and whether its answer loses some of them."""
    counts = iter(tokenizer.count([text for row in rows for text in template.pieces(row)]))
    sizes = [[next(counts) for _ in template.parts] for _ in rows]
    lengths = [sum(row) + template.extra for row in sizes]
    over = [length - template.max_seq_length for length in lengths]
    return lengths, list(map(template.cuts_the_answer, sizes, over))


def common_rows(first: Path, second: Path, template: Template, lines: dict[str, list[str]]) -> int:
    """Rows of ``second`` that stand in ``first`` as well, answer included; ``lines`` are those of
    both. Where one of them has more than ``WHOLE`` rows, lines are compared as they are written.
    """

    def keys(path: Path) -> list:
        if max(len(lines[str(first)]), len(lines[str(second)])) > WHOLE:
            return lines[str(path)]
        rows = _rows(path, lines[str(path)], template)
        return [tuple(row[field] for field in template.fields) for row in rows]

    seen = set(keys(first))
    return sum(key in seen for key in keys(second))


def read_lines(path: Path) -> list[str]:
    """The lines of ``path``, one row each. Raises :class:`DataError` where there are none."""
    lines = data_files.lines(path)
    while lines and not lines[-1]:
        lines.pop()  # as NeMo does; in between it fails on an empty line
    if not lines:
        raise DataError(f"{paths.shown(path)} holds no rows: write one JSON object a line.")
    return lines


def _rows(path: Path, lines: list[str], template: Template) -> list[dict]:
    """The rows of all ``lines``, or of a sample."""
    chosen = range(len(lines))
    if len(lines) > WHOLE:
        chosen = sorted(random.Random(0).sample(chosen, SAMPLE))
    where = paths.shown(path)
    return [_row(lines[n], template, f"{where}, line {n + 1}") for n in chosen]


def _row(line: str, template: Template, where: str) -> dict:
    row = data_files.json_object(line, where)
    for field in template.fields:
        if not isinstance(row.get(field), str):
            raise DataError(
                f"{where}: the template needs a text in {field!r}; the row has "
                f"{', '.join(sorted(row)) or 'nothing'}. Set prompt_template and label_key."
            )
    return row
