"""The page: how keys, values and page statistics share one run of memory.

One page holds `page_size` tokens of one KV head as a single contiguous run of elements::

    [key: page_size * head_size][value: page_size * head_size][statistics]

Means and deviations are of the dtype of the keys; those of fp8 pages are bf16, which take two
elements each: fp8 would leave little of them. A box around the keys is of 8-bit numbers, 2 *
head_size bytes, with a scale for its centers, one for its half-widths and a radius, fp32, in the
last 12 bytes of the page. The radius is how far keys lie off the center at most, in half-widths, as
a Euclidean norm over the channels. Codes are a center of 8-bit numbers, two bits of each channel of
each key and 8 bits of each key's step, with the same three numbers at the end of the page;
`reference/codes.py` says what they are.

The statistics live in the page they describe, so whatever moves a page (prefix caching,
copy-on-write, offloading, KV transfer) moves them along, and they are planned in the same
memory budget.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BOX = ("center", "half_width")
"""The statistics that bound the keys of a page in each channel."""

CODES = ("center", "codes")
"""Those that tell the keys of a page apart, and bound them as well."""

STATISTICS: tuple[tuple[str, ...], ...] = ((), ("mean", "std"), BOX, CODES)
"""The sets of page statistics that `append` knows how to keep."""

SCALES = 3
"""Numbers of fp32 that go with a box, or with codes."""

BOUNDED_ALIGNMENT = 128
"""Bytes that a page with a box or codes is a multiple of: a cache line of a GPU. Where pages start
inside one, reading all keys of a long context takes longer."""

CODED_HEAD_SIZES = range(64, 257, 4)
"""Head sizes whose keys have codes."""

FP8 = torch.float8_e4m3fn
"""The dtype of fp8 pages."""

FP8_STATISTICS = torch.bfloat16
"""The dtype of their statistics."""


@dataclass(frozen=True)
class PageLayout:
    """What one page of one KV head holds.

    page_size: tokens per page.
    head_size: elements of one key, and of one value.
    statistics: names of the page statistics: `()`, `("mean", "std")` or `("center", "half_width")`,
        each a vector of `head_size` numbers, or `("center", "codes")`.
    fp8: whether keys and values are torch.float8_e4m3fn, and means and deviations bf16.

    Raises ValueError when a size is not positive, when the statistics are not one of the sets
    above, when the head size is none of CODED_HEAD_SIZES and there are codes, or when a page with
    means and deviations does not divide into a whole number of elements per token; with boxes or
    codes it is padded.
    """

    page_size: int
    head_size: int
    statistics: tuple[str, ...] = ()
    fp8: bool = False

    def __post_init__(self) -> None:
        for name in ("page_size", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.statistics not in STATISTICS:
            raise ValueError(f"statistics is {self.statistics!r}; expected one of {STATISTICS}")
        if self.coded and self.head_size not in CODED_HEAD_SIZES:
            raise ValueError(
                f"head_size is {self.head_size}; expected a multiple of 4 from "
                f"{CODED_HEAD_SIZES[0]} to {CODED_HEAD_SIZES[-1]} for codes of keys"
            )
        vectors = len(self.statistics) * self.statistics_width
        if not self.bounded and vectors * self.head_size % self.page_size:
            raise ValueError(
                f"page_size is {self.page_size}; expected a divisor of the "
                f"{vectors} * {self.head_size} statistics elements of a page, so "
                "that a page is a whole number of elements per token"
            )

    @property
    def coded(self) -> bool:
        """Whether keys have codes."""
        return self.statistics == CODES

    @property
    def bounded(self) -> bool:
        """Whether the statistics bound the keys: 8-bit numbers with scales."""
        return self.statistics in (BOX, CODES)

    @property
    def bounding_bytes(self) -> int:
        """Bytes of a box, or of the center, the codes and the steps; without their scales."""
        if self.coded:
            return self.head_size + self.page_size * (self.head_size // 4 + 1)
        return 2 * self.head_size

    @property
    def statistics_width(self) -> int:
        """Elements of the page that one mean or deviation takes."""
        return FP8_STATISTICS.itemsize // FP8.itemsize if self.fp8 else 1

    @property
    def elements_per_page(self) -> int:
        """Elements of one page of one KV head.

        A box or codes have room in elements of 2 bytes, or of 1 in fp8 pages; wider ones leave more
        unused.
        """
        if self.bounded:
            width = 1 if self.fp8 else 2
            size = 2 * self.page_size * self.head_size * width + self.bounding_bytes
            size += SCALES * torch.float32.itemsize
            step = math.lcm(BOUNDED_ALIGNMENT, self.page_size * width)
            return -(-size // step) * step // width
        vectors = 2 * self.page_size + len(self.statistics) * self.statistics_width
        return vectors * self.head_size

    @property
    def elements_per_token(self) -> int:
        """Elements of one page divided by its tokens: what a memory planner has to allow."""
        return self.elements_per_page // self.page_size


class PagedCache(NamedTuple):
    """Views of one layer's pages; they share memory with the tensor that was split.

    key, value: [num_pages, kv_heads, page_size, head_size]
    statistics: [num_pages, kv_heads, len(layout.statistics), head_size], of the same dtype; bf16
        where that is fp8; int8 for boxes; for codes [num_pages, kv_heads, 1,
        layout.bounding_bytes] int8
    scales: [num_pages, kv_heads, 3] fp32, of centers and half-widths or steps, and the radius; for
        other statistics [num_pages, kv_heads, 0]
    """

    key: Tensor
    value: Tensor
    statistics: Tensor
    scales: Tensor
    layout: PageLayout

    def read_statistics(self, page: Tensor, dtype: torch.dtype) -> Tensor:
        """The statistics of pages [...] as numbers, [..., kv_heads, len(layout.statistics),
        head_size]; codes are read by `unpack`."""
        assert not self.layout.coded
        statistics = self.statistics[page].to(dtype)
        if self.layout.bounded:
            statistics *= self.scales[page][..., :2, None].to(dtype)
        return statistics


class NewTokens(NamedTuple):
    """The newest token of every sequence of a batch, each in a page of its own.

    key, value: [B, kv_heads, head_size], of the cache's dtype, or 16 or 32 bits for an fp8 cache
    slot_mapping: [B] int64, page * page_size + offset, where the sequence's block table has its
        last token; negative for a sequence without a new token
    """

    key: Tensor
    value: Tensor
    slot_mapping: Tensor


def split_pages(pages: Tensor, layout: PageLayout) -> PagedCache:
    """View raw pages as keys, values and statistics, without copying.

    pages: [num_pages, kv_heads, page_size, elements_per_token], the last two dimensions
        contiguous (a page is one run of memory), the first two with any stride;
        torch.float8_e4m3fn if the layout is fp8, else of any other dtype.

    Raises TypeError when the dtype does not fit the layout, ValueError when the shape or the
    strides do not.
    """
    _check_dtype(pages.dtype, layout)
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

    place = (pages.storage_offset(), *pages.stride()[:2])
    widest = torch.float32 if layout.bounded else FP8_STATISTICS if layout.fp8 else pages.dtype
    width = -(-widest.itemsize // pages.itemsize)
    if any(distance % width for distance in place):
        raise ValueError(
            f"pages has storage offset {place[0]} and strides {place[1:]} between pages and heads; "
            f"expected multiples of {width}, as statistics are {widest}"
        )

    def part(whole: Tensor, first: int, rows: int, columns: int) -> Tensor:
        return whole.as_strided(
            (*whole.shape[:2], rows, columns),
            (*whole.stride()[:2], columns, 1),
            whole.storage_offset() + first,
        )

    size, head_size, count = layout.page_size, layout.head_size, len(layout.statistics)
    end = 2 * size * head_size
    if layout.bounded:
        whole, vectors = pages.view(torch.int8), 1 if layout.coded else count
        columns = layout.bounding_bytes // vectors
        statistics = part(whole, end * pages.itemsize, vectors, columns)
        width = SCALES * torch.float32.itemsize
        last = layout.elements_per_page * pages.itemsize - width
        scales = part(whole, last, 1, width).view(torch.float32)[:, :, 0]
    else:
        statistics = part(pages, end, count, layout.statistics_width * head_size)
        statistics = statistics.view(FP8_STATISTICS) if layout.fp8 else statistics
        scales = pages.new_empty((*pages.shape[:2], 0), dtype=torch.float32)
    return PagedCache(
        key=part(pages, 0, size, head_size),
        value=part(pages, size * head_size, size, head_size),
        statistics=statistics,
        scales=scales,
        layout=layout,
    )


def allocate_pages(
    num_pages: int,
    kv_heads: int,
    layout: PageLayout,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Zeroed raw pages for use without a serving engine, in the shape `split_pages` takes.

    dtype: by default torch.float8_e4m3fn if the layout is fp8, else fp32.

    Raises TypeError when the dtype does not fit the layout.
    """
    if dtype is None:
        dtype = FP8 if layout.fp8 else torch.float32
    _check_dtype(dtype, layout)
    shape = (num_pages, kv_heads, layout.page_size, layout.elements_per_token)
    return torch.zeros(shape, dtype=dtype, device=device)


def _check_dtype(dtype: torch.dtype, layout: PageLayout) -> None:
    if (dtype == FP8) != layout.fp8:
        expected = FP8 if layout.fp8 else f"a layout with fp8=True for {FP8}"
        raise TypeError(f"pages has dtype {dtype}; expected {expected}")
