"""Text on a terminal, which would obey what a stranger's checkpoint may hold."""

import shutil
import sys
import textwrap
from collections.abc import Sequence


def one_line(text: str) -> str:
    r"""``text`` with escapes for line ends, control characters and changes of the writing
    direction: ``\x1b``, ``\n``, ``\u202e``."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def lines(text: str) -> str:
    """As :func:`one_line`, for a text of several lines: their ends and tabs stay."""
    return "\n".join("\t".join(map(one_line, line.split("\t"))) for line in text.split("\n"))


def width() -> int:
    """Columns of the terminal, or as many as COLUMNS says; without either no line is too long."""
    return shutil.get_terminal_size(fallback=(sys.maxsize, 24)).columns


def folded(line: str, indent: int) -> str:
    """``line`` as wide as the terminal, all but the first line ``indent`` columns to the right."""
    if len(line) <= width():
        return line
    whole_words = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, width(), subsequent_indent=" " * indent, **whole_words)


def plain(text: str, longest: int) -> str:
    """``text`` for a message: shortened, and without what a terminal would obey."""
    shortened = text if len(text) <= longest else f"{text[:longest]}..."
    return shortened if shortened.isascii() and shortened.isprintable() else ascii(shortened)[1:-1]


def columns(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """``rows`` of cells as lines, the first ``left`` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if at < left else str.rjust for at in range(len(widths))]
    lines = [[side(*cell) for side, *cell in zip(sides, row, widths, strict=True)] for row in rows]
    return ["  ".join(line).rstrip() for line in lines]
