"""What a mistyped name was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to ``most`` of the names ``known``, best first, that are as like ``word`` as ``cutoff``
    says: 0 anything, 1 the same."""
    return difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)


def did_you_mean(names: Iterable[str]) -> str:
    """ " Did you mean A or B?" for the ``names`` that were found, and nothing for none."""
    found = " or ".join(names)
    return f" Did you mean {found}?" if found else ""
