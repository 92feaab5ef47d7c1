"""Random appends, each to pages of its own, and what the reference says of the statistics: of means
and deviations in fp64, of boxes in fp32, where they are the same bytes."""

import torch
from fuzz_cases import (
    Draw,
    append_compiled,
    draw_scales,
    on_device,
    poisoned_pages,
    to_stored,
    watched,
)
from fuzz_exact import excess
from fuzz_families import DEVICE, FP32, Family
from torch import Tensor

from entmaxkv_kernels import PagedCache, PageLayout, append, split_pages
from entmaxkv_kernels.reference.codes import unpack


def run_appends(family: Family, draw: Draw, careful: bool) -> dict[str, Tensor]:
    calls, pool, size = family.calls, family.pool, family.page_size
    pages, most = pool * family.width, family.width * size
    scales = draw_scales(draw, family)

    # Some rows of each sequence are there; a call appends one more, or many.
    held = (draw.uniforms(calls, pool) * (most + 1)).long()
    held[draw.uniforms(calls, pool) < 0.3] = 0
    added = (draw.uniforms(calls, pool) * (most - held + 1)).long()
    single = draw.uniforms(calls, 1) < 0.4
    added = torch.where(single, (most - held).clamp_max(1), added)
    skipped = draw.uniforms(calls, pool) < 0.1
    page = draw.uniforms(calls, pages).argsort(1).view(calls, pool, family.width)
    position = torch.arange(most)
    slots = page.repeat_interleave(size, 2) * size + position % size  # [K, M, most]
    slots += torch.arange(calls)[:, None, None] * pages * size
    old = slots[position < held[..., None]]
    new = (position >= held[..., None]) & (position < (held + added)[..., None])
    slots.masked_fill_(skipped[..., None], -1)
    call, slots = on_device(torch.stack((new.nonzero()[:, 0], slots[new])))

    shape = len(slots), 2, family.kv_heads, family.head_size
    magnitude = on_device(10 ** (4 * draw.uniforms(calls) - 2))
    rows = (draw.normal(*shape) * magnitude[call][:, None, None, None]).to(family.dtype)
    key, value = rows.unbind(1)
    raw = poisoned_pages(family, calls * pages)
    exact_layout = PageLayout(size, family.head_size, family.layout.statistics)
    exact_shape = *raw.shape[:3], exact_layout.elements_per_token
    exact_dtype = FP32 if exact_layout.bounded else torch.float64
    exact = torch.full(exact_shape, torch.nan, dtype=exact_dtype, device=DEVICE)
    cache, expected = split_pages(raw, family.layout), split_pages(exact, exact_layout)
    old = on_device(old)
    for stored, wanted in zip(cache[:2], expected[:2], strict=True):
        before = draw.normal(len(old), family.kv_heads, family.head_size).to(family.cache_dtype)
        stored[old // size, :, old % size] = before
        wanted[old // size, :, old % size] = before.to(exact_dtype)

    ends = new.sum((1, 2)).cumsum(0).tolist()
    for k in watched(calls, careful):
        tokens = slice(ends[k - 1] if k else 0, ends[k])
        own = slots[tokens] - k * pages * size
        own = own.where(slots[tokens] >= 0, -1)
        own_pages = split_pages(raw[k * pages : (k + 1) * pages], family.layout)
        append_compiled(own_pages, key[tokens], value[tokens], own, scales)

    append(
        expected,
        to_stored(key, scales[0], family.cache_dtype).to(exact_dtype),
        to_stored(value, scales[1], family.cache_dtype).to(exact_dtype),
        slots,
    )
    other = holds_other(cache.key, expected.key) | holds_other(cache.value, expected.value)
    error = torch.zeros(calls, dtype=torch.float64, device=DEVICE)
    if family.layout.statistics:
        error = statistics_error(cache, expected).view(calls, -1).amax(1)
    return {"error": error, "the pages hold something else": other.view(calls, -1).any(1)}


def code_numbers(cache: PagedCache) -> Tensor:
    """What codes say, [pages, kv_heads, ...]; 0 where nothing was written."""
    size = cache.layout.page_size
    codes = unpack(cache.statistics, cache.scales.nan_to_num(0), size, torch.float64)
    step = codes.units * codes.scales[..., 1:2]
    numbers = codes.center * codes.scales[..., :1], (codes.levels - 1.5) * step[..., None]
    return torch.cat((numbers[0], numbers[1].flatten(-2), codes.scales), -1)


def holds_other(pages: Tensor, expected: Tensor) -> Tensor:
    """[pages] whether a number differs; NaN stands where nothing was written."""
    pages = pages.double()
    return ((pages != expected) & ~(pages.isnan() & expected.isnan())).flatten(1).any(1)


def statistics_error(cache: PagedCache, expected: PagedCache) -> Tensor:
    """[pages] the largest error over what fp32 sums and the dtype explain; boxes and codes are
    exact."""
    if cache.layout.coded:
        numbers, wanted = (code_numbers(x) for x in (cache, expected))
        return excess(numbers, wanted, torch.zeros_like(wanted))
    page = torch.arange(len(cache.key), device=cache.key.device)
    statistics, exact = (x.read_statistics(page, torch.float64) for x in (cache, expected))
    unwritten = statistics.isnan() & exact.isnan()
    statistics, exact = (x.masked_fill(unwritten, 0) for x in (statistics, exact))
    bound = torch.zeros_like(exact)
    if cache.layout.statistics == ("mean", "std"):
        own = torch.finfo(cache.statistics.dtype)
        largest = expected.key.nan_to_num(0).abs().amax((2, 3))[..., None, None]
        bound = own.eps * (exact.abs() + own.tiny)
        bound += 16 * torch.finfo(torch.float32).eps * largest
    return excess(statistics, exact, bound)
