"""What a mistyped name was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to ``most`` names, best first; ``cutoff`` 0 takes anything, 1 only the same."""
    return difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)


def did_you_mean(names: Iterable[str]) -> str:
    """ " Did you mean A or B?" for the ``names`` that were found, and nothing for none."""
    meant = " or ".join(names)
    return f" Did you mean {meant}?" if meant else ""
