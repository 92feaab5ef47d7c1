"""Pages that can reach the threshold of what was read first.

tau of any part of the keys is a lower bound of tau of all. So each query head has some pages that
seem good read first, and the threshold of their true scores is such a bound; the others are read
where they seem to reach above it. How high the scores of a page reach is estimated from its box:
center.q + reach * sqrt(sum (q_d half_width_d) ** 2), where the first pages show what reach the
head's keys have: a little more than the furthest of it is taken.

First pages are the last one and, of the pages whose numbers leave the same remainder, the best one:
most of the best pages are among them, and nobody has to rank all pages for it. Of long sequences
more are read: the support is larger there, and a few of its tokens have a lower threshold.

An estimate from boxes does not show a single key that suits the query in all channels at once. Such
a key lies at the edge of its page's box in most of them, so that the page's radius is larger than
those of its neighbours. Pages of which that is true are judged by their bounds. With bounds in
place of all estimates only pages without weight are left out: so prunes exact decoding.

With codes nothing has to be learnt from first pages, and no page needs a guard but one that has no
bound: how far scores reach above those of rounded keys is what rounding does, for all numbers.
"""

import torch
from torch import Tensor

from ..pages import PagedCache
from ..selectors import Adaptive, Exact
from .candidates import Candidates
from .certificate import THRESHOLD_ROUNDING
from .entmax import solve_entmax
from .quest import page_reaches, page_spreads, radius_bounds, scaled_queries, sound_bounds

FIRST_SHARE = 128
"""Of a long sequence one page in so many is read first by each query head."""

NEIGHBOURS = 32
"""Pages with whose mean radius that of each of them is compared."""

MOST_FIRST_TOKENS = 2048
"""No more than so many tokens are, but for the pages that are always read first."""


def most_first(first_pages: int, page_size: int) -> int:
    """Pages that a query head has read first at most, the last page among them."""
    return max(first_pages, MOST_FIRST_TOKENS // page_size)


def adaptive_pages(
    candidates: Candidates, selector: Adaptive, cache: PagedCache, ids: Tensor
) -> Tensor:
    """Pages [B, kv_heads, P] bool to read: those that any query head of the group wants.

    ids: [B, P] physical pages, of the last page, too.
    """
    first = choose_first(candidates, selector.first_pages)
    scores = read_first(candidates, first, cache, ids)
    lowest = lower_threshold(candidates, scores)[..., None]
    reach: float | Tensor | None = selector.fixed_reach
    if reach is None:
        reach = selector.margin * furthest(candidates, first, scores)[..., None]
    wanted = ~(page_reaches(candidates, reach) <= lowest)
    if selector.guard_in_force:
        outlying = outlying_pages(candidates, selector.guard_in_force)[:, :, None]
        wanted |= outlying & ~(radius_bounds(candidates) <= lowest)
    return wanted.any(2).scatter(-1, first.flatten(2), True) & candidates.ranked[:, None]


def possible_pages(
    candidates: Candidates, selector: Exact, cache: PagedCache, ids: Tensor
) -> Tensor:
    """Pages [B, kv_heads, P] bool that can hold weight for any query head of the group, and those
    that were read first to know; arguments as for `adaptive_pages`.

    A page whose scores cannot exceed a lower bound of tau has none.
    """
    first = choose_first(candidates, selector.first_pages, shortened=True)
    lowest = lower_threshold(candidates, read_first(candidates, first, cache, ids))[..., None]
    lowest -= THRESHOLD_ROUNDING * torch.finfo(lowest.dtype).eps * (1 + lowest.abs())
    possible = ~(sound_bounds(candidates) <= lowest)
    return possible.any(2).scatter(-1, first.flatten(2), True) & candidates.ranked[:, None]


def choose_first(candidates: Candidates, first_pages: int, shortened: bool = False) -> Tensor:
    """The pages [B, kv_heads, group, classes] that reach highest of those whose numbers leave each
    remainder; the last page where there is none. Ties go to the earlier one."""
    reaches = _ranked(candidates, page_reaches(candidates, shortened=shortened))
    pages = candidates.ranked.sum(-1)[:, None]
    least, most = first_pages - 1, most_first(first_pages, candidates.page_size) - 1
    classes = (pages // FIRST_SHARE - 1).clamp(least, most)
    page = torch.arange(reaches.shape[-1], device=reaches.device)
    place = (page % classes)[:, None, None].expand_as(reaches)
    highest = reaches.new_full((*reaches.shape[:3], int(classes.max())), -torch.inf)
    highest = highest.scatter_reduce(-1, place, reaches, "amax")
    best = (reaches == highest.gather(-1, place)) & (reaches > -torch.inf)
    last = pages[..., None, None]
    page = torch.where(best, page, last)
    return last.expand_as(highest).scatter_reduce(-1, place, page, "amin")


def read_first(candidates: Candidates, first: Tensor, cache: PagedCache, ids: Tensor) -> Tensor:
    """Scores z [B, kv_heads, group, classes + 1, page_size] of each query head in the pages that it
    has read first, [B, kv_heads, group, classes], and in the last page; -inf for none."""
    query, slopes = scaled_queries(candidates)
    last = candidates.ranked.sum(-1)[:, None, None, None]
    page = torch.cat((first, last.expand_as(first[..., :1])), -1)
    missing = torch.nn.functional.pad(first == last, (0, 1))
    sequence = torch.arange(len(page), device=page.device)[:, None, None, None]
    head = torch.arange(page.shape[1], device=page.device)[:, None, None]
    keys = cache.key[ids[sequence, page], head].to(query.dtype)
    scores = (keys @ query[..., None, :, None])[..., 0]
    offset = torch.arange(candidates.page_size, device=page.device)
    position = page[..., None] * candidates.page_size + offset
    relative = position - (candidates.seq_lens[:, None, None, None, None] - 1)
    if slopes is not None:
        scores = scores + slopes[..., None] * relative
    return scores.masked_fill((relative > 0) | missing[..., None], -torch.inf)


def lower_threshold(candidates: Candidates, scores: Tensor) -> Tensor:
    """tau [B, kv_heads, group] of what `read_first` gives."""
    alpha = candidates.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha.view(scores.shape[1:3]).expand(scores.shape[:3])
    # The solver overwrites what it is given.
    return solve_entmax(scores.flatten(3).clone(), alpha)[1]


def furthest(candidates: Candidates, first: Tensor, scores: Tensor) -> Tensor:
    """How far the scores of each head's first pages, but for the last page, reach above their
    centers at most, [B, kv_heads, group], in half-widths in the Euclidean norm.

    Where half-widths are nothing, so is what rounding makes of it.
    """
    center, spread = page_reaches(candidates, 0.0), page_spreads(candidates)
    center, spread = (x.gather(-1, first) for x in (center, spread))
    height = scores[..., :-1, :].nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(-1)
    ratio = (height - center) / spread
    ratio = ratio.masked_fill(ratio.isnan(), 0)
    return ratio.amax(-1).clamp(0, candidates.query.shape[-1] ** 0.5)


def outlying_pages(candidates: Candidates, guard: float) -> Tensor:
    """Pages [B, kv_heads, P] bool whose radius is infinite, or more than `guard` times the mean of
    the finite ones of the NEIGHBOURS pages that they are one of."""
    assert candidates.radius is not None
    radius = candidates.radius[..., 0]
    infinite = radius.isposinf() & candidates.ranked[:, None]
    ranked = candidates.ranked[:, None] & ~infinite
    radius = radius.masked_fill(~ranked, 0)
    pages = radius.shape[-1]
    near, held = (
        torch.nn.functional.pad(x, (0, -pages % NEIGHBOURS)).unflatten(-1, (-1, NEIGHBOURS))
        for x in (radius, ranked)
    )
    outlying = near * held.sum(-1, keepdim=True) > guard * near.sum(-1, keepdim=True)
    return outlying.flatten(-2)[..., :pages] | infinite


def _ranked(candidates: Candidates, heights: Tensor) -> Tensor:
    """Heights [B, kv_heads, group, P], -inf of pages that are not ranked or have no number."""
    hidden = ~candidates.ranked[:, None, None] | heights.isnan()
    return heights.masked_fill(hidden, -torch.inf)
