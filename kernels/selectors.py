"""Page selectors: which pages of the past a decode step reads.

A selector is a plain description; the rule itself lives with the kernels. `statistics` names the
page statistics that the rule reads, which is what the page layout has to hold.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from .pages import BOX


@dataclass(frozen=True)
class Exact:
    """Every page: the entmax output, to rounding."""

    name: ClassVar[str] = "exact"
    statistics: ClassVar[tuple[str, ...]] = ()


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

    The boxes are of 8-bit numbers, lie around the means and hold all keys of their pages. They are
    ranked by how high scores are likely to reach in them, and bound them as well.

    token_budget: tokens to read besides the last page, which is always read; rounded down to
        whole pages. Below one page only the last page is read.
    """

    token_budget: int

    name: ClassVar[str] = "topk"
    statistics: ClassVar[tuple[str, ...]] = BOX

    def __post_init__(self) -> None:
        if self.token_budget < 0:
            raise ValueError(f"token_budget is {self.token_budget}; expected at least 0")


@dataclass(frozen=True)
class Adaptive:
    """The pages that can reach a threshold of true scores; for entmax, by the reference alone.

    The pages that seem best are read first. Of the others those are read that seem to reach above
    the threshold of what was read, a lower bound of the threshold of all keys that rises with each
    round of reading, until there is none. The budget follows from the scores.

    reach: how high the scores of a page are taken to reach above its center, in half-widths of its
        box in the Euclidean norm. More reads more and drops less.
    first_pages: pages that are read first; a later round reads at most as many as were read.
    guard: share of the pages that are read first, too, as those with the highest bounds. An
        isolated key that the estimate misses is likely to be in one of them.
    """

    reach: float = 1.75
    first_pages: int = 16
    guard: float = 1 / 32

    name: ClassVar[str] = "adaptive"
    statistics: ClassVar[tuple[str, ...]] = BOX

    def __post_init__(self) -> None:
        if not 0 < self.reach < math.inf:
            raise ValueError(f"reach is {self.reach}; expected a finite number above 0")
        if self.first_pages < 1:
            raise ValueError(f"first_pages is {self.first_pages}; expected at least 1")
        if not 0 <= self.guard <= 1:
            raise ValueError(f"guard is {self.guard}; expected within [0, 1]")


CompiledSelector = Exact | Gaussian | TopK
"""Those that there are compiled kernels for."""

Selector = CompiledSelector | Adaptive
