"""Writing new tokens into their pages, and keeping the pages' statistics."""

import torch
from torch import Tensor

from ..pages import FP8, PagedCache
from ..report import Counter
from .scores import compute_dtype

STD_FLOOR = 1e-6
"""Least standard deviation kept for a channel, as in EntmaxKV."""

LARGEST = 2.0**126
"""Keys beyond it, as infinite ones are, count as this in a box: its arithmetic stays finite."""

SMALLEST = 2.0**-100
"""Keys far below it count as 0 in a mean, whose factors are normal numbers then."""

WIDENED = 1 + 2.0**-20
"""A half-width is made so much wider, more than fp32 rounding can make it too narrow."""

SQUARE_STEPS = 2.0**14
"""Parts of 1, in which squares are added up, so that the sum is exact in whatever order."""

MOST_STEPS = 2.0**24
"""Up to which it is, in fp32; keys of more steps, as infinite ones, are not within their box."""

RADIUS_WIDENED = 1 + 2.0**-8
"""A radius is made so much larger, twice as much as squares rounded to bf16 can make the norm that
it is multiplied by too small."""


def append(
    cache: PagedCache,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    counters: Tensor | None = None,
) -> None:
    """See `entmaxkv_kernels.append`."""
    written = slot_mapping >= 0
    if not written.all():
        slot_mapping, key, value = slot_mapping[written], key[written], value[written]
    page_size = cache.layout.page_size
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    if cache.key.dtype == FP8:
        key, value = _to_fp8(key, key_scale), _to_fp8(value, value_scale)
    cache.key[page, :, offset] = key
    cache.value[page, :, offset] = value
    if counters is not None:
        counters[Counter.APPENDED_PAGES] += len(page.unique()) * cache.key.shape[1]
    if cache.layout.statistics:
        _refresh_statistics(cache, page, offset)


def _to_fp8(x: Tensor, scale: float) -> Tensor:
    """x / scale, saturated and rounded; NaN stays NaN."""
    # By a tensor, because a GPU divides by a number as it multiplies by its rounded reciprocal.
    quotient = x.float() / torch.tensor(scale, dtype=torch.float32, device=x.device)
    limit = torch.finfo(FP8).max
    return quotient.clamp_(-limit, limit).to(FP8)


def _refresh_statistics(cache: PagedCache, page: Tensor, offset: Tensor) -> None:
    """Recompute the statistics of every touched page from the page's own rows.

    Pages are reused without being cleared, so rows after the last written one belong to a
    previous owner. A sequence fills its pages in order: the last offset written is the page's
    last valid row.
    """
    touched, position = page.unique(return_inverse=True)
    last = torch.zeros_like(touched).scatter_reduce_(0, position, offset, "amax")
    rows = torch.arange(cache.layout.page_size, device=page.device)
    valid = (rows <= last[:, None])[:, None, :, None]  # [pages, 1, page_size, 1]
    key = cache.key[touched]  # [pages, kv_heads, page_size, head_size]
    key = key.to(compute_dtype(key.dtype))
    if cache.layout.boxed:
        statistics, cache.scales[touched] = box_around(key, valid)
    else:
        count = (last + 1)[:, None, None]
        mean = key.masked_fill(~valid, 0).sum(2) / count
        deviation = (key - mean[:, :, None]).masked_fill_(~valid, 0)
        std = (deviation.square_().sum(2) / count).sqrt_().clamp_min_(STD_FLOOR)
        statistics = torch.stack((mean, std), 2)
    cache.statistics[touched] = statistics.to(cache.statistics.dtype)


def box_around(key: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of 8-bit numbers around the means of keys [..., rows, head_size] that hold them.

    valid: [..., rows, 1] bool, the keys that count; a NaN counts as 0 in a mean, and nowhere else.

    Returns centers and half-widths, integers [..., 2, head_size], and the scales of both and the
    radius, fp32 [..., 3]. Every key lies within half-width times scale of center times scale,
    exactly. A channel without a number has the box that holds 0 alone.
    """
    given, counted = key, valid
    count = valid.sum(-2).to(key.dtype)
    valid = valid & ~key.isnan()
    key = key.clamp(-LARGEST, LARGEST)
    low = key.masked_fill(~valid, torch.inf).amin(-2)
    high = key.masked_fill(~valid, -torch.inf).amax(-2)
    mean = _mean(key.masked_fill(~valid, 0), count, torch.maximum(low.abs(), high.abs()))
    center_scale = _scale_of(mean)
    center = (mean / center_scale + 0.5).floor()
    middle = center * center_scale
    reach = torch.maximum(high - middle, middle - low).clamp_min(0) * WIDENED
    half_scale = _scale_of(reach)
    # A small quotient may vanish.
    half_width = torch.maximum((reach / half_scale).ceil(), (reach > 0).to(reach.dtype))
    radius = _radius(given, counted, middle, half_width * half_scale)
    scales = torch.cat((center_scale, half_scale, radius), -1).float()
    return torch.stack((center, half_width), -2), scales


def _radius(key: Tensor, valid: Tensor, center: Tensor, half_width: Tensor) -> Tensor:
    """How far the valid keys [..., rows, head_size] lie off the center [..., head_size] at most,
    [..., 1], in half-widths, as a Euclidean norm; infinite if one of them is not finite.

    Rounded up, and by RADIUS_WIDENED.
    """
    # Where a half-width is 0, keys that are numbers are at the center.
    narrow = 1 / torch.where(half_width > 0, half_width, 1)
    away = (key - center[..., None, :]) * narrow[..., None, :]
    steps = (away * away * SQUARE_STEPS).ceil().sum(-1)
    steps = torch.where(steps <= MOST_STEPS, steps, torch.inf)
    furthest = steps.masked_fill(~valid[..., 0], 0).amax(-1, keepdim=True)
    # A CPU's roots in fp32 are not always the nearest numbers, which those of compiled kernels are.
    return furthest.double().sqrt().to(key.dtype) * (RADIUS_WIDENED * SQUARE_STEPS**-0.5)


def _mean(key: Tensor, count: Tensor, largest: Tensor) -> Tensor:
    """Mean [..., head_size] of count of the keys [..., rows, head_size], to 16 bits of the largest;
    the others are 0.

    They are rounded to whole numbers of at most 2 ** 16 first, so that the sum of up to 2 ** 8 of
    them is exact in fp32, in whatever order they are added up.
    """
    exponent = largest.clamp(SMALLEST, LARGEST).float().view(torch.int32) >> 23
    # Powers of two, by their bits: what the keys are multiplied by, and its reciprocal.
    more, less = (
        (x << 23).view(torch.float32).to(key.dtype) for x in (269 - exponent, exponent - 15)
    )
    total = (key * more[..., None, :] + 0.5).floor().sum(-2)
    return total * (1 / count) * less


def _scale_of(x: Tensor) -> Tensor:
    """What x [..., head_size] is to be divided by for all to be within 127, [..., 1].

    It is above the least such number, has 17 significant bits, so that its products with 8-bit
    integers are exact in fp32, and is never 0.
    """
    least = (x.abs().amax(-1, keepdim=True) * (1 / 127)).float()
    return ((least.view(torch.int32) + 0x100) & -0x80).view(torch.float32).to(x.dtype)
