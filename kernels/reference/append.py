"""Writing new tokens into their pages, and keeping the pages' statistics."""

import torch
from torch import Tensor

from ..pages import FP8, PagedCache
from ..report import Counter
from .boxes import box_around
from .codes import codes_of
from .scores import compute_dtype

STD_FLOOR = 1e-6
"""Least standard deviation kept for a channel, as in EntmaxKV."""


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
    if cache.layout.coded:
        codes = codes_of(key, valid)
        cache.scales[touched] = codes.scales
        statistics = codes.packed()
    elif cache.layout.bounded:
        statistics, cache.scales[touched] = box_around(key, valid)
    else:
        count = (last + 1)[:, None, None]
        mean = key.masked_fill(~valid, 0).sum(2) / count
        deviation = (key - mean[:, :, None]).masked_fill_(~valid, 0)
        std = (deviation.square_().sum(2) / count).sqrt_().clamp_min_(STD_FLOOR)
        statistics = torch.stack((mean, std), 2)
    cache.statistics[touched] = statistics.to(cache.statistics.dtype)
