"""The best pages of a fixed budget, by boxes around their keys, as Quest's (arXiv 2406.10774), or
by codes of their keys.

With k_d within half_width_d of center_d, q.k <= q.center + sum |q_d| half_width_d: the bound of
Quest. What ranks pages is q.center + sqrt(sum (q_d half_width_d) ** 2), how high their scores are
likely to reach, because hardly a key is at the edge that suits the query in all channels.

A radius is the largest norm of (k - center) / half_width, over the keys of a page, so that q.k <=
q.center + radius * sqrt(sum (q_d half_width_d) ** 2), by the inequality of Cauchy and Schwarz: the
bound that is kept of pages, because it takes hardly more than ranking them does.

With codes, the largest score of a page's rounded keys takes the place of q.center, and that of the
norm one of the query times a part of the page's largest step, its spread; see `codes.py`.
"""

import torch
from torch import Tensor

from ..selectors import TopK
from .candidates import Candidates
from .codes import MOST_UNITS, SHORTENED, SPREADS, Codes, span, turn_queries
from .scores import scale_to_scores

LEAST_QUERY = 2.0**-40
"""Of a query as small as this all squares may vanish in fp32."""


def scaled_queries(candidates: Candidates) -> tuple[Tensor, Tensor | None]:
    """Queries [B, kv_heads, group, head_size], and ALiBi slopes [kv_heads, group, 1], of z."""
    heads = candidates.query.shape[1:3]
    query, slopes = scale_to_scores(
        candidates.query.flatten(1, 2), candidates.scale, candidates.alpha, candidates.alibi_slopes
    )
    return query.unflatten(1, heads), None if slopes is None else slopes.view(*heads, 1)


def page_reaches(
    candidates: Candidates, widths: float | Tensor = 1.0, shortened: bool = False
) -> Tensor:
    """How high the scores z of each page reach, [B, kv_heads, group, P], for their ranking.

    ALiBi counts at the page's most favourable position.

    widths: half-widths above the center that count, in the Euclidean norm; one number, or one for
        each head, [B, kv_heads, group, 1].
    shortened: for bounds, by codes of keys.
    """
    return _page_heights(candidates, shortened) + widths * page_spreads(candidates)


def _page_heights(candidates: Candidates, shortened: bool) -> Tensor:
    """Scores z [B, kv_heads, group, P] of the pages' centers, or the largest of their rounded
    keys."""
    query, slopes = scaled_queries(candidates)
    if candidates.codes is not None:
        times = SHORTENED if shortened else 1.0
        return _rounded_scores(candidates, candidates.codes, times, slopes).amax(-1)
    assert candidates.statistics is not None
    return query @ candidates.statistics[0].mT + _most_favourable(candidates, slopes)


def _rounded_scores(
    candidates: Candidates, codes: Codes, times: float, slopes: Tensor | None
) -> Tensor:
    """Scores z [B, kv_heads, group, P, page_size] of the rounded keys, ALiBi included."""
    query, page_size = candidates.query, candidates.page_size
    turned, least = turn_queries(query)
    scores = turned @ (codes.levels - 1.5).flatten(-3, -2).mT * least
    step = codes.units * (codes.scales[..., 1:2] * (times / span(query.shape[-1])))
    scores = scores.unflatten(-1, (-1, page_size)) * step[:, :, None]
    center = query @ (codes.center * codes.scales[..., :1]).mT
    scores = (scores + center[..., None]) * _factor(candidates)[..., None]
    if slopes is not None:
        position = torch.arange(candidates.ranked.shape[1] * page_size, device=slopes.device)
        relative = (position - (candidates.seq_lens[:, None] - 1)).unflatten(-1, (-1, page_size))
        scores = scores + slopes[..., None] * relative[:, None, None]
    return scores


def page_spreads(candidates: Candidates) -> Tensor:
    """Norms [B, kv_heads, group, P] of the queries, scaled, times the half-widths; with codes,
    times the spreads."""
    query, factor, unit = candidates.query, _factor(candidates), candidates.half_scales
    if candidates.codes is not None:
        spread = candidates.codes.scales[..., 1:2] * (MOST_UNITS / SPREADS / span(query.shape[-1]))
        return query.norm(dim=-1, keepdim=True) * spread.mT * factor
    assert candidates.statistics is not None
    half_width = candidates.statistics[1]
    if unit is None:
        return (query.square() @ half_width.square().mT).sqrt() * factor
    # As compiled kernels multiply them: squares of 16 bits are off by at most 0.2%.
    dtype = torch.bfloat16 if candidates.query_dtype.itemsize == 2 else query.dtype
    whole = (half_width / unit).round()
    squares = [x.square().to(dtype).to(query.dtype) for x in (query, whole)]
    return (squares[0] @ squares[1].mT).sqrt() * unit.mT * factor


def _factor(candidates: Candidates) -> Tensor:
    """What the queries are scaled by, [kv_heads, group, 1]."""
    heads = candidates.query.shape[1:3]
    ones = candidates.query.new_ones(1, heads.numel(), 1)
    return scale_to_scores(ones, candidates.scale, candidates.alpha, None)[0].view(*heads, 1)


def quest_bounds(candidates: Candidates) -> Tensor:
    """Upper bound [B, kv_heads, group, P] of the scores z in each page.

    ALiBi counts at the page's most favourable position. Of boxes only.
    """
    assert candidates.statistics is not None
    center, half_width = candidates.statistics
    query, slopes = scaled_queries(candidates)
    spread = query.abs() @ half_width.mT
    return query @ center.mT + spread + _most_favourable(candidates, slopes)


def _most_favourable(candidates: Candidates, slopes: Tensor | None) -> Tensor | float:
    """The largest that ALiBi adds to a score in each page, [B, kv_heads, group, P]."""
    if slopes is None:
        return 0.0
    page = torch.arange(candidates.ranked.shape[1], device=slopes.device)
    first = page * candidates.page_size - (candidates.seq_lens[:, None] - 1)  # [B, P]
    first = first[:, None, None].to(slopes.dtype)
    return torch.maximum(slopes * first, slopes * (first + candidates.page_size - 1))


def radius_bounds(candidates: Candidates) -> Tensor:
    """Upper bound [B, kv_heads, group, P] of the scores z in each page, by their radii."""
    assert candidates.radius is not None
    return page_reaches(candidates, candidates.radius.mT, shortened=True)


def sound_bounds(candidates: Candidates) -> Tensor:
    """`radius_bounds`, made so much larger that no rounding is in the way: once of bounds and the
    scores below them, and once of scores that were read, by which the threshold moves.

    A sum of n products is wrong by at most n eps times the sum of their magnitudes, which is not
    above that of the query's times the largest that a key of the sequence can have. What squares
    and their sum lose is in the radius.
    """
    query, slopes = scaled_queries(candidates)
    if candidates.codes is not None:
        scales = candidates.codes.scales
        largest = MOST_UNITS * (scales[..., 0] + scales[..., 1])  # [B, kv_heads, P]
    else:
        assert candidates.statistics is not None
        center, half_width = candidates.statistics
        largest = center.abs().amax(-1) + half_width.amax(-1)
    pages = torch.arange(largest.shape[-1], device=query.device)
    last = candidates.ranked.sum(-1)[:, None, None]
    largest = largest.masked_fill(pages > last, 0)
    size = query.abs().sum(-1, keepdim=True) + LEAST_QUERY * _factor(candidates)
    magnitude = size * largest[:, :, None]
    if slopes is not None:
        magnitude = magnitude + slopes.abs() * candidates.seq_lens[:, None, None, None]
    rounding = 4 * query.shape[-1] * torch.finfo(query.dtype).eps * magnitude
    return radius_bounds(candidates) + 2 * rounding.amax(-1, keepdim=True)


def quest_pages(candidates: Candidates, selector: TopK) -> Tensor:
    """Pages [B, kv_heads, P] bool to read: the best `token_budget // page_size` of each row."""
    budget = selector.token_budget // candidates.page_size
    return choose_pages(page_reaches(candidates), candidates.ranked, budget)


def choose_pages(reaches: Tensor, ranked: Tensor, budget: int | Tensor) -> Tensor:
    """The best `budget` pages [B, kv_heads, P] bool of those ranked [B, P], by reaches
    [B, kv_heads, group, P].

    budget: a number of pages, or one for each sequence, [B, 1, 1].

    The support of entmax lies within a fixed distance of a head's largest score, so what counts
    is how far below the head's own best page a page's reach lies. A group ranks a page by the
    head to which it matters most; ties go to the earlier page.
    """
    reaches = reaches.masked_fill(~ranked[:, None, None], -torch.inf)
    rank = (reaches - reaches.amax(-1, keepdim=True)).amax(2)  # [B, kv_heads, P]
    best = rank.argsort(dim=-1, descending=True, stable=True)
    within = torch.arange(rank.shape[-1], device=rank.device) < budget
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    return chosen.scatter_(-1, best, within.expand_as(best)) & ranked[:, None]
