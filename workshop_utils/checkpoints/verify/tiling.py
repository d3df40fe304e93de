"""Do the chunks of a tensor cover it exactly once?"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from workshop_utils.checkpoints.formats.tensor import Tensor

Box = tuple[tuple[int, int], ...]
"""A part of a tensor: ``(start, stop)`` on each axis."""

_PRIME = 2**61 - 1
_MOST_SLICES = 1000


class Fault(NamedTuple):
    """A part of a tensor that is not in exactly one chunk: ``chunks`` is how many hold it, None for
    a chunk that sticks out."""

    part: Box
    chunks: int | None

    def __str__(self) -> str:
        sizes = (str(a) if b == a + 1 else f"{a}:{b}" for a, b in self.part)
        index = f"[{', '.join(sizes)}]"
        if self.chunks is None:
            return f"a chunk covers {index}, outside the shape"
        return f"{index} is in {self.chunks} chunks" if self.chunks else f"no chunk covers {index}"


def faults(tensor: Tensor) -> list[Fault]:
    """Where the chunks of ``tensor`` leave a gap, overlap or stick out; empty when they cover it
    exactly.

    Slices along the first axis (the layers of a stacked tensor) are told apart: each that is faulty
    gives one fault.
    """
    whole = tuple((0, size) for size in tensor.shape)
    boxes = [
        tuple((at, at + size) for at, size in zip(chunk.offsets, chunk.shape, strict=True))
        for chunk in tensor.chunks
    ]
    ends = ((box, zip(box, tensor.shape, strict=True)) for box in boxes)
    outside = [Fault(box, None) for box, sides in ends if any(b > size for (_, b), size in sides)]
    if outside:
        return outside
    weights = _Weights()
    faults = []
    for part in _bad_parts(weights, boxes, whole, 0, _MOST_SLICES if len(whole) > 1 else 1):
        inside = _clipped(boxes, part)
        for axis in range(1, len(whole)):
            part = _bad_parts(weights, inside, part, axis, 1)[0]
            inside = _clipped(inside, part)
        faults.append(Fault(part, len(inside)))
    return faults


class _Weights:
    """A random weight for each coordinate of each axis, which makes "covered exactly once" one
    equation.

    Give every element the product of its coordinates' weights. The sum over all chunks equals the
    sum over the whole tensor if each element is covered once; if not, their difference is a
    polynomial of the weights that is not zero, and random weights modulo a prime p hide that with a
    probability of at most axes/p, below 1e-16 (Schwartz-Zippel lemma). The cost is one
    multiplication a chunk and axis, whatever the number of overlaps; comparing chunks in pairs
    would be quadratic.
    """

    def __init__(self) -> None:
        self._random = random.SystemRandom()
        self._sums: dict[tuple[int, int], int] = {}

    def covered_once(self, boxes: Sequence[Box], whole: Box) -> bool:
        """Whether ``boxes``, all inside ``whole``, cover it without a gap or an overlap."""
        return (sum(map(self._of, boxes)) - self._of(whole)) % _PRIME == 0

    def _of(self, box: Box) -> int:
        """The sum over the elements of ``box``: on each axis the weights below ``stop`` less those
        below ``start``."""
        sums, draw = self._sums, self._random.randrange
        product = 1
        for axis, (start, stop) in enumerate(box):
            # Sums of random weights are as random as the weights: only those at the coordinates in
            # use are drawn.
            below = sums.get((axis, start)) or sums.setdefault((axis, start), draw(1, _PRIME))
            upto = sums.get((axis, stop)) or sums.setdefault((axis, stop), draw(1, _PRIME))
            product = product * (upto - below) % _PRIME
        return product


def _bad_parts(
    weights: _Weights, boxes: Sequence[Box], part: Box, axis: int, most: int
) -> list[Box]:
    """The narrowest slices of ``part`` along ``axis`` that are not covered once, by halving; no
    more than ``most``."""
    if weights.covered_once(boxes, part):
        return []
    if not part:
        return [part]
    start, stop = part[axis]
    cuts = sorted({start, stop} | {cut for box in boxes for cut in box[axis] if start < cut < stop})
    if len(cuts) == 2:
        return [part]
    middle = cuts[len(cuts) // 2]
    bad: list[Box] = []
    for half in ((start, middle), (middle, stop)):
        piece = (*part[:axis], half, *part[axis + 1 :])
        if len(bad) < most:
            bad += _bad_parts(weights, _clipped(boxes, piece), piece, axis, most - len(bad))
    return bad


def _clipped(boxes: Sequence[Box], part: Box) -> list[Box]:
    """What of each box lies in ``part``."""
    clipped = []
    for box in boxes:
        cut = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, part, strict=True))
        if all(start < stop for start, stop in cut):
            clipped.append(cut)
    return clipped
