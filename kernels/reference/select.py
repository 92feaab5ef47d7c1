"""Choosing the pages that each KV head reads in a decode step.

There is one page set per sequence and KV head: all query heads of a group share what is read.
The last page is always in it, because it holds the newest tokens and its statistics still change.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..pages import PagedCache
from ..selectors import Adaptive, Exact, Gaussian, Selector
from .adaptive import adaptive_pages, possible_pages
from .candidates import Candidates
from .codes import unpack
from .gaussian import gaussian_pages
from .quest import quest_pages, sound_bounds
from .scores import compute_dtype

CHUNK_ELEMENTS = 1 << 22
"""Statistics elements gathered at a time."""


class Selection(NamedTuple):
    """held: [B, P] pages that hold tokens the query may see. selected: [B, kv_heads, P] pages to
    read. sparse: [B] sequences whose pages a sparse selector chose."""

    held: Tensor
    selected: Tensor
    sparse: Tensor


def select_pages(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    alpha: float | Tensor,
    selector: Selector,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    exact_rows: Tensor | None,
    exact_below: int,
    bounds: Tensor | None = None,
) -> Selection:
    """The pages to read for query [B, query_heads, head_size]; arguments as in `decode`.

    bounds: [B, kv_heads, group, P] to write upper bounds of the scores z in ranked pages to, by a
        selector whose statistics bound the keys.
    """
    kv_heads, page_size = cache.key.shape[1:3]
    page_count = (seq_lens + page_size - 1) // page_size
    page = torch.arange(int(page_count.max()) if len(seq_lens) else 0, device=query.device)
    held = page < page_count[:, None]
    if sliding_window is not None:
        held &= page >= (seq_lens[:, None] - sliding_window).clamp_min(0) // page_size
    selected = held[:, None].repeat(1, kv_heads, 1)
    if not selector.statistics or sliding_window is not None:
        return Selection(held, selected, torch.zeros_like(seq_lens, dtype=torch.bool))
    sparse = (seq_lens > exact_below) & (page_count > 1)
    if exact_rows is not None:
        sparse &= ~exact_rows
    if not sparse.any():
        return Selection(held, selected, sparse)
    dtype = compute_dtype(query.dtype)
    # Codes become a number for each channel of each token.
    gathered = (cache.key if cache.layout.coded else cache.statistics)[0].numel()
    chunk = max(1, CHUNK_ELEMENTS // (len(page) * gathered + 1))
    for rows in sparse.nonzero().squeeze(-1).split(chunk):
        ranked = page < page_count[rows, None] - 1  # every page but the last
        # Entries of the block table past the sequence are stale: read page 0 in their place.
        ids = block_table[rows, : len(page)].long().masked_fill(~held[rows], 0)
        statistics = half_scales = radius = codes = None
        if cache.layout.coded:
            kept, scales = (x[ids].transpose(1, 2) for x in (cache.statistics, cache.scales))
            codes = unpack(kept, scales, page_size, dtype)
            radius = codes.scales[..., 2:]
        else:
            statistics = cache.read_statistics(ids, dtype).permute(3, 0, 2, 1, 4)
            if cache.layout.bounded:
                half_scales, radius = (
                    cache.scales[ids, :, place].mT[..., None].to(dtype) for place in (1, 2)
                )
        candidates = Candidates(
            query[rows].to(dtype).unflatten(1, (kv_heads, -1)),
            statistics,
            ranked,
            seq_lens[rows],
            page_size,
            scale,
            alpha,
            alibi_slopes,
            query.dtype,
            half_scales,
            radius,
            codes,
        )
        if isinstance(selector, Gaussian):
            chosen = gaussian_pages(candidates, selector)
        elif isinstance(selector, Adaptive):
            chosen = adaptive_pages(candidates, selector, cache, ids)
        elif isinstance(selector, Exact):
            chosen = possible_pages(candidates, selector, cache, ids)
        else:
            chosen = quest_pages(candidates, selector)
        if bounds is not None:
            sound = sound_bounds(candidates)
            bounds[rows] = sound.masked_fill(~ranked[:, None, None], -torch.inf)
        selected[rows] = chosen | (held[rows] & ~ranked)[:, None]
    return Selection(held, selected, sparse)
