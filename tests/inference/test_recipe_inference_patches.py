"""Paged attention by torch against plain attention, and the chunks of Megatron-Core's dynamic cache
while requests come and go."""

import math
import random

import pytest

from workshop_utils.runtime import nemo_cpu

CHUNK, GROUPS, HEADS, CHANNELS = 4, 2, 6, 8


def paged_cache(lengths):
    """Random keys and values of some requests, as ``[length, groups, channels]`` each and spread
    over shuffled chunks of a cache."""
    import torch

    torch.manual_seed(0)
    counts = [math.ceil(length / CHUNK) for length in lengths]
    numbers = torch.randperm(sum(counts) + 3).tolist()
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int)
    caches = torch.full((2, len(numbers), CHUNK, GROUPS, CHANNELS), -1.0)
    plain = [torch.randn(2, length, GROUPS, CHANNELS) for length in lengths]
    for request, count in enumerate(counts):
        table[request, :count] = torch.tensor([numbers.pop() for _ in range(count)])
        for position in range(lengths[request]):
            place = (table[request, position // CHUNK], position % CHUNK)
            caches[(slice(None), *place)] = plain[request][:, position]
    return caches, table, plain


def plain_attention(queries, keys, values):
    """Causal attention written out: the last of ``queries`` sees every key. ``[tokens, heads,
    channels]``."""
    import torch

    shared = HEADS // GROUPS
    keys, values = (part.repeat_interleave(shared, dim=1) for part in (keys, values))
    scores = torch.einsum("qhc,khc->hqk", queries, keys) / math.sqrt(CHANNELS)
    before = len(keys) - len(queries)
    later = torch.arange(len(keys))[None] > torch.arange(len(queries))[:, None] + before
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(later, -math.inf).softmax(-1), values)


def test_new_and_running_requests_in_one_step():
    import torch

    from workshop_utils.runtime.nemo_cpu.paged_attention import attend_to_pages

    # All new, one token, a continued prompt, a prompt of one token, all new.
    cached, new = [9, 4, 13, 1, 7], [9, 1, 5, 1, 7]
    caches, table, plain = paged_cache(cached)
    queries = torch.randn(sum(new) + 3, HEADS, CHANNELS)  # three rows of padding
    begins = [sum(new[:request]) for request in range(len(new) + 1)]
    ends = torch.tensor([sum(cached[:request]) for request in range(len(cached) + 1)])
    lengths = (torch.tensor(begins), ends, max(new), max(cached))
    found = attend_to_pages(queries, *caches, *lengths, block_table=table)
    for request, (begin, tokens) in enumerate(zip(begins, new, strict=False)):
        expected = plain_attention(queries[begin : begin + tokens], *plain[request])
        torch.testing.assert_close(found[begin : begin + tokens], expected)
    assert not found[sum(new) :].any()


def test_one_token_of_each_request():
    import torch

    from workshop_utils.runtime.nemo_cpu.paged_attention import attend_one_token_to_pages

    lengths = [9, 4, 13, 1]
    caches, table, plain = paged_cache(lengths)
    # Two rows of padding, as the engine has them.
    table = torch.cat([table, torch.zeros(2, table.shape[1], dtype=torch.int)])
    queries = torch.randn(6, 1, HEADS, CHANNELS)
    found = attend_one_token_to_pages(
        queries, *caches, cache_seqlens=torch.tensor([*lengths, 0, 0]), block_table=table
    )
    for request, (keys, values) in enumerate(plain):
        torch.testing.assert_close(found[request], plain_attention(queries[request], keys, values))
    assert found.isfinite().all()


def serve_at_random(context_class, overflow, seed):
    """Requests of random lengths come and go 150 steps long; no two may own a chunk, and none may
    be lost."""
    import torch

    draw = random.Random(seed)
    context = context_class(
        params_dtype=torch.float32,
        num_layers=1,
        kv_channels=4,
        num_attention_heads=1,
        max_sequence_length=32,
        chunk_size_tokens=4,
        buffer_size_gb=80 * 2 * 4 * 4 * 4 / 1024**3,
        buffer_guaranteed_fraction=1e-6,
        max_requests_override=8,
        max_tokens_override=512,
        tensor_model_parallel_size=1,
    )
    left, count = {}, 0
    for _ in range(150):
        while draw.random() < 0.5 and context.total_request_count < 8:
            try:
                context.add_request(count, torch.arange(draw.randint(1, 20)), 12)
            except overflow:
                break
            left[count], count = draw.randint(1, 12), count + 1
        if not context.total_request_count:
            continue
        owned, chunks = [], context.chunk_allocator
        for row in range(context.total_request_count):
            count = int(context.request_kv_chunk_counts[row])
            owned += context.request_to_kv_chunk_ids[row][:count].tolist()
        assert len(owned) == len(set(owned)) and -1 not in owned, "a chunk has two owners"
        lost = chunks.chunk_count_total - 1 - chunks.chunk_count_avail - len(owned)
        assert not lost, "chunks got lost"
        running = slice(context.paused_request_count, context.total_request_count)
        active = context.request_ids[running].tolist()
        for request in active:
            left[request] -= 1
        goes_on = torch.tensor([left[request] > 0 for request in active]).byte()
        context.update_requests(goes_on, torch.zeros(len(active), dtype=torch.long))


def test_chunks_have_one_owner_with_the_patch_and_two_without(monkeypatch):
    nemo_cpu.apply()
    from megatron.core.inference.contexts import dynamic_context

    patched = dynamic_context.DynamicInferenceContext
    for seed in range(8):
        serve_at_random(patched, dynamic_context.ContextOverflowError, seed)
    upstream = next(cell.cell_contents for cell in patched.add_request.__closure__)
    monkeypatch.setattr(patched, "add_request", upstream)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(8):
            serve_at_random(patched, dynamic_context.ContextOverflowError, seed)
