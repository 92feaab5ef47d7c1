"""Page selectors: which pages of the past a decode step reads.

A selector is a plain description; the rule itself lives with the kernels. `statistics` names the
page statistics that the rule reads, which is what the page layout has to hold.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from .pages import BOX, CODES

CODED_REACH = 1.6
"""How far scores reach above those of rounded keys, in spreads, for a margin of 1."""


@dataclass(frozen=True)
class Exact:
    """Every page that can hold weight: the entmax output, to rounding.

    prune: leave out pages that cannot, by the boxes around their keys: where no key of a page can
        score above the threshold of keys that were read first. Only for entmax. All pages are read
        where the boxes say too little.
    first_pages: with prune, pages that each query head has read first, as for `Adaptive`.
    codes: with prune, go by codes of the keys, as for `TopK`.
    """

    prune: bool = False
    first_pages: int = 16
    codes: bool = False

    def __post_init__(self) -> None:
        _check_first_pages(self.first_pages)

    @property
    def name(self) -> str:
        return "pruned" if self.prune else "exact"

    @property
    def statistics(self) -> tuple[str, ...]:
        return _bounding(self.codes) if self.prune else ()


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian page rule of EntmaxKV (arXiv 2605.21649), with the constants of its system.

    Scores inside a page are modelled as normal, with the page's mean and diagonal variance. A
    page is read when the `quantile` of its largest modelled score exceeds the threshold expected
    of all pages, lowered by a margin. All lengths below are in units of the attention score
    (`scale * q.k`).

    One of two settings is taken by the spread of the scores, the standard deviation of the scores
    that the model gives to one query head of one sequence: the `narrow_` setting when it is below
    `narrow_spread`.

    quantile, narrow_quantile: quantile of the largest score of a page, in (0, 1).
    safety, narrow_safety: the least margin is this times the spread squared.
    shared_spread: let the mean spread of a sequence's query heads choose the setting of each, and
        take the place of one of the two factors of the square. That is the paper's own rule, for a
        batch of one: over a larger one it takes the mean over all sequences, so that what one
        reads depends on the others.
    narrow_spread: the spread below which the narrow setting applies.
    excess_fraction: the margin is at least this fraction of how far the expected threshold lies
        above the reach of an average page, mean + `excess_deviations` standard deviations.
    """

    quantile: float = 0.995
    narrow_quantile: float = 0.99
    safety: float = 0.05
    narrow_safety: float = 0.01
    narrow_spread: float = 1.5
    excess_fraction: float = 0.2
    excess_deviations: float = 1.5
    shared_spread: bool = False

    name: ClassVar[str] = "gaussian"
    statistics: ClassVar[tuple[str, ...]] = ("mean", "std")

    def __post_init__(self) -> None:
        for field in ("quantile", "narrow_quantile"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected between 0 and 1")
        for field in ("safety", "narrow_safety", "excess_fraction"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 0")


@dataclass(frozen=True)
class TopK:
    """The best pages of a fixed budget, by boxes around their keys, as Quest's (arXiv 2406.10774).
    With `codes` by those of their keys.

    The boxes are of 8-bit numbers, lie around the means and hold all keys of their pages. They are
    ranked by how high scores are likely to reach in them, and bound them as well.

    token_budget: tokens to read besides the last page, which is always read; rounded down to
        whole pages. Below one page only the last page is read.
    codes: go by two bits of every channel of every key in place of boxes. They tell far better
        which pages hold the largest scores, and take more room and time: 668 bytes of a page of 16
        keys of 128 channels, boxes 268.
    """

    token_budget: int
    codes: bool = False

    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        if self.token_budget < 0:
            raise ValueError(f"token_budget is {self.token_budget}; expected at least 0")

    @property
    def statistics(self) -> tuple[str, ...]:
        return _bounding(self.codes)


@dataclass(frozen=True)
class Adaptive:
    """The pages that can reach a threshold of true scores; for entmax.

    Each query head has some pages that seem good read first. The threshold of their scores is a
    lower bound of that of all keys, and of the other pages those are read that seem to reach above
    it for any head of the group. So the budget follows from the scores.

    margin: how high the scores of a page are taken to reach above its center, as a multiple of how
        high they do in one of the head's first pages at most; both in half-widths of the box, in
        the Euclidean norm. More reads more and drops less.
    reach: if given, that many half-widths instead, for every head.
    first_pages: pages that each query head has read first, the last page among them, 2 to 64; of
        long sequences it has more, one in 128.
    guard: a page whose radius is more than this many times the mean of its neighbours' holds a key
        that lies off the others in most channels, and is judged by its bound instead: an isolated
        key that the estimate misses is likely to be in one. 0 for no guard, or at least 1.
    codes: go by codes of the keys, as for `TopK`: what stands for the center is the largest score
        of the rounded keys of a page, and for half-widths its spread, which is about what rounding
        moves scores by. That is the same for all models: scores are taken to reach CODED_REACH
        spreads, times the margin. No guard is needed but for pages of keys that are no numbers,
        which are read.
    """

    margin: float = 1.25
    reach: float | None = None
    first_pages: int = 16
    guard: float = 1.2
    codes: bool = False

    name: ClassVar[str] = "adaptive"

    def __post_init__(self) -> None:
        for field in ("margin", "reach"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} is {value}; expected a finite number above 0")
        _check_first_pages(self.first_pages)
        if self.guard != 0 and not 1 <= self.guard < math.inf:
            raise ValueError(f"guard is {self.guard}; expected 0 or a finite number of at least 1")

    @property
    def fixed_reach(self) -> float | None:
        """How far scores are taken to reach, for every head; None if their first pages say."""
        if self.reach is None and self.codes:
            return CODED_REACH * self.margin
        return self.reach

    @property
    def guard_in_force(self) -> float:
        """Times the mean of its neighbours' radii above which a page is judged by its bound; 0 for
        no guard, infinite if only pages without a bound are."""
        return math.inf if self.codes else self.guard

    @property
    def statistics(self) -> tuple[str, ...]:
        return _bounding(self.codes)


Selector = Exact | Gaussian | TopK | Adaptive


def _bounding(codes: bool) -> tuple[str, ...]:
    return CODES if codes else BOX


def _check_first_pages(first_pages: int) -> None:
    if not 2 <= first_pages <= 64:
        raise ValueError(f"first_pages is {first_pages}; expected 2 to 64")


def needs_entmax(selector: Selector) -> bool:
    """Whether it goes by an entmax threshold, which softmax (alpha 1) does not have."""
    if isinstance(selector, Exact):
        return selector.prune
    return isinstance(selector, Gaussian | Adaptive)
