"""Writing new tokens into their pages, and keeping the pages' statistics, in one launch."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pages import CODES, FP8, STATISTICS, PagedCache
from ..reference.append import STD_FLOOR
from ..report import Counter
from .boxes import box_around
from .codes import code_keys
from .launch import launch
from .scores import allow_next, await_previous
from .workspace import can_chain, power_of_two

FP8_MAX = tl.constexpr(torch.finfo(FP8).max)
STD_MIN = tl.constexpr(STD_FLOOR)
MOMENTS = tl.constexpr(STATISTICS.index(("mean", "std")))
CODED = tl.constexpr(STATISTICS.index(CODES))

APPENDED_PAGES = tl.constexpr(int(Counter.APPENDED_PAGES))

LONG_PROMPT = 1024
"""More tokens than this in one call are mostly those of prompts."""


@triton.jit
def to_stored(b_rows, scale, dtype: tl.constexpr):
    """Rows as a cache of that dtype holds them: in fp8 divided by the scale and saturated."""
    if dtype == tl.float8e4nv:
        b_rows = tl.div_rn(b_rows.to(tl.float32), scale)
        b_rows = tl.clamp(b_rows, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return b_rows.to(dtype)


@triton.jit
def store_statistics(
    p_statistics, p_scales, o_page, b_key, m_row, rows, o_d, D: tl.constexpr,
    STATISTICS: tl.constexpr,
):  # fmt: skip
    """Writes the statistics of the first `rows` keys of a page, b_key [P, DP], which m_row [P, 1]
    names; o_page is where the page has them, in elements of them."""
    count = rows.to(tl.float32)
    p_first = p_statistics + o_page + o_d
    if STATISTICS == CODED:
        b_first, first_scale, second_scale, radius = code_keys(
            p_statistics + o_page + D, b_key, m_row, count, D
        )
    elif STATISTICS == MOMENTS:
        b_first = tl.sum(tl.where(m_row, b_key, 0.0), 0) / count  # [DP]
        b_deviation = tl.where(m_row, b_key - b_first[None, :], 0.0)
        variance = tl.sum(b_deviation * b_deviation, 0) / count
        b_second = tl.maximum(tl.sqrt(variance), STD_MIN)
    else:
        b_first, b_second, first_scale, second_scale, radius = box_around(b_key, m_row, count)
    if STATISTICS != MOMENTS:
        # Strides of the scales, of four bytes, are not given: the statistics are of one.
        tl.store(p_scales + o_page // 4, first_scale)
        tl.store(p_scales + o_page // 4 + 1, second_scale)
        tl.store(p_scales + o_page // 4 + 2, radius)
    tl.store(p_first, b_first.to(p_statistics.dtype.element_ty), mask=o_d < D)
    if STATISTICS != CODED:
        tl.store(p_first + D, b_second.to(p_statistics.dtype.element_ty), mask=o_d < D)


@triton.jit
def count_page(p_counters):
    """Counts a page that was written to."""
    tl.atomic_add(p_counters + APPENDED_PAGES, tl.full([], 1, tl.int64), sem="relaxed")


@triton.jit
def write_row(
    p_new, p_cache, i_t, i_h, slot, s_token, s_new_head, s_page, s_head, scale,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Writes one new token's key or value."""
    o_d = tl.arange(0, DP)
    o_row = (slot // P) * s_page + i_h * s_head + (slot % P) * D
    b_row = tl.load(p_new + i_h * s_new_head + i_t * s_token + o_d, mask=o_d < D)
    b_row = to_stored(b_row, scale, p_cache.dtype.element_ty)
    tl.store(p_cache + o_row + o_d, b_row, mask=o_d < D)


@triton.jit
def write_page(
    p_key, p_value, p_cache_key, p_cache_value, p_statistics, p_scales, i_t, i_h, slot,
    b_earlier, s_key_token, s_key_head, s_value_token, s_value_head, s_page, s_head,
    s_statistics_page, s_statistics_head, key_scale, value_scale,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Writes the statistics of the page of which token i_t is the last one, and where ROWS its new
    rows.

    b_earlier: [P], slots of that token and of those before it, backwards.

    New rows come from the tokens before it whose slots lead up to its own, older ones from the
    cache, so that no program reads what another one writes.
    """
    o_r, o_d = tl.arange(0, P), tl.arange(0, DP)
    m_d = (o_d < D)[None, :]
    last = (slot % P).to(tl.int32)
    back = last - o_r
    # The first of the tokens before this one whose slot does not lead up to its own.
    m_other = (o_r <= last) & (b_earlier != slot - o_r)
    newest_old = last - tl.min(tl.where(m_other, o_r, last + 1), 0)
    m_new = ((o_r > newest_old) & (back >= 0))[:, None] & m_d

    o_page, o_token = (slot // P) * s_page + i_h * s_head, i_t - last
    o_row = o_r[:, None] * D + o_d[None, :]
    p_cache_key, p_cache_value = p_cache_key + o_page, p_cache_value + o_page
    p_key += i_h * s_key_head + o_token * s_key_token
    p_value += i_h * s_value_head + o_token * s_value_token
    b_key = tl.load(p_key + o_r[:, None] * s_key_token + o_d[None, :], mask=m_new, other=0.0)
    if STATISTICS > 0:
        # Before anything is stored, which loads would wait for.
        b_old = tl.load(p_cache_key + o_row, mask=(o_r <= newest_old)[:, None] & m_d, other=0.0)
    b_key = to_stored(b_key, key_scale, p_cache_key.dtype.element_ty)  # [P, DP]
    if ROWS:
        b_value = tl.load(p_value + o_r[:, None] * s_value_token + o_d[None, :], mask=m_new)
        b_value = to_stored(b_value, value_scale, p_cache_value.dtype.element_ty)
        tl.store(p_cache_key + o_row, b_key, mask=m_new)
        tl.store(p_cache_value + o_row, b_value, mask=m_new)
    if STATISTICS > 0:
        b_key = tl.where(m_new, b_key.to(tl.float32), b_old.to(tl.float32))  # [P, DP]
        m_row = (back >= 0)[:, None]
        o_page = (slot // P) * s_statistics_page + i_h * s_statistics_head
        store_statistics(
            p_statistics, p_scales, o_page, b_key, m_row, last + 1, o_d, D, STATISTICS
        )  # fmt: skip


# Rows that are not known to be aligned have one channel per thread in loads: what is found of a
# channel over the rows of a page takes no exchange between threads.
@triton.jit(
    do_not_specialize=[
        *("s_key_token", "s_key_head", "s_value_token", "s_value_head", "s_page", "s_head"),
        *("s_statistics_page", "s_statistics_head", "tokens"),
    ]
)
def append_kernel(
    p_key, p_value, p_slot, p_cache_key, p_cache_value, p_statistics, p_scales, p_counters,
    s_key_token, s_key_head, s_value_token, s_value_head, s_page, s_head,
    s_statistics_page, s_statistics_head, key_scale, value_scale, tokens,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, STATISTICS: tl.constexpr,
    TOKENS: tl.constexpr, COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Looks at TOKENS tokens of one KV head; the last new token of a page writes all of the page,
    or where every program has one token, its statistics.

    It is the last one when the page is full or the next token is not the next slot.
    """
    await_previous(CHAINED)
    allow_next(CHAINED)
    i_h = tl.program_id(1).to(tl.int64)
    for i in range(TOKENS):
        i_t = tl.program_id(0).to(tl.int64) * TOKENS + i
        o_t = i_t - tl.arange(0, P)
        b_earlier = tl.load(p_slot + o_t, mask=(o_t >= 0) & (o_t < tokens), other=-1)
        slot = tl.load(p_slot + i_t, mask=i_t < tokens, other=-1)
        following = tl.load(p_slot + i_t + 1, mask=i_t + 1 < tokens, other=-1)
        last = (slot >= 0) & ((slot % P == P - 1) | (following != slot + 1))
        if last & ((TOKENS > 1) | (STATISTICS > 0)):
            write_page(
                p_key, p_value, p_cache_key, p_cache_value, p_statistics, p_scales, i_t, i_h, slot,
                b_earlier, s_key_token, s_key_head, s_value_token, s_value_head, s_page, s_head,
                s_statistics_page, s_statistics_head, key_scale, value_scale, D, DP, P, STATISTICS,
                TOKENS > 1,
            )  # fmt: skip
        if TOKENS == 1 and slot >= 0:
            write_row(
                p_key, p_cache_key, i_t, i_h, slot, s_key_token, s_key_head, s_page, s_head,
                key_scale, D, DP, P,
            )  # fmt: skip
            write_row(
                p_value, p_cache_value, i_t, i_h, slot, s_value_token, s_value_head, s_page, s_head,
                value_scale, D, DP, P,
            )  # fmt: skip
        if COUNT and last:
            count_page(p_counters)


# Rows of pages without statistics are only copied.
copy_kernel = triton.jit(append_kernel.fn, do_not_specialize=["tokens"])


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
    """See `entmaxkv_kernels.append`; fp8, fp16, bf16 and fp32.

    The rows of one page that a call writes have to be neighbours in the call, in the order of
    their slots, as the tokens of one sequence are.
    """
    tokens, kv_heads, head_size = key.shape
    if tokens == 0:
        return
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    # A decode step has a page per token; a long prompt has one in page_size.
    block = 1 if tokens <= LONG_PROMPT else cache.layout.page_size
    padded = power_of_two(head_size)
    chained = can_chain(key.device)
    kernel = append_kernel if cache.layout.statistics else copy_kernel
    launch(
        kernel,
        (triton.cdiv(tokens, block), kv_heads),
        key,
        value,
        slot_mapping,
        cache.key,
        cache.value,
        cache.statistics,
        cache.scales,
        counters,
        *key.stride()[:2],
        *value.stride()[:2],
        *cache.key.stride()[:2],
        *cache.statistics.stride()[:2],
        key_scale,
        value_scale,
        tokens,
        D=head_size,
        DP=padded,
        P=cache.layout.page_size,
        STATISTICS=STATISTICS.index(cache.layout.statistics),
        TOKENS=block,
        COUNT=counters is not None,
        CHAINED=chained,
        **({"launch_pdl": True} if chained else {}),
        num_warps=min(16, max(1, padded // 32) * max(1, cache.layout.page_size // 16)),
    )
