"""Which row goes where: exact sizes, a seed, and no row whose input stands in two splits."""

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from workshop_utils.core.errors import DataError

NAMES = ("training", "validation", "test")


@dataclass(frozen=True)
class Division:
    """The rows (by position) of each split. ``repeated`` rows have an input that occurs more than
    once; ``dropped`` are in no split."""

    rows: dict[str, list[int]]
    repeated: int
    dropped: dict[str, int]


def key(text: str) -> str:
    """What two inputs have in common that differ only in case, white space or the form of their
    characters (Unicode NFKC)."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def sizes(rows: int, train_ratio: float, test_ratio: float) -> dict[str, int]:
    """Rows of each split: ``train_ratio`` of ``rows`` for training, and ``test_ratio`` of the rest
    for test; halves are rounded up. The others are for validation, so the sum is ``rows``.

    Raises :class:`DataError` when one would be empty, with the number of rows it takes.
    """

    def share(count: int, ratio: float) -> int:
        # As a decimal fraction: 0.9 of 10 rows is 9, where binary floating point may say 8.99...
        return int(count * Fraction(str(ratio)) + Fraction(1, 2))

    def counts(count: int) -> dict[str, int]:
        training = share(count, train_ratio)
        test = share(count - training, test_ratio)
        return dict(zip(NAMES, (training, count - training - test, test), strict=True))

    if all(counts(rows).values()):
        return counts(rows)
    more = range(rows + 1, max(1000, 10 * rows))
    enough = next((count for count in more if all(counts(count).values())), None)
    said = f"{enough} rows would do" if enough else "no number of rows near this one does"
    raise DataError(
        f"{rows} rows with train_split_ratio {train_ratio:g} and val_test_split_ratio "
        f"{test_ratio:g} make {', '.join(f'{n} {name}' for name, n in counts(rows).items())} "
        f"rows: none may be empty. With these ratios {said}; or change the ratios."
    )


def divide(keys: Sequence[str], train_ratio: float, test_ratio: float, seed: int) -> Division:
    """Divide rows at random, the same way for the same ``seed``. ``keys`` are their inputs'
    :func:`key`, one a row.

    Rows whose key occurs more than once all go to training: validation and test are drawn from the
    others, so the sizes stay exact, no row is lost, and nothing that is tested was trained on.

    Raises :class:`DataError` when a split would be empty or too few rows have an input of their
    own.
    """
    _, validation, test = sizes(len(keys), train_ratio, test_ratio).values()
    times, held_out = Counter(keys), validation + test
    single = [row for row, key in enumerate(keys) if times[key] == 1]
    repeated = len(keys) - len(single)
    if len(single) < held_out:
        raise DataError(
            f"validation and test need {held_out} of {len(keys)} rows, but only {len(single)} "
            "rows have an input that no other row has (case and white space aside): the rest "
            "would be tested on what was trained. Raise train_split_ratio, or put more of the "
            "row into input_template."
        )
    random.Random(seed).shuffle(single)
    taken = set(single[:held_out])
    training = [row for row in range(len(keys)) if row not in taken]
    random.Random(seed).shuffle(training)
    rows = (training, single[:validation], single[validation:held_out])
    return Division(dict(zip(NAMES, rows, strict=True)), repeated, {})


def keep(parts: Sequence[Sequence[str]]) -> Division:
    """The splits as the data set has them: ``parts`` are the keys of training, validation and test,
    positions count through all three.

    A validation row whose input is trained on, and a test row whose input is trained or validated
    on, is dropped and counted.

    Raises :class:`DataError` when nothing is left of a split.
    """
    rows, dropped, seen, start = {}, {}, set(), 0
    for name, keys in zip(NAMES, parts, strict=True):
        rows[name] = [row for row, key in enumerate(keys, start) if key not in seen]
        if not rows[name]:
            why = f": all its {len(keys)} inputs also stand in the splits before it" if keys else ""
            raise DataError(f"the split {name} is empty{why}.")
        dropped[name] = len(keys) - len(rows[name])
        seen.update(keys)
        start += len(keys)
    times = Counter(key for keys in parts for key in keys)
    return Division(rows, sum(count for count in times.values() if count > 1), dropped)
