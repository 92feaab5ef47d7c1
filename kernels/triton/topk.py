"""The pages of a fixed budget, ranked by Quest's bound (arXiv 2406.10774), on the device."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .pages import NEVER, list_rest, list_tile, load_statistics, ranked_pages
from .scores import allow_next, await_previous, load_queries, load_scales

# Distances are whole steps, so many between the best page and the worst: nearly as fine as what
# fp32 tells apart of scores.
STEPS = tl.constexpr(1 << 21)


@triton.jit
def box_kernel(
    p_query, p_statistics, p_block_table, p_seq_lens, p_exact_rows, p_alpha, p_slopes,
    p_reach, p_page_maximum, p_page_minimum,
    s_query_b, s_query_h, s_page, s_head, s_block_table, page_stride, exact_below,
    scale, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BP: tl.constexpr, S: tl.constexpr, ALIBI: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, EXACT_ROWS: tl.constexpr, CHAINED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Quest's upper bounds of the scores z of pages, per query head, and the largest and the least
    of a split.

    With k between minimum and maximum, q.k <= max(q, 0).maximum + min(q, 0).minimum.
    """
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    o_p, o_d, o_g = tl.arange(0, BP), tl.arange(0, DP), tl.arange(0, GP)
    m_g = o_g < G
    b_scale, b_slope, _ = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    b_above = tl.maximum(b_q, 0.0).to(b_q.dtype)
    b_below = tl.minimum(b_q, 0.0).to(b_q.dtype)
    p_stat = p_statistics + i_h.to(tl.int64) * s_head
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    p_r = p_reach + (i_row * G + o_g).to(tl.int64)[None, :] * page_stride
    b_maximum = tl.full([BP, GP], -float("inf"), tl.float32)
    b_minimum = tl.full([BP, GP], float("inf"), tl.float32)
    b_next = tl.load(p_table + i_s * BP + o_p, mask=i_s * BP + o_p < ranked, other=0)
    for i_p in tl.range(i_s * BP, ranked, S * BP, num_stages=STAGES):
        o_page = i_p + o_p
        b_page = b_next
        b_next = tl.load(p_table + o_page + S * BP, mask=o_page + S * BP < ranked, other=0)
        b_low, b_high = load_statistics(p_stat, b_page, o_d, s_page, D)
        b_bound = tl.dot(b_low, b_below, input_precision="ieee")
        b_bound = tl.dot(b_high, b_above, b_bound, input_precision="ieee")
        b_bound *= b_scale[None, :]  # [BP, GP]
        if ALIBI:
            o_first = (o_page * P - (n - 1)).to(tl.float32)[:, None]
            b_bound += tl.maximum(b_slope[None, :] * o_first, b_slope[None, :] * (o_first + P - 1))
        m_page = (o_page < ranked)[:, None]
        b_maximum = tl.maximum(b_maximum, tl.where(m_page, b_bound, -float("inf")))
        b_minimum = tl.minimum(b_minimum, tl.where(m_page, b_bound, float("inf")))
        tl.store(p_r + o_page[:, None], b_bound, mask=m_g[None, :] & m_page)
    allow_next(CHAINED)
    o_own = (i_row * G + o_g) * S + i_s
    tl.store(p_page_maximum + o_own, tl.max(b_maximum, 0), mask=m_g)
    tl.store(p_page_minimum + o_own, tl.min(b_minimum, 0), mask=m_g)


@triton.jit
def load_distances(
    p_reach, p_page_maximum, p_page_minimum, i_row, o_page, ranked, page_stride,
    G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """How far below a head's best page each page lies, for the head to which it matters most."""
    o_s = tl.arange(0, SP)
    width = 0.0
    for i_g in tl.static_range(G):
        o_own = (i_row * G + i_g) * S + o_s
        b_peak = tl.load(p_page_maximum + o_own, mask=o_s < S, other=-float("inf"))
        b_least = tl.load(p_page_minimum + o_own, mask=o_s < S, other=float("inf"))
        peak = tl.max(b_peak, 0)
        width = tl.maximum(width, peak - tl.min(b_least, 0))
        p_r = p_reach + (i_row * G + i_g).to(tl.int64) * page_stride
        b_below = peak - tl.load(p_r + o_page, mask=o_page < ranked, other=0.0)
        if i_g == 0:
            b_distance = b_below
        else:
            b_distance = tl.minimum(b_distance, b_below)
    steps = tl.where(width > 0.0, STEPS / width, 0.0)
    # Also what is no number is far.
    b_steps = tl.minimum(b_distance * steps, STEPS * 1.0 - 1.0)
    return tl.where(o_page < ranked, b_steps.to(tl.int32), NEVER)


@triton.jit
def box_distance_kernel(
    p_seq_lens, p_exact_rows, p_reach, p_page_maximum, p_page_minimum, p_distance,
    page_stride, exact_below,
    HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BR: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, EXACT_ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The distances of all pages, where one program per row would take long."""
    await_previous(CHAINED)
    allow_next(CHAINED)
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    for i_p in range(i_s * BR, ranked, tl.num_programs(0) * BR):
        o_page = i_p + tl.arange(0, BR)
        b_d = load_distances(
            p_reach, p_page_maximum, p_page_minimum, i_row, o_page, ranked, page_stride, G, S, SP
        )
        tl.store(p_d + o_page, b_d, mask=o_page < ranked)


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def choose_kernel(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_maximum, p_page_minimum, p_distance,
    p_listed, p_listed_count, p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, ONE_TILE: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, EXACT_ROWS: tl.constexpr, COUNT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the `budget` nearest pages of one row in their order; of pages as near, the earlier.

    ONE_TILE: all pages fit one tile of BL, whose distances are computed here.
    """
    await_previous(CHAINED)
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    o_l = tl.arange(0, BL)
    if ONE_TILE:
        b_distance = load_distances(
            p_reach, p_page_maximum, p_page_minimum, i_row, o_l, ranked, page_stride, G, S, SP
        )
    # At most `budget` pages are nearer than `found`, and more are nearer than `far`.
    found, far = tl.full([], 0, tl.int32), tl.full([], STEPS, tl.int32)
    nearer, within = tl.full([], 0, tl.int32), ranked
    if budget >= ranked:
        found, nearer = far, nearer + budget
    rounds = 0
    while (far - found > 1) & (nearer < budget):
        # Two trials: about where the last page is expected, or at the thirds every other time.
        width = far - found
        share = (budget - nearer).to(tl.float32) / (within - nearer).to(tl.float32)
        margin = tl.where(rounds % 2 == 0, 1.0 / 16, 1.0 / 6)
        share = tl.where(rounds % 2 == 0, share, 0.5)
        low = found + ((share - margin) * width.to(tl.float32)).to(tl.int32)
        high = found + ((share + margin) * width.to(tl.float32)).to(tl.int32)
        low = tl.minimum(tl.maximum(low, found + 1), far - 1)
        high = tl.minimum(tl.maximum(high, found + 1), far - 1)
        count_low, count_high = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        for i_l in range(0, ranked, BL):
            m_l = i_l + o_l < ranked
            b_d = b_distance if ONE_TILE else tl.load(p_d + i_l + o_l, mask=m_l, other=NEVER)
            # Both counts are at most BL <= 8192, so one sum serves both.
            counts = tl.sum((b_d < low).to(tl.int32) + ((b_d < high).to(tl.int32) << 16), 0)
            count_low += counts & 0xFFFF
            count_high += counts >> 16
        if count_high <= budget:
            found, nearer = high, count_high
        else:
            far, within = high, count_high
        if count_low > budget:
            far, within = low, count_low
        elif count_high > budget:
            found, nearer = low, count_low
        rounds += 1
    ties = budget - nearer
    count, tied = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i_l in range(0, ranked, BL):
        m_l = i_l + o_l < ranked
        b_d = b_distance if ONE_TILE else tl.load(p_d + i_l + o_l, mask=m_l, other=NEVER)
        count, tied = list_tile(
            b_d, i_l + o_l, ranked, found, ties, count, tied, p_table, p_list, list_stride, BL
        )
    list_rest(
        p_table, p_list, p_listed_count, p_counters, i_row, i_h, count, ranked,
        (n + P - 1) // P, list_stride, BL, COUNT,
    )  # fmt: skip
