"""Attention of one query per sequence over chosen pages of the cache.

The unit of work is a row: one sequence and KV head, with all query heads of its group. Rows read
their own pages and nothing else; rows of similar length are padded and computed together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..pages import NewTokens, PagedCache
from ..report import Counter, DecodeReport
from ..selectors import Adaptive, Exact, Selector, TopK
from .append import append
from .certificate import certificate as certificate_of
from .certificate import count_by_size, dropped_mass_bound, round_up
from .entmax import solve_entmax
from .scores import compute_dtype, scale_to_scores
from .select import select_pages

CHUNK_ELEMENTS = 1 << 20
"""Key elements gathered at a time."""


def decode(
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
    counters: Tensor | None,
    out: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    new_tokens: NewTokens | None = None,
    certificate: Tensor | None = None,
) -> Tensor:
    """See `entmaxkv_kernels.decode`; `scale` is multiplied by `key_scale` already."""
    if new_tokens is not None:
        append(cache, *new_tokens, key_scale=key_scale, value_scale=value_scale, counters=counters)
    seq_lens = seq_lens.long()
    bounds = None
    if certificate is not None:
        bounds = _bounds_of(selector, query, cache, seq_lens, sliding_window)
    selection = select_pages(
        query,
        cache,
        block_table,
        seq_lens,
        scale=scale,
        alpha=alpha,
        selector=selector,
        alibi_slopes=alibi_slopes,
        sliding_window=sliding_window,
        exact_rows=exact_rows,
        exact_below=exact_below,
        bounds=bounds,
    )
    scaled, slopes = scale_to_scores(query, scale, alpha, alibi_slopes)
    if certificate is not None:
        # Where nothing bounds what was left out, the certificate says whether anything was.
        unread = selection.held[:, None] & ~selection.selected
        proved = isinstance(selector, Exact)
        grouped_certificate = certificate.unflatten(1, (cache.key.shape[1], -1))
        grouped_certificate.copy_((unread & (not proved)).any(-1)[..., None])
    support = torch.zeros((), dtype=torch.int64, device=query.device)
    grouped_out = out.unflatten(1, (cache.key.shape[1], -1)).zero_()
    for rows in attend_pages(
        scaled, cache, block_table, seq_lens, selection.selected, alpha, slopes, sliding_window
    ):
        grouped_out[rows.sequence, rows.head] = (rows.output * value_scale).to(out.dtype)
        if bounds is not None:
            place = rows.sequence, rows.head
            grouped_certificate[place] = round_up(
                certificate_of(
                    rows.tau,
                    bounds[place].masked_fill(selection.selected[place][:, None], -torch.inf),
                    cache.layout.page_size,
                    alpha.view(*bounds.shape[1:3])[rows.head]
                    if isinstance(alpha, Tensor)
                    else alpha,
                )
            )
        if counters is not None:
            support += (rows.weights > 0).sum()
    if counters is not None:
        steps = (seq_lens > 0).sum()
        counters[Counter.STEPS] += steps
        counters[Counter.SPARSE_STEPS] += selection.sparse.sum()
        counters[Counter.PAGES_HELD] += selection.held.sum() * cache.key.shape[1]
        counters[Counter.PAGES_READ] += selection.selected.sum()
        counters[Counter.SUPPORT] += support
        counters[Counter.QUERY_HEADS] += steps * query.shape[1]
        if certificate is not None:
            counters[Counter.CERTIFIED :] += count_by_size(certificate[seq_lens > 0])
    return out


def _bounds_of(
    selector: Selector, query: Tensor, cache: PagedCache, seq_lens: Tensor, window: int | None
) -> Tensor | None:
    """What `select_pages` writes bounds to, [B, kv_heads, group, P] of -inf, if there are any."""
    if not isinstance(selector, TopK | Adaptive) or window is not None:
        return None
    kv_heads, page_size = cache.key.shape[1:3]
    pages = -(-int(seq_lens.max()) // page_size) if len(seq_lens) else 0
    shape = (len(query), kv_heads, query.shape[1] // kv_heads, pages)
    return torch.full(shape, -torch.inf, dtype=compute_dtype(query.dtype), device=query.device)


class AttendedRows(NamedTuple):
    """A chunk of rows, each a sequence and KV head.

    sequence, head: [rows]
    page: [rows, K] pages read, by position in the sequence; where a row has no further page, a
        number past those of the longest sequence.
    weights: [rows, group, K, page_size]
    tau: [rows, group]
    output: [rows, group, head_size]
    """

    sequence: Tensor
    head: Tensor
    page: Tensor
    weights: Tensor
    tau: Tensor
    output: Tensor


def attend_pages(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    selected: Tensor,
    alpha: float | Tensor,
    slopes: Tensor | None,
    sliding_window: int | None,
) -> Iterator[AttendedRows]:
    """Entmax attention over the selected pages [B, kv_heads, P], chunk by chunk.

    query: [B, query_heads, head_size] scaled to scores, as the slopes are.
    """
    kv_heads, page_size, head_size = cache.key.shape[1:]
    grouped = query.unflatten(1, (kv_heads, -1))
    group = grouped.shape[2]
    if isinstance(alpha, Tensor):
        alpha = alpha.view(kv_heads, group)
    if slopes is not None:
        slopes = slopes.view(kv_heads, group)
    for row, page in _chunk_rows(selected.flatten(0, 1), page_size * head_size):
        sequence, head = row // kv_heads, row % kv_heads
        last = seq_lens[sequence, None] - 1  # the query's position
        # Where a row has no further page, `page` lies after the query, so that none of its keys
        # is visible; what is read in its place is the sequence's last page.
        ids = block_table[sequence[:, None], page.minimum(last // page_size)].long()
        position = page[..., None] * page_size + torch.arange(page_size, device=row.device)
        relative = position - last[..., None]  # [rows, K, page_size]
        hidden = relative > 0
        if sliding_window is not None:
            hidden |= relative <= -sliding_window

        keys = cache.key[ids, head[:, None]].flatten(1, 2).to(query.dtype)
        scores = grouped[sequence, head] @ keys.mT  # [rows, group, K * page_size]
        if slopes is not None:
            scores.addcmul_(slopes[head, :, None], relative.flatten(1)[:, None].to(scores.dtype))
        scores.masked_fill_(hidden.flatten(1)[:, None], -torch.inf)
        weights, tau = solve_entmax(scores, alpha[head] if isinstance(alpha, Tensor) else alpha)
        weights = weights.unflatten(-1, page.shape[1:] + hidden.shape[2:])
        output = _weigh_values(cache.value, ids, head, weights, hidden)
        yield AttendedRows(sequence, head, page, weights, tau, output)


def _weigh_values(
    value: Tensor, ids: Tensor, head: Tensor, weights: Tensor, hidden: Tensor
) -> Tensor:
    """Weighted values [rows, group, head_size], read only from pages that hold any weight.

    ids: [rows, K] physical pages; weights: [rows, group, K, page_size]; hidden: [rows, K,
    page_size].
    """
    # A NaN counts as a weight: it has to show in the output.
    column = _list_true((weights != 0).any(-1).any(1))  # [rows, V], V pages of values
    missing = column == ids.shape[1]
    column = column.clamp_max(ids.shape[1] - 1)
    values = value[ids.gather(1, column), head[:, None]].to(weights.dtype)
    # Slots that hold no token of the sequence may hold anything, even NaN.
    hidden = hidden.take_along_dim(column[..., None], 1) | missing[..., None]
    values.masked_fill_(hidden[..., None], 0)
    weights = weights.take_along_dim(column[:, None, :, None], 2)
    return weights.flatten(2) @ values.flatten(1, 2)


def _chunk_rows(selected: Tensor, page_elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split rows of selected [R, P] into chunks of similar length.

    Yields the rows [r] of a chunk and their pages [r, K], as `_list_true` gives them. Rows
    without pages are left out.
    """
    counts = selected.sum(-1)
    order = counts.argsort(dim=0, descending=True, stable=True)
    lengths = counts[order].tolist()
    start = 0
    while start < len(lengths) and lengths[start]:
        size = max(1, CHUNK_ELEMENTS // (lengths[start] * page_elements))
        rows = order[start : start + size]
        rows = rows[counts[rows] > 0]
        yield rows, _list_true(selected[rows])
        start += size


def _list_true(mask: Tensor) -> Tensor:
    """Positions of the true entries of each row of mask [R, N], ascending, then N: [R, K]."""
    counts = mask.sum(-1)
    row, position = mask.nonzero(as_tuple=True)
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    listed = torch.full((len(mask), int(counts.max())), mask.shape[1], device=mask.device)
    listed[row, column] = position
    return listed


def analyze_decode(
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
) -> DecodeReport:
    """See `entmaxkv_kernels.analyze_decode`."""
    seq_lens = seq_lens.long()
    kv_heads, page_size = cache.key.shape[1:3]
    heads = (len(query), kv_heads, query.shape[1] // kv_heads)
    scaled, slopes = scale_to_scores(query, scale, alpha, alibi_slopes)
    whole = isinstance(selector, Exact) or sliding_window is not None
    bounds = _bounds_of(selector, query, cache, seq_lens, sliding_window)
    selection = select_pages(
        query,
        cache,
        block_table,
        seq_lens,
        scale=scale,
        alpha=alpha,
        selector=selector,
        alibi_slopes=alibi_slopes,
        sliding_window=sliding_window,
        exact_rows=exact_rows,
        exact_below=exact_below,
        bounds=bounds,
    )
    tau, dropped, recall, bound = (scaled.new_zeros(heads) for _ in range(4))
    exact, difference = (scaled.new_zeros(*heads, query.shape[2]) for _ in range(2))
    context = (scaled, cache, block_table, seq_lens)
    everything = selection.held[:, None].expand_as(selection.selected)
    for rows in attend_pages(*context, everything, alpha, slopes, sliding_window):
        place = rows.sequence, rows.head
        page = rows.page.clamp_max(selection.selected.shape[-1] - 1)
        unread = ~selection.selected[place].gather(1, page)[:, None]  # [rows, 1, K]
        tau[place] = rows.tau
        # Rounded weights may add up to more than 1.
        dropped[place] = (rows.weights.sum(-1) * unread).sum(-1).clamp_max(1)
        support = (rows.weights > 0).sum(-1)
        recall[place] = ((support * ~unread).sum(-1) / support.sum(-1)).to(recall.dtype)
        exact[place] = rows.output
    for rows in attend_pages(*context, selection.selected, alpha, slopes, sliding_window):
        place = rows.sequence, rows.head
        difference[place] = rows.output - exact[place]
        if bounds is not None:
            read = selection.selected[place][:, None]
            bound[place] = dropped_mass_bound(
                rows.weights.flatten(2),
                rows.tau,
                bounds[place].masked_fill(read, -torch.inf),
                page_size,
                alpha.view(heads[1:])[rows.head] if isinstance(alpha, Tensor) else alpha,
            )
    norm = exact.norm(dim=-1).clamp_min(torch.finfo(exact.dtype).tiny)
    return DecodeReport(
        tau=tau.flatten(1),
        selected=selection.selected,
        dropped_mass=dropped.flatten(1),
        support_recall=recall.flatten(1),
        dropped_bound=bound.flatten(1) if whole or bounds is not None else None,
        output_error=(difference.norm(dim=-1) / norm).flatten(1),
    )
