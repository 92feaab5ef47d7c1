"""The best pages of a fixed budget, by the box bound of Quest (arXiv 2406.10774).

Quest bounds the scores of a page from a box around its keys: with k_d within half_width_d of
center_d, q.k <= q.center + |q|.half_width.
"""

import torch
from torch import Tensor

from ..selectors import TopK
from .candidates import Candidates
from .scores import scale_to_scores


def _scaled(candidates: Candidates) -> tuple[Tensor, Tensor | None]:
    """Queries [B, kv_heads, group, head_size], and ALiBi slopes [kv_heads, group, 1], of z."""
    heads = candidates.query.shape[1:3]
    query, slopes = scale_to_scores(
        candidates.query.flatten(1, 2), candidates.scale, candidates.alpha, candidates.alibi_slopes
    )
    return query.unflatten(1, heads), None if slopes is None else slopes.view(*heads, 1)


def quest_bounds(candidates: Candidates) -> Tensor:
    """Upper bound [B, kv_heads, group, P] of the scores z in each page.

    ALiBi counts at the page's most favourable position.
    """
    center, half_width = candidates.statistics  # each [B, kv_heads, P, head_size]
    query, slopes = _scaled(candidates)
    bounds = query @ center.mT + query.abs() @ half_width.mT
    if slopes is not None:
        page = torch.arange(center.shape[2], device=query.device)
        first = page * candidates.page_size - (candidates.seq_lens[:, None] - 1)  # [B, P]
        first = first[:, None, None].to(bounds.dtype)
        last = first + candidates.page_size - 1
        bounds = bounds + torch.maximum(slopes * first, slopes * last)
    return bounds


def sound_bounds(candidates: Candidates) -> Tensor:
    """The same, made so much larger that no rounding, of the bounds or of scores, is in the way.

    A sum of n products is wrong by at most n eps times the sum of their magnitudes.
    """
    bounds = quest_bounds(candidates)
    center, half_width = candidates.statistics
    query, slopes = _scaled(candidates)
    magnitude = query.abs() @ (center.abs() + half_width).mT
    if slopes is not None:
        magnitude = magnitude + slopes.abs() * candidates.seq_lens[:, None, None, None]
    return bounds + 4 * query.shape[-1] * torch.finfo(query.dtype).eps * magnitude


def quest_pages(candidates: Candidates, selector: TopK) -> Tensor:
    """Pages [B, kv_heads, P] bool to read: the best `token_budget // page_size` of each row.

    The support of entmax lies within a fixed distance of a head's largest score, so what counts
    is how far below the head's own best page a page's bound lies. A group ranks a page by the
    head to which it matters most; ties go to the earlier page.
    """
    ranked = candidates.ranked
    bounds = quest_bounds(candidates).masked_fill(~ranked[:, None, None], -torch.inf)
    rank = (bounds - bounds.amax(-1, keepdim=True)).amax(2)  # [B, kv_heads, P]
    best = rank.argsort(dim=-1, descending=True, stable=True)
    budget = selector.token_budget // candidates.page_size
    within = torch.arange(rank.shape[-1], device=rank.device) < budget
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    return chosen.scatter_(-1, best, within.expand_as(best)) & ranked[:, None]
