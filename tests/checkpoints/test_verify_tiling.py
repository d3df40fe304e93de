"""Do chunks cover a tensor exactly once? Against a count of every element."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from workshop_utils.checkpoints.formats.tensor import Chunk, Tensor
from workshop_utils.checkpoints.verify import tiling


def tensor(shape, boxes):
    chunks = tuple(Chunk(tuple(offsets), tuple(sizes), "f", 0, 0) for offsets, sizes in boxes)
    return Tensor("t", tuple(shape), "float32", chunks)


def faults(shape, boxes) -> list[str]:
    return [str(fault) for fault in tiling.faults(tensor(shape, boxes))]


def counts(whole: Tensor) -> dict[tuple[int, ...], int]:
    """Element -> number of chunks that hold it, by writing all of them down."""
    cells = dict.fromkeys(itertools.product(*map(range, whole.shape)), 0)
    for chunk in whole.chunks:
        sides = zip(chunk.offsets, chunk.shape, strict=True)
        for cell in itertools.product(*(range(start, start + size) for start, size in sides)):
            cells[cell] += 1
    return cells


@st.composite
def tilings(draw):
    """A tensor cut in halves at random places, then perhaps with a chunk less, twice, or moved."""
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    boxes = [([0] * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[axis]))
        for start, size in ((0, cut), (cut, sizes[axis] - cut)):
            if size:
                at = [*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :]]
                boxes.append((at, [*sizes[:axis], size, *sizes[axis + 1 :]]))
    for change in draw(st.lists(st.sampled_from(["drop", "double", "move", "swap"]), max_size=3)):
        if not boxes:
            break
        at = draw(st.integers(0, len(boxes) - 1))
        if change == "drop":
            boxes.pop(at)
        elif change == "double":
            boxes.append(boxes[at])
        else:
            sizes = boxes[at][1]
            free = [range(length - size + 1) for length, size in zip(shape, sizes, strict=True)]
            boxes[at] = ([draw(st.sampled_from(places)) for places in free], sizes)
    return tensor(shape, boxes)


@settings(max_examples=400)
@given(tilings())
def test_against_a_count_of_every_element(whole):
    """Whether there is a fault, and that its place is a faulty one."""
    cells = counts(whole)
    assert (tiling.faults(whole) == []) == all(count == 1 for count in cells.values())
    for fault in tiling.faults(whole):
        inside = {cells[cell] for cell in itertools.product(*(range(*part) for part in fault.part))}
        assert inside == {fault.chunks} != {1}


def test_the_layers_that_are_damaged_are_named():
    boxes = [
        ((layer, 0, column), (1, 6, 4))
        for layer in range(40)
        for column in (0, 4)
        if (layer, column) != (17, 4)
    ]
    boxes[5] = boxes[4]
    named = faults((40, 6, 8), boxes)
    assert {"[2, 0:6, 0:4] is in 2 chunks", "no chunk covers [17, 0:6, 4:8]"} <= set(named)
    assert set(named[1:-1]) <= {"no chunk covers [2, 0:6, 4:8]"}


def test_a_chunk_that_sticks_out():
    assert faults((4, 4), [((0, 0), (4, 4)), ((3, 3), (2, 1))]) == [
        "a chunk covers [3:5, 3], outside the shape"
    ]


def test_the_sizes_that_cancel_out():
    """A gap and an overlap of the same size: the number of elements alone would not tell."""
    boxes = [((0, 0), (1, 4)), ((0, 0), (1, 4))]
    assert sum(math.prod(sizes) for _, sizes in boxes) == 2 * 4
    assert faults((2, 4), boxes) == ["[0, 0:4] is in 2 chunks", "no chunk covers [1, 0:4]"]


def test_scalars_and_empty_tensors():
    for shape, boxes in (((), [((), ())]), ((0, 3), []), ((0, 3), [((0, 0), (0, 3))])):
        assert faults(shape, boxes) == []
    assert faults((), []) == ["no chunk covers []"]
