"""How well two colours can be told apart, by https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""

TEXT, LINES = 4.5, 3.0
"""Least ratios of text (1.4.3, AA) and of lines and shapes (1.4.11)."""


def contrast(one: str, other: str) -> float:
    """The ratio of two colours, each ``#rrggbb`` or ``rgb(r, g, b)``: from 1 (the same) to 21
    (black and white)."""
    dark, light = sorted(_luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = (
        bytes.fromhex(colour[1:])
        if colour.startswith("#")
        else map(int, colour.removeprefix("rgb(").rstrip(")").split(","))
    )
    red, green, blue = (
        part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
