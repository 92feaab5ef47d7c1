"""Pages that can reach the threshold of what was read, read until there is none.

tau of any part of the keys is a lower bound of tau of all. So the pages that seem best are read
first, and their true scores give such a bound; then, best first and at most as many as were read
already, the pages that seem to reach above it, which raises it; and so on. How high the scores of a
page reach is estimated from its box: center.q + reach * sqrt(sum (q_d half_width_d) ** 2).

Such an estimate does not show a single key that suits the query in all channels at once. It cannot
score above its page's bound, so a share of the pages, those with the highest bounds, is read first,
too.
"""

import torch
from torch import Tensor

from ..pages import PagedCache
from ..selectors import Adaptive
from .candidates import Candidates
from .entmax import solve_entmax
from .quest import choose_pages, page_reaches, quest_bounds
from .scores import scale_to_scores

CHUNK_ELEMENTS = 1 << 22
"""Key elements gathered at a time."""


def adaptive_pages(
    candidates: Candidates, selector: Adaptive, cache: PagedCache, ids: Tensor
) -> Tensor:
    """Pages [B, kv_heads, P] bool to read: those that any query head of the group wants.

    ids: [B, P] physical pages, of the last page, too.
    """
    ranked = candidates.ranked[:, None]
    reaches = page_reaches(candidates, selector.reach)  # [B, kv_heads, group, P]
    scores = _Scores(candidates, cache, ids)
    last = candidates.ranked.sum(-1)
    scores.read(torch.nn.functional.one_hot(last, ids.shape[1]).bool()[:, None])
    read = choose_pages(page_reaches(candidates), candidates.ranked, selector.first_pages)
    guards = (last * selector.guard).long()[:, None, None]
    read = read | choose_pages(quest_bounds(candidates), candidates.ranked, guards)
    new = read
    while new.any():
        scores.read(new)
        above = (reaches - scores.threshold()[..., None]).amax(2)
        above = above.masked_fill(read | ~ranked, -torch.inf)
        room = read.sum(-1, keepdim=True)
        place = above.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        new = (above > 0) & (place < room)
        read = read | new
    return read


class _Scores:
    """Scores z of the pages that were read so far."""

    def __init__(self, candidates: Candidates, cache: PagedCache, ids: Tensor) -> None:
        query, slopes = scale_to_scores(
            candidates.query.flatten(1, 2),
            candidates.scale,
            candidates.alpha,
            candidates.alibi_slopes,
        )
        heads = candidates.query.shape[:3]
        self.query = query.view(candidates.query.shape)
        self.slopes = None if slopes is None else slopes.view(heads[1:])
        self.alpha = candidates.alpha
        if isinstance(self.alpha, Tensor):
            self.alpha = self.alpha.view(heads[1:]).expand(heads)
        self.cache, self.ids, self.seq_lens = cache, ids, candidates.seq_lens
        shape = (heads[0], heads[1], ids.shape[1], heads[2], candidates.page_size)
        self.values = query.new_full(shape, -torch.inf)

    def read(self, pages: Tensor) -> None:
        """Compute the scores of pages [B, kv_heads or 1, P] bool."""
        chosen = pages.expand(self.values.shape[:3]).nonzero()
        for place in chosen.split(max(1, CHUNK_ELEMENTS // self.cache.key[0, 0].numel())):
            sequence, head, page = place.unbind(1)
            keys = self.cache.key[self.ids[sequence, page], head].to(self.query.dtype)
            scores = self.query[sequence, head] @ keys.mT  # [pages, group, page_size]
            offset = torch.arange(keys.shape[1], device=keys.device)
            relative = page[:, None] * keys.shape[1] + offset - (self.seq_lens[sequence, None] - 1)
            relative = relative[:, None]
            if self.slopes is not None:
                scores = scores + self.slopes[head][..., None] * relative
            self.values[sequence, head, page] = scores.masked_fill(relative > 0, -torch.inf)

    def threshold(self) -> Tensor:
        """tau [B, kv_heads, group] of all scores that were read."""
        scores = self.values.transpose(2, 3).flatten(3)
        return solve_entmax(scores.clone(), self.alpha)[1]
