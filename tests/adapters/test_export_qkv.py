"""The two row orders of a fused query/key/value matrix."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workshop_utils.checkpoints.formats.qkv import Heads, join, reorder, split


@st.composite
def heads_and_columns(draw):
    groups = draw(st.integers(1, 6))
    return Heads(groups * draw(st.integers(1, 5)), groups, draw(st.integers(1, 8))), draw(
        st.integers(1, 4)
    )


def numbered(heads: Heads, columns: int) -> torch.Tensor:
    return torch.arange(heads.rows * columns, dtype=torch.float32).reshape(heads.rows, columns)


@given(heads_and_columns())
def test_there_and_back_is_the_identity(drawn):
    heads, columns = drawn
    rows = numbered(heads, columns)
    for order, other in (("interleaved", "qkv"), ("qkv", "interleaved")):
        assert torch.equal(reorder(reorder(rows, heads, order, other), heads, other, order), rows)
        assert torch.equal(join(*split(rows, heads, order), heads, order), rows)


@given(heads_and_columns())
def test_every_head_lands_where_megatron_has_it(drawn):
    heads, columns = drawn
    rows = numbered(heads, columns)
    query, key, value = split(rows, heads, "interleaved")
    size, channels = heads.attention // heads.groups, heads.channels
    row = 0
    for group in range(heads.groups):
        members = [(query, group * size + member) for member in range(size)]
        for matrix, head in [*members, (key, group), (value, group)]:
            start = head * channels
            assert torch.equal(matrix[start : start + channels], rows[row : row + channels])
            row += channels
    assert row == heads.rows


def test_a_known_case():
    # Two groups of two heads, one channel: q0 q1 k0 v0 | q2 q3 k1 v1.
    rows = torch.arange(8).reshape(8, 1)
    found = reorder(rows, Heads(4, 2, 1), "interleaved", "qkv").flatten().tolist()
    assert found == [0, 1, 4, 5, 2, 6, 3, 7]
