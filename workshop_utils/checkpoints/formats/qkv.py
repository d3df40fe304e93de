"""The two row orders of a fused query/key/value matrix, and the way between them.

Symbols: ``nh`` attention heads, ``ng`` query groups (key/value heads), ``hd`` channels a head,
``r`` any number of columns. Both orders have ``(nh + 2 * ng) * hd`` rows.

``interleaved``
    Megatron-Core and NeMo, group by group: ``[q .. q, k, v]`` with ``nh / ng`` query heads in a
    group. Source: ``MCoreSelfAttentionMixin.get_query_key_value_tensors`` (nemo-toolkit 2.4.1),
    which views the output as ``[ng, (nh / ng + 2) * hd]`` and splits the last axis.
``qkv``
    TensorRT-LLM's ``attn_qkv``: all query heads, then all key heads, then all value heads. Query
    head ``h`` belongs to group ``h // (nh / ng)``, as in Hugging Face's ``repeat_kv``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Order = Literal["interleaved", "qkv"]
ORDERS: tuple[Order, ...] = ("interleaved", "qkv")


class Heads(NamedTuple):
    """The numbers that fix the row order: attention heads, query groups, channels a head."""

    attention: int
    groups: int
    channels: int

    @property
    def rows(self) -> int:
        return (self.attention + 2 * self.groups) * self.channels


def split(rows: Tensor, heads: Heads, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    """Cut ``rows`` ``[(nh+2*ng)*hd, r]`` into query ``[nh*hd, r]``, key ``[ng*hd, r]`` and value
    ``[ng*hd, r]``."""
    nh, ng, hd = heads
    if order == "qkv":
        return rows.split([nh * hd, ng * hd, ng * hd])
    groups = rows.reshape(ng, nh // ng + 2, hd, -1)
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return tuple(part.reshape(-1, rows.shape[1]) for part in parts)


def join(query: Tensor, key: Tensor, value: Tensor, heads: Heads, order: Order) -> Tensor:
    """The inverse of :func:`split`: ``[nh*hd, r]``, ``[ng*hd, r]``, ``[ng*hd, r]`` to
    ``[(nh+2*ng)*hd, r]``."""
    import torch

    if order == "qkv":
        return torch.cat([query, key, value])
    groups = [part.reshape(heads.groups, -1, query.shape[1]) for part in (query, key, value)]
    return torch.cat(groups, dim=1).reshape(heads.rows, -1)


def reorder(rows: Tensor, heads: Heads, have: Order, want: Order) -> Tensor:
    """``rows`` ``[(nh+2*ng)*hd, r]`` moved from the order ``have`` to the order ``want``."""
    return rows if have == want else join(*split(rows, heads, have), heads, want)
