"""What a group of random cases is given: sequences in a paged cache, and the calls on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from fuzz_families import DEVICE, FP8, FP32, Family
from torch import Tensor

from entmaxkv_kernels import PagedCache, Selector, append, split_pages

T = TypeVar("T")


class Refused(Exception):
    """The compiled append does not take the cache of a family."""


class Draw:
    """Random numbers of one group, from its seed alone."""

    def __init__(self, seed: int) -> None:
        self.host = torch.Generator().manual_seed(seed)
        self.device = torch.Generator(DEVICE).manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.host))

    def choice(self, *options: T) -> T:
        return options[self.integer(0, len(options) - 1)]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.host))

    def uniforms(self, *shape: int) -> Tensor:
        """In [0, 1), on the host."""
        return torch.rand(shape, generator=self.host)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.device, device=DEVICE)


@dataclass
class Pool:
    """Sequences in a cache in which everything that is not theirs is NaN.

    block_table: [M, width] int32; entries past the last page name one that belongs to nobody.
    key, value: [M, N, kv_heads, head_size] as stored, 0 past each sequence.
    key_scale, value_scale: what stored numbers are multiplied by.
    lead: [M, kv_heads, head_size], the query that the keys were made for.
    structured: [M] bool on the host, whether they were.
    shortness: [M] on the host, what the keys were divided by.
    slopes: [query_heads] of all calls.
    """

    cache: PagedCache
    block_table: Tensor
    lens: list[int]
    key: Tensor
    value: Tensor
    key_scale: float
    value_scale: float
    lead: Tensor
    structured: Tensor
    shortness: Tensor
    slopes: Tensor | None


def on_device(host: Tensor) -> Tensor:
    return host.to(DEVICE)


def poisoned_pages(family: Family, pages: int) -> Tensor:
    """Raw pages full of NaN, and -1 where read as integers."""
    elements = family.layout.elements_per_token * family.cache_dtype.itemsize
    shape = pages, family.kv_heads, family.page_size, elements
    return torch.full(shape, 255, dtype=torch.uint8, device=DEVICE).view(family.cache_dtype)


def to_stored(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a cache of that dtype holds of x."""
    if dtype != FP8:
        return x.to(dtype)
    # By a tensor, because a GPU divides by a number as it multiplies by its rounded reciprocal.
    quotient = x.float() / torch.tensor(scale, dtype=FP32, device=x.device)
    return quotient.clamp(-torch.finfo(FP8).max, torch.finfo(FP8).max).to(FP8)


def append_compiled(
    cache: PagedCache, key: Tensor, value: Tensor, slots: Tensor, scales: tuple[float, float]
) -> None:
    try:
        append(
            cache,
            key,
            value,
            slots,
            key_scale=scales[0],
            value_scale=scales[1],
            implementation="triton",
        )
    except ValueError as error:
        if cache.layout.fp8 and "cache.layout.statistics" in str(error):
            raise Refused(str(error)) from error
        raise


def draw_scales(draw: Draw, family: Family) -> tuple[float, float]:
    if not family.fp8:
        return 1.0, 1.0
    return 10 ** draw.uniform(-2, 0.5), 10 ** draw.uniform(-2.5, 0)


def draw_lengths(draw: Draw, family: Family) -> list[int]:
    size, most = family.page_size, family.width * family.page_size
    chosen = []
    for _ in range(family.pool):
        if family.width > 1000 and draw.uniform(0, 1) < 0.7:
            chosen.append(draw.integer(most * 3 // 4, most))
        else:
            edge = int(draw.choice(0, 1, size - 1, size, size + 1, 2 * size, -1, -1, -1, -1))
            chosen.append(edge if edge >= 0 else draw.integer(2, min(most, 600)))
    return chosen


def draw_keys(draw: Draw, lead: Tensor, n: int) -> tuple[Tensor, bool]:
    """Keys [n, kv_heads, head_size] of one of several structures along lead [kv_heads, head_size],
    and whether there is one."""
    kv_heads, head_size = lead.shape
    structure = draw.choice("normal", "normal", "equal", "clusters", "needle", "heavy", "comb")
    key = draw.normal(n, kv_heads, head_size)
    if structure == "normal" or n < 2:
        return key, False
    # With this query and the scale head_size ** -0.5 the scores are those that are asked for.
    along = lead * head_size**0.5 / lead.square().sum(-1, keepdim=True)
    score = torch.zeros(n, 1, 1, device=DEVICE)
    if structure == "equal":
        return key[:1].expand_as(key), True
    if structure == "needle":
        key[draw.integer(0, n - 1)] += along * draw.uniform(2, 40)
        return key, True
    if structure == "heavy":
        return along * torch.exp(draw.normal(n, 1, 1) * draw.uniform(0.5, 3)), True
    if structure == "clusters":
        score[:: draw.integer(2, 9)] = 10 ** draw.uniform(-4, 0.5)
        score[draw.integer(0, n - 1)] += draw.uniform(0, 3)
    else:
        # High at evenly spaced positions, where a sample may be taken, and nowhere else.
        taken = torch.arange(2048, device=DEVICE) * (n - 1) // 2047
        score[taken] = 1.8 + 0.2 * torch.rand(2048, 1, 1, generator=draw.device, device=DEVICE)
    return along * score, True


def make_pool(family: Family, draw: Draw) -> Pool:
    lens = draw_lengths(draw, family)
    size, most = family.page_size, max(1, *lens)
    lead = draw.normal(family.pool, family.kv_heads, family.head_size)
    shortness = 10 ** (3 * draw.uniforms(family.pool) - 1.5)
    key = torch.zeros(family.pool, most, family.kv_heads, family.head_size, device=DEVICE)
    structured = torch.zeros(family.pool, dtype=torch.bool)
    for b, n in enumerate(lens):
        keys, structured[b] = draw_keys(draw, lead[b], n)
        key[b, :n] = keys / float(shortness[b])
    value = draw.normal(*key.shape)
    position = torch.arange(most)
    inside = position < torch.tensor(lens)[:, None]
    # Short keys of heavy scores can leave the range of fp16.
    limit = min(1e6, torch.finfo(family.dtype).max / 4)
    mask = on_device(inside)[..., None, None]
    key, value = (
        x.masked_fill_(~mask, 0).clamp_(-limit, limit).to(family.dtype) for x in (key, value)
    )
    pages = family.pool * family.width + 1
    cache = split_pages(poisoned_pages(family, pages), family.layout)
    table = torch.randperm(pages - 1, generator=draw.host).view(family.pool, family.width)
    slots = table.repeat_interleave(size, 1)[:, :most] * size + position % size
    index, slots = on_device(torch.stack((inside.flatten().nonzero()[:, 0], slots[inside])))
    rows = key.flatten(0, 1)[index], value.flatten(0, 1)[index]
    scales = draw_scales(draw, family)
    append_compiled(cache, *rows, slots, scales)
    held = (torch.tensor(lens) + size - 1) // size
    table[torch.arange(family.width) >= held[:, None]] = pages - 1
    key, value = (
        to_stored(x, scale, family.cache_dtype)
        for x, scale in zip((key, value), scales, strict=True)
    )
    check_rows(cache.key, slots, key.flatten(0, 1)[index])
    check_rows(cache.value, slots, value.flatten(0, 1)[index])
    block_table = on_device(table.int())
    slopes = draw.normal(family.query_heads).abs() * 0.1 if family.alibi else None
    return Pool(cache, block_table, lens, key, value, *scales, lead, structured, shortness, slopes)


def check_rows(pages: Tensor, slots: Tensor, rows: Tensor) -> None:
    """The pages hold what was appended."""
    size = pages.shape[2]
    held = pages[slots // size, :, slots % size]
    if not torch.equal(held.view(torch.uint8), rows.view(torch.uint8)):
        raise AssertionError("append wrote something else")


@dataclass
class Asked:
    """The queries of all calls of a group, call after call.

    query: [T, query_heads, head_size].
    call, sequence, position, place: [T] the call, the sequence of the pool, where in it the query
        stands (-1 before an empty one), and which of the queries of that sequence it is.
    scale: [T] fp64. window: [T].
    counts: queries of each sequence.
    """

    query: Tensor
    call: Tensor
    sequence: Tensor
    position: Tensor
    place: Tensor
    scale: Tensor
    window: Tensor | None
    counts: list[int]


@dataclass
class Call:
    """The arguments of one call, but for the cache.

    tokens: its part of the queries of the group.
    starts: query_start_loc of a prefill.
    """

    tokens: slice
    block_table: Tensor
    seq_lens: Tensor
    starts: Tensor
    scale: float
    window: int | None
    selector: Selector
    exact_rows: Tensor | None
    exact_below: int


def watched(calls: int, careful: bool) -> Iterator[int]:
    """The indices of the calls; careful: wait for each, so that what breaks the device is known."""
    for k in range(calls):
        yield k
        if careful and DEVICE == "cuda":
            torch.cuda.synchronize()
            print(f"call {k} ended", flush=True)


def aligned(rows: Tensor) -> Tensor:
    """The rows [K, n] of a host tensor on the device, each at a multiple of 16 elements."""
    padded = torch.zeros(len(rows), -(-rows.shape[1] // 16) * 16, dtype=rows.dtype)
    padded[:, : rows.shape[1]] = rows
    return on_device(padded)[:, : rows.shape[1]]


def draw_window(draw: Draw) -> int:
    return 16 * draw.integer(1, 20) if draw.uniform(0, 1) < 0.5 else 2 * draw.integer(1, 150) + 1


def draw_calls(family: Family, pool: Pool, draw: Draw) -> tuple[Asked, list[Call]]:
    calls, batch = family.calls, family.batch
    sequence = torch.randint(family.pool, (calls, batch), generator=draw.host)
    n = torch.tensor(pool.lens)[sequence]
    chunk = torch.ones_like(n)
    if family.kind == "prefill":
        chunk = (draw.uniforms(calls, batch) * (n.clamp_max(family.chunk) + 1)).long()
    starts = torch.cat((torch.zeros(calls, 1, dtype=torch.long), chunk.cumsum(1)), 1)

    row = torch.arange(calls * batch).repeat_interleave(chunk.flatten())
    first = (chunk.flatten().cumsum(0) - chunk.flatten())[row]
    position = (n - chunk).flatten()[row] + torch.arange(len(row)) - first
    of_token = sequence.flatten()[row]
    order, counts = of_token.argsort(stable=True), of_token.bincount(minlength=family.pool)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(row)) - (counts.cumsum(0) - counts)[of_token[order]]

    # The spread of the scores of normal keys; structured ones mostly keep the scores they have.
    spread = 10 ** (4.7 * draw.uniforms(calls, batch) - 3)
    kept = pool.structured[sequence] & (draw.uniforms(calls, batch) < 0.7)
    spread = torch.where(kept, 10 ** (0.6 * draw.uniforms(calls, batch) - 0.3), spread)
    scale = family.head_size**-0.5 * 10 ** (2 * draw.uniforms(calls, 1).double() - 1)
    length = spread * pool.shortness[sequence] * family.head_size**-0.5 / scale
    leads = draw.uniforms(calls, batch) < 0.8

    indices = torch.stack((row // batch, of_token, position, place))
    call, of_token, position, place = on_device(indices)
    numbers = torch.stack((scale.expand(-1, batch), length, leads)).flatten(1)[:, row]
    of_scale, of_length, of_lead = on_device(numbers)
    query = draw.normal(len(row), family.query_heads, family.head_size)
    leading = query.view(len(row), family.kv_heads, family.group, family.head_size)
    leading = leading[:, :, draw.integer(0, family.group - 1)]
    leading.lerp_(pool.lead[of_token], of_lead.float()[:, None, None])
    limit = torch.finfo(family.dtype).max / 4
    query = (query * of_length.float()[:, None, None]).clamp_(-limit, limit).to(family.dtype)

    windows = [draw_window(draw) if family.window else None for _ in range(calls)]
    of_window = on_device(torch.tensor(windows))[call] if family.window else None
    asked = Asked(query, call, of_token, position, place, of_scale, of_window, counts.tolist())
    tables = pool.block_table[on_device(sequence)]
    seq_lens, exact = aligned(n.int()), aligned(draw.uniforms(calls, batch) < 0.3)
    query_starts = aligned(starts.int())
    ends = chunk.sum(1).cumsum(0).tolist()
    listed = []
    for k in range(calls):
        selector = draw.choice(*family.selectors)
        sparse = bool(selector.statistics)
        listed.append(
            Call(
                slice(ends[k - 1] if k else 0, ends[k]),
                tables[k],
                seq_lens[k],
                query_starts[k],
                float(scale[k]),
                windows[k],
                selector,
                exact[k] if sparse and draw.uniform(0, 1) < 0.5 else None,
                96 if sparse and draw.uniform(0, 1) < 0.3 else 0,
            )
        )
    return asked, listed
