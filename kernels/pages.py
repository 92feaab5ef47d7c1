"""The page: how keys, values and page statistics share one run of memory.

One page holds `page_size` tokens of one KV head as a single contiguous run of elements::

    [key: page_size * head_size][value: page_size * head_size][statistics: n * head_size]

The statistics live in the page they describe, so whatever moves a page (prefix caching,
copy-on-write, offloading, KV transfer) moves them along, and they are planned in the same
memory budget.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS: tuple[tuple[str, ...], ...] = ((), ("mean", "std"), ("minimum", "maximum"))
"""The sets of page statistics that `append` knows how to keep."""


@dataclass(frozen=True)
class PageLayout:
    """What one page of one KV head holds.

    page_size: tokens per page.
    head_size: elements of one key, and of one value.
    statistics: names of the per-channel page statistics, one vector of `head_size` elements
        each: `()`, `("mean", "std")` or `("minimum", "maximum")`.

    Raises ValueError when a size is not positive, when the statistics are not one of the sets
    above, or when a page does not divide into a whole number of elements per token.
    """

    page_size: int
    head_size: int
    statistics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("page_size", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.statistics not in STATISTICS:
            raise ValueError(f"statistics is {self.statistics!r}; expected one of {STATISTICS}")
        if len(self.statistics) * self.head_size % self.page_size:
            raise ValueError(
                f"page_size is {self.page_size}; expected a divisor of the "
                f"{len(self.statistics)} * {self.head_size} statistics elements of a page, so "
                "that a page is a whole number of elements per token"
            )

    @property
    def elements_per_page(self) -> int:
        """Elements of one page of one KV head."""
        return (2 * self.page_size + len(self.statistics)) * self.head_size

    @property
    def elements_per_token(self) -> int:
        """Elements of one page divided by its tokens: what a memory planner has to allow."""
        return self.elements_per_page // self.page_size


class PagedCache(NamedTuple):
    """Views of one layer's pages; they share memory with the tensor that was split.

    key, value: [num_pages, kv_heads, page_size, head_size]
    statistics: [num_pages, kv_heads, len(layout.statistics), head_size]
    """

    key: Tensor
    value: Tensor
    statistics: Tensor
    layout: PageLayout


def split_pages(pages: Tensor, layout: PageLayout) -> PagedCache:
    """View raw pages as keys, values and statistics, without copying.

    pages: [num_pages, kv_heads, page_size, elements_per_token], the last two dimensions
        contiguous (a page is one run of memory), the first two with any stride.

    Raises ValueError when the shape or the strides do not fit the layout.
    """
    expected = (layout.page_size, layout.elements_per_token)
    if pages.dim() != 4 or tuple(pages.shape[2:]) != expected:
        raise ValueError(
            f"pages has shape {tuple(pages.shape)}; expected [num_pages, kv_heads, "
            f"{expected[0]}, {expected[1]}] for {layout}"
        )
    if pages.stride(3) != 1 or pages.stride(2) != layout.elements_per_token:
        raise ValueError(
            f"pages has strides {pages.stride()}; expected its last two dimensions to be "
            f"contiguous, with strides ({layout.elements_per_token}, 1)"
        )

    def part(first: int, vectors: int) -> Tensor:
        return pages.as_strided(
            (*pages.shape[:2], vectors, layout.head_size),
            (*pages.stride()[:2], layout.head_size, 1),
            pages.storage_offset() + first * layout.head_size,
        )

    size = layout.page_size
    return PagedCache(
        key=part(0, size),
        value=part(size, size),
        statistics=part(2 * size, len(layout.statistics)),
        layout=layout,
    )


def allocate_pages(
    num_pages: int,
    kv_heads: int,
    layout: PageLayout,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Zeroed raw pages for use without a serving engine, in the shape `split_pages` takes."""
    shape = (num_pages, kv_heads, layout.page_size, layout.elements_per_token)
    return torch.zeros(shape, dtype=dtype, device=device)
