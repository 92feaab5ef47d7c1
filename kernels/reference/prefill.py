"""Dense causal entmax attention of many queries over the paged cache."""

import math

import torch
from torch import Tensor

from ..pages import PagedCache
from .entmax import solve_entmax
from .scores import scale_to_scores

TILE_ELEMENTS = 1 << 18
"""Scores held at a time: small enough that the solver's passes over them stay in cache."""

GPU_TILES = 256
"""A GPU takes this many times as many scores, to have work for all of it."""

MIN_QUERY_BLOCK = 16
"""Fewest queries per tile, so that a very long context is not read once per query."""


def prefill(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    alpha: float | Tensor,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    out: Tensor,
    value_scale: float = 1.0,
) -> Tensor:
    """See `entmaxkv_kernels.prefill`."""
    query, slopes = scale_to_scores(query, scale, alpha, alibi_slopes)
    page_size = cache.layout.page_size
    starts = query_start_loc.tolist()
    for sequence, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[sequence], starts[sequence + 1]
        if start == end:
            continue
        # Pages before the first query's window may have been given back: never read them.
        first = seq_len - (end - start)
        visible = 0 if sliding_window is None else max(0, first + 1 - sliding_window)
        first_page = visible // page_size
        pages = block_table[sequence, first_page : -(-seq_len // page_size)].long()
        attended = _prefill_sequence(
            query[start:end],
            cache,
            pages,
            first_page * page_size,
            seq_len,
            alpha,
            slopes,
            sliding_window,
        )
        out[start:end] = attended * value_scale
    return out


def _prefill_sequence(
    query: Tensor,
    cache: PagedCache,
    pages: Tensor,
    offset: int,
    seq_len: int,
    alpha: float | Tensor,
    slopes: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention [queries, query_heads, head_size] of one sequence's chunk.

    query: scaled to scores, as the slopes are. pages: physical ids, the first of which
    starts at position `offset` of the sequence.
    """
    count, query_heads, head_size = query.shape
    kv_heads = cache.key.shape[1]
    group = query_heads // kv_heads
    query = query.view(count, kv_heads, group, head_size).permute(1, 2, 0, 3)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    first = seq_len - count
    elements = TILE_ELEMENTS * (1 if query.is_cpu else GPU_TILES)
    tile_heads = min(kv_heads, max(1, elements // (group * count * seq_len)))
    for head in range(0, kv_heads, tile_heads):
        heads = slice(head, min(head + tile_heads, kv_heads))
        query_heads_here = slice(heads.start * group, heads.stop * group)
        keys = _gather(cache.key[:, heads], pages, seq_len - offset, query.dtype)
        values = _gather(cache.value[:, heads], pages, seq_len - offset, query.dtype)
        here = alpha[query_heads_here] if isinstance(alpha, Tensor) else alpha
        slopes_here = None if slopes is None else slopes[query_heads_here, None, None]
        begin = 0
        while begin < count:
            end = min(count, begin + _query_block(first + begin, elements // (tile_heads * group)))
            low = 0 if sliding_window is None else max(0, first + begin + 1 - sliding_window)
            keys_here = slice(max(low - offset, 0), first + end - offset)
            tile = query[heads, :, begin:end].flatten(1, 2)  # [kv_heads, group * block, head_size]
            scores = tile @ keys[:, keys_here].transpose(1, 2)
            scores = scores.view(-1, end - begin, scores.shape[-1])  # [query_heads, block, keys]
            _add_positions_(scores, slopes_here, sliding_window)
            weights, _ = solve_entmax(scores, here)
            attended = weights.view(*tile.shape[:2], -1) @ values[:, keys_here]
            out[heads, :, begin:end] = attended.view(-1, group, end - begin, head_size)
            begin = end
    return out.permute(2, 0, 1, 3).reshape(count, query_heads, head_size)


def _gather(pages: Tensor, ids: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` rows [kv_heads, length, head_size] of a sequence's pages."""
    rows = pages[ids].transpose(0, 1).flatten(1, 2)
    return rows[:, :length].to(dtype)


def _query_block(position: int, elements: int) -> int:
    """Queries per tile, the first one at `position`, such that it holds `elements` per head."""
    # block * (position + block) = elements
    block = (math.sqrt(position**2 + 4 * elements) - position) / 2
    return max(MIN_QUERY_BLOCK, int(block))


def _add_positions_(scores: Tensor, slopes: Tensor | None, sliding_window: int | None) -> None:
    """Add ALiBi to scores [query_heads, block, keys] and exclude keys out of sight.

    The last key is at the last query's position. Only the last `block` keys can lie after a
    query, and only the first `block` keys before its window.
    """
    block, keys = scores.shape[1:]
    device = scores.device
    position = torch.arange(keys, device=device)
    query_position = torch.arange(keys - block, keys, device=device)[:, None]
    if slopes is not None:
        scores.addcmul_(slopes, (position - query_position).to(scores.dtype))
    future = position[keys - block :] > query_position
    scores[..., keys - block :].masked_fill_(future, -torch.inf)
    if sliding_window is not None:
        expired = position[:block] <= query_position - sliding_window
        scores[..., :block].masked_fill_(expired, -torch.inf)
