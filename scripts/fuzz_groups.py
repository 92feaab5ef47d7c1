"""Groups of random cases: calls of the kernels on the same pages, and what fp64 makes of them."""

import zlib
from typing import Any

import torch
from fuzz_append import run_appends
from fuzz_cases import (
    Asked,
    Call,
    Draw,
    Pool,
    draw_calls,
    make_pool,
    on_device,
    watched,
)
from fuzz_exact import attention, excess
from fuzz_families import DEVICE, FAMILIES, Family
from torch import Tensor

from entmaxkv_kernels import (
    Counter,
    Exact,
    NewTokens,
    PagedCache,
    TopK,
    decode,
    prefill,
)
from entmaxkv_kernels.reference.select import select_pages
from entmaxkv_kernels.triton import prefill_workspace_size
from entmaxkv_kernels.triton.decode import step_shape
from entmaxkv_kernels.triton.pages import NEVER

NUMBERS = ("error", "fallback", "pages_differ")
"""What a case can tell: the largest error over what is allowed, whether keys were read once more,
and the share of rows and KV heads with other pages than the reference chooses. Anything else is the
name of a problem, and whether it came up."""


def run_group(name: str, index: int, careful: bool = False) -> list[dict[str, float]]:
    """What the cases index * calls to (index + 1) * calls of a family tell."""
    family, draw = FAMILIES[name], Draw(zlib.crc32(f"{name} {index}".encode()))
    if family.kind == "append":
        told = run_appends(family, draw, careful)
    else:
        pool = make_pool(family, draw)
        asked, calls = draw_calls(family, pool, draw)
        run = run_prefills if family.kind == "prefill" else run_decodes
        told = run(family, pool, asked, calls, draw, careful)
    # The one time that the host waits for the device.
    rows = torch.stack([x.double() for x in told.values()], 1).tolist()
    return [dict(zip(told, row, strict=True)) for row in rows]


def of_calls(calls: int, call: Tensor, values: Tensor) -> Tensor:
    """The largest of the values [T] of each call, [K]."""
    largest = torch.zeros(calls, dtype=torch.float64, device=DEVICE)
    return largest.scatter_reduce_(0, call, values.double(), "amax")


def options_of(family: Family, pool: Pool, call: Call) -> dict[str, Any]:
    return {
        "scale": call.scale,
        "alpha": family.alphas,
        "alibi_slopes": pool.slopes,
        "sliding_window": call.window,
        "key_scale": pool.key_scale,
        "value_scale": pool.value_scale,
        "implementation": "triton",
    }


def run_prefills(
    family: Family, pool: Pool, asked: Asked, calls: list[Call], draw: Draw, careful: bool
) -> dict[str, Tensor]:
    size = prefill_workspace_size(
        family.query_heads,
        family.kv_heads,
        family.head_size,
        family.dtype,
        family.width * family.page_size,
        device=DEVICE,
    )
    workspaces = torch.full((len(calls), size), 255, dtype=torch.uint8, device=DEVICE)
    out = torch.full_like(asked.query, torch.nan)
    again = torch.zeros(len(calls), dtype=torch.bool, device=DEVICE)
    for k in watched(len(calls), careful):
        call = calls[k]
        # Fewer programs than could run take turns.
        used = size if draw.uniform(0, 1) < 0.7 else draw.integer(size // 2, size)

        def step(into: Tensor, call: Call = call, k: int = k, used: int = used) -> Tensor:
            return prefill(
                asked.query[call.tokens],
                pool.cache,
                call.block_table,
                call.seq_lens,
                call.starts,
                **options_of(family, pool, call),
                out=into,
                workspace=workspaces[k, :used],
            )

        step(out[call.tokens])
        if draw.uniform(0, 1) < 0.01:
            again[k] = differ(out[call.tokens], step(torch.full_like(out[call.tokens], torch.nan)))
    error = of_calls(len(calls), asked.call, excess(out, *attention(family, pool, asked)))
    return {"error": error, "two runs differ": again}


def differ(one: Tensor, other: Tensor) -> Tensor:
    return (one.view(torch.uint8) != other.view(torch.uint8)).any()


def newest_tokens(family: Family, pool: Pool, asked: Asked, call: Call) -> NewTokens:
    """Of the sequences of a call their last tokens, which the pages hold already."""
    last = call.seq_lens.long() - 1
    held, size = last.clamp(min=0), family.page_size
    page = call.block_table.gather(1, held[:, None] // size)[:, 0].long()
    slots = torch.where(last < 0, -1, page * size + held % size)
    place = asked.sequence[call.tokens], held
    return NewTokens(pool.key[place], pool.value[place], slots)


def forget(cache: PagedCache, new_tokens: NewTokens) -> None:
    """Make what appending writes NaN, and -1 where it is an integer."""
    page, row = new_tokens.slot_mapping // cache.layout.page_size, new_tokens.slot_mapping
    row = row.remainder(cache.layout.page_size)
    # Sequences without a token do so to the last page, which is poison already.
    for rows in (cache.key, cache.value):
        rows[page, :, row] = torch.nan
    for statistics in (cache.statistics, cache.scales):
        statistics[page] = torch.nan if statistics.is_floating_point() else -1


def appended_wrongly(cache: PagedCache, new_tokens: NewTokens) -> Tensor:
    """Whether the pages hold other keys or values than the new ones, []."""
    size, there = cache.layout.page_size, new_tokens.slot_mapping >= 0
    page, row = new_tokens.slot_mapping // size, new_tokens.slot_mapping.remainder(size)
    pairs = (cache.key, new_tokens.key), (cache.value, new_tokens.value)
    wrong = [rows[page, :, row].view(torch.uint8) != new.view(torch.uint8) for rows, new in pairs]
    return ((wrong[0] | wrong[1]).flatten(1).any(1) & there).any()


def run_decodes(
    family: Family, pool: Pool, asked: Asked, calls: list[Call], draw: Draw, careful: bool
) -> dict[str, Tensor]:
    shapes = [
        step_shape(
            asked.query[call.tokens],
            pool.cache,
            call.block_table,
            Exact() if family.window else call.selector,
            call.exact_below,
        )
        for call in calls
    ]
    sizes = [
        draw.integer(shape.least_size, shape.good_size)
        if draw.uniform(0, 1) < 0.3
        else shape.good_size
        for shape in shapes
    ]
    row = -(-max(sizes) // 256) * 256
    workspaces = torch.full((len(calls), row), 255, dtype=torch.uint8, device=DEVICE)
    out = torch.full_like(asked.query, torch.nan)
    counters = torch.zeros(2, len(calls), 2 * len(Counter), dtype=torch.int64, device=DEVICE)
    counters = counters[..., : len(Counter)]
    again, unwritten = torch.zeros(2, len(calls), dtype=torch.bool, device=DEVICE)
    for k in watched(len(calls), careful):
        call = calls[k]
        # What an fp8 cache holds may not be what is stored of it again.
        appends = not family.fp8 and draw.uniform(0, 1) < 0.4
        new_tokens = newest_tokens(family, pool, asked, call) if appends else None

        def step(
            into: Tensor,
            counted: Tensor,
            call: Call = call,
            k: int = k,
            new_tokens: NewTokens | None = new_tokens,
        ) -> Tensor:
            if new_tokens is not None:
                forget(pool.cache, new_tokens)
            return decode(
                asked.query[call.tokens],
                pool.cache,
                call.block_table,
                call.seq_lens,
                **options_of(family, pool, call),
                selector=call.selector,
                exact_rows=call.exact_rows,
                exact_below=call.exact_below,
                counters=counted,
                out=into,
                workspace=workspaces[k, : sizes[k]],
                new_tokens=new_tokens,
            )

        step(out[call.tokens], counters[0, k])
        if new_tokens is not None:
            unwritten[k] = appended_wrongly(pool.cache, new_tokens)
        if draw.uniform(0, 1) < 0.01:
            second = step(torch.full_like(out[call.tokens], torch.nan), counters[1, k])
            again[k] = differ(out[call.tokens], second)
    parts = [
        shape.divide(workspace[:size], shape.capacity(size))
        for shape, workspace, size in zip(shapes, workspaces, sizes, strict=True)
    ]

    n = asked.position + 1
    pages = (n + family.page_size - 1) // family.page_size
    page = torch.arange(family.width, device=DEVICE)
    held = page < pages[:, None]
    if asked.window is not None:
        held &= page >= ((n - asked.window).clamp_min(0) // family.page_size)[:, None]
    read = held[:, None].repeat(1, family.kv_heads, 1)  # [T, kv_heads, width]
    chosen, sparse = read.clone(), torch.zeros_like(n, dtype=torch.bool)
    allowed = read.clone()
    for selector in set(family.selectors) - {Exact()}:
        of_it = [k for k, call in enumerate(calls) if call.selector == selector]
        if of_it:
            tokens = on_device(torch.tensor(of_it))[:, None] * family.batch
            tokens = (tokens + torch.arange(family.batch, device=DEVICE)).flatten()
            read[tokens] = listed_pages(family, [parts[k] for k in of_it])
            # What is pruned holds no weight: the output is that of all pages.
            if not isinstance(selector, Exact):
                allowed[tokens] = read[tokens]
            for k in of_it:
                rows = slice(k * family.batch, (k + 1) * family.batch)
                picked, sparse[rows] = chosen_pages(family, pool, asked, calls[k], rows)
                chosen[rows] = False
                chosen[rows, :, : picked.shape[-1]] = picked
                if isinstance(selector, TopK) and shapes[k].long_rows:
                    width = picked.shape[-1]
                    distance = parts[k]["distance"].view(family.batch, family.kv_heads, -1)
                    own = read[rows][..., :width]
                    alike = rank_alike(distance[..., :width], own, picked)
                    chosen[rows, :, :width] = torch.where(alike, own, picked)

    def of_rows(values: Tensor) -> Tensor:
        """Sums of the values [T] over the rows of each call."""
        return values.view(len(calls), -1).sum(1)

    counted = {
        Counter.STEPS: of_rows(n > 0),
        Counter.SPARSE_STEPS: of_rows(sparse),
        Counter.PAGES_HELD: of_rows(held.sum(1)) * family.kv_heads,
        Counter.PAGES_READ: of_rows(read.sum((1, 2))),
        Counter.QUERY_HEADS: of_rows(n > 0) * family.query_heads,
    }
    wrong = [counters[0, :, counter] != count for counter, count in counted.items()]
    last = read.take_along_dim((pages - 1).clamp_min(0)[:, None, None], 2)[..., 0].all(1)
    tokens_read = None
    if family.selectors != (Exact(),):
        tokens_read = allowed.repeat_interleave(family.page_size, 2)[..., : pool.key.shape[1]]
    error = excess(out, *attention(family, pool, asked, tokens_read))
    return {
        "error": of_calls(len(calls), asked.call, error),
        "fallback": counters[0, :, Counter.FALLBACKS] > 0,
        "pages_differ": of_rows((read != chosen).any(2).double().mean(1)) / family.batch,
        "the last page is not read": of_rows(~last & (n > 0)) > 0,
        "a counter is wrong": torch.stack(wrong).any(0),
        "two runs differ": again,
        "a new token is not appended": unwritten,
    }


def rank_alike(distance: Tensor, read: Tensor, chosen: Tensor) -> Tensor:
    """[B, kv_heads, 1] bool, whether as many pages of a row are read as are chosen, and all that
    are not both have the same distance [B, kv_heads, width]: long rows are ranked in whole steps.
    """
    differs = read != chosen
    far = distance.masked_fill(~differs, 0).amax(-1, keepdim=True)
    near = distance.masked_fill(~differs, NEVER.value).amin(-1, keepdim=True)
    return (far <= near) & (read.sum(-1, keepdim=True) == chosen.sum(-1, keepdim=True))


def listed_pages(family: Family, parts: list[dict[str, Tensor]]) -> Tensor:
    """[T, kv_heads, width] bool, the pages that the calls with these workspaces have listed."""
    rows = len(parts) * family.batch, family.kv_heads
    listed = torch.stack([part["listed"] for part in parts]).view(*rows, 2, -1)[:, :, 1].long()
    counts = torch.stack([part["listed_count"] for part in parts]).view(*rows, 1)
    place = torch.arange(listed.shape[-1], device=DEVICE)
    listed = listed.clamp(0, family.width - 1).masked_fill(place >= counts, family.width)
    read = torch.zeros(*rows, family.width + 1, dtype=torch.bool, device=DEVICE)
    return read.scatter_(2, listed, True)[..., :-1]


def chosen_pages(
    family: Family, pool: Pool, asked: Asked, call: Call, rows: slice
) -> tuple[Tensor, Tensor]:
    """The pages [B, kv_heads, pages] that the reference chooses for the rows of a call, and in
    which of them it does.

    Queries are given as the kernels get them: their dtype decides what is rounded.
    """
    alpha = torch.tensor(family.alphas, dtype=torch.float64, device=DEVICE)
    selection = select_pages(
        asked.query[rows],
        pool.cache,
        call.block_table,
        asked.position[rows] + 1,
        scale=call.scale * pool.key_scale,
        alpha=alpha if len(set(family.alphas)) > 1 else family.alphas[0],
        selector=call.selector,
        alibi_slopes=pool.slopes,
        sliding_window=None,
        exact_rows=call.exact_rows,
        exact_below=call.exact_below,
    )
    return selection.selected, selection.sparse
