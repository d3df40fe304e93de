"""Text from files on a terminal: names and values of a stranger's checkpoint may hold what a terminal would obey."""


def one_line(text: str) -> str:
    r"""``text`` with escapes for line ends, control characters and changes of the writing direction: ``\x1b``, ``\n``, ``\u202e``."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii") for character in text
    )


def lines(text: str) -> str:
    """As :func:`one_line`, for a text of several lines: their ends and tabs stay."""
    return "\n".join("\t".join(map(one_line, line.split("\t"))) for line in text.split("\n"))
