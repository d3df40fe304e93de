"""Patches of Megatron-Core 0.13.1's dynamic inference engine: its paged attention without
flash-attn, and a leak of its cache's chunks."""

import importlib.util
import itertools
from types import ModuleType

from .registry import always, patch


def no_flash_attention() -> bool:
    """True when neither flash-attn nor its version for Hopper is installed, whatever the device."""
    return not any(map(importlib.util.find_spec, ("flash_attn", "flashattn_hopper")))


@patch("megatron.core.transformer.attention", when=no_flash_attention)
def paged_attention(module: ModuleType) -> None:
    """the dynamic engine reads its paged cache with two kernels of flash-attn: AssertionError,
    'flash attn verion v2.7.3 and above is required for dynamic batching'."""
    module.flash_attn_varlen_func = attend_to_pages
    module.flash_attn_with_kvcache = attend_one_token_to_pages
    module.is_fa_min_version = lambda *args, **kwargs: True


@patch("megatron.core.inference.contexts.dynamic_context", when=always)
def chunks_of_finished_requests(module: ModuleType) -> None:
    """the rows of finished requests keep their chunk numbers (fill_ on a copy made by indexing); a
    shorter request in such a row gives chunks back that others still use: their cache is
    overwritten, or 'The expanded size of the tensor must match'."""
    original = module.DynamicInferenceContext.add_request

    def add_request(self, request_id, tokens, num_tokens_to_generate=None):
        self.request_to_kv_chunk_ids[self.total_request_count :] = -1
        original(self, request_id, tokens, num_tokens_to_generate)

    module.DynamicInferenceContext.add_request = add_request


def attend_to_pages(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, block_table=None
):
    """flash_attn_varlen_func for a paged cache.

    Args:
        q: ``[tokens, heads, channels]``, requests one after the other; rows after the last request
            are padding, and come out as 0. k, v: the cache of one layer, ``[chunks, tokens of a
            chunk, groups, channels]``. cu_seqlens_q, cu_seqlens_k: where each request begins in
            ``q`` and among all its cached tokens, ``[requests + 1]``.
        block_table: the chunks of each request, ``[requests, most chunks]``.
    """
    import torch

    output = torch.zeros_like(q)
    queries, cached = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    for request, (begin, end) in enumerate(itertools.pairwise(queries)):
        pages, length = block_table[request], cached[request]
        keys, values = (_read(cache, pages, length) for cache in (k, v))
        seen = (
            None
            if end - begin in (1, length)
            else torch.ones(end - begin, length, dtype=torch.bool, device=q.device).tril(
                length - end + begin
            )
        )
        output[begin:end] = _attend(
            q[begin:end], keys, values, seen, is_causal=end - begin == length > 1
        )
    return output


def attend_one_token_to_pages(q, k_cache, v_cache, cache_seqlens, causal=True, block_table=None):
    """flash_attn_with_kvcache where each request has one new token: ``q`` is ``[requests, 1, heads,
    channels]``, and so is the result.

    All requests at once, up to the longest; one with no tokens is padding.
    """
    import torch

    longest = max(1, int(cache_seqlens.max()))
    pages = block_table[:, : -(-longest // k_cache.shape[1])].long().clamp(min=0)
    keys, values = (
        cache[pages].flatten(1, 2)[:, :longest].transpose(1, 2) for cache in (k_cache, v_cache)
    )
    seen = torch.arange(longest, device=q.device) < cache_seqlens.clamp(min=1)[:, None]
    output = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, seen[:, None, None], enable_gqa=True
    )
    return output.transpose(1, 2)


def _read(cache, pages, length):
    """The first ``length`` cached tokens of a request, ``[length, groups, channels]``."""
    return cache[pages[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def _attend(q, k, v, mask, is_causal):
    import torch

    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    output = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, enable_gqa=True
    )
    return output[0].transpose(0, 1)
