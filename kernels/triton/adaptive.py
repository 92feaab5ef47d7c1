"""The pages that can reach a threshold of true scores, by an estimate or by bounds that prove it;
`reference/adaptive.py` states the rule.

One launch chooses the pages that each query head has read first, and scores their keys; the next
one solves the threshold of these scores, in every program again, and compares pages with it.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..reference.adaptive import FIRST_SHARE, NEIGHBOURS
from .certificate import (
    TAU_ROUNDING,
    load_last_span,
    load_spans,
    most_rounding,
    place_last_scales,
    rounding_of,
)
from .entmax import EXCESS_MASS, NEWTON_STEPS, newton_step, weights_and_slopes
from .pages import NEVER, ranked_pages
from .scores import (
    NO_PAGE,
    allow_next,
    await_previous,
    load_queries,
    load_rows,
    load_scales,
    score_rows,
)

SHARE = tl.constexpr(FIRST_SHARE)
NEAR = tl.constexpr(NEIGHBOURS)


@triton.jit
def count_classes(ranked, FIRST: tl.constexpr, MOST: tl.constexpr):
    """Pages that each query head has read first besides the last one."""
    return tl.minimum(tl.maximum(ranked // SHARE, FIRST), MOST) - 1


@triton.jit
def highest_of_classes(p_reach, i_g, o_c, classes, ranked, GW: tl.constexpr, BJ: tl.constexpr):
    """Of the pages o_c + j * classes the one that reaches highest for a query head, [PAGES]; -1
    where there is none, or no number."""
    o_j = tl.arange(0, BJ)
    b_highest = tl.full([o_c.shape[0]], -float("inf"), tl.float32)
    b_best = tl.full([o_c.shape[0]], -1, tl.int32)
    for i_j in range(0, ranked, BJ * classes):
        o_page = i_j + o_j[:, None] * classes + o_c[None, :]  # [BJ, PAGES]
        mask = (o_page < ranked) & (o_c < classes)[None, :]
        b_reach = tl.load(p_reach + o_page * GW + i_g, mask=mask, other=-float("inf"))
        b_reach = tl.where(b_reach == b_reach, b_reach, -float("inf"))
        b_top = tl.max(b_reach, 0)
        # The earliest of equal ones.
        b_first = tl.min(tl.where(b_reach == b_top[None, :], o_page, NEVER), 0)
        b_best = tl.where(b_top > b_highest, b_first, b_best)
        b_highest = tl.maximum(b_highest, b_top)
    return b_best


@triton.jit
def first_kernel(
    p_query, p_key, p_block_table, p_seq_lens, p_exact_rows, p_alpha, p_slopes, p_reach, p_spread,
    p_first_page, p_first_score, p_first_reach,
    s_query_b, s_query_h, s_head, s_block_table, page_stride, exact_below,
    scale, factor, exponent,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GW: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr, MOST: tl.constexpr,
    FT: tl.constexpr, BJ: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    EXACT_ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Chooses BN // P of the pages that one query head has read first, and scores their keys: the
    best one of each class, and after them the last page.

    p_first_page: [heads, FT * BN // P], numbers in the sequence, -1 for none; p_first_score:
    [heads, FT * BN], -inf for none; p_first_reach: [heads, FT * BN // P], how far the scores of a
    page reach above its center, in half-widths, -inf for none and of the last page.
    """
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_g, i_f = i_t // FT, i_t % FT
    i_row = i_b * HKV + i_h
    i_head = i_row * G + i_g
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    PAGES: tl.constexpr = BN // P
    o_n, o_d, o_g, o_f = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, GP), tl.arange(0, PAGES)
    b_scale, b_slope, _ = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    classes = count_classes(ranked, FIRST, MOST)
    await_previous(CHAINED)
    allow_next(CHAINED)
    if (ranked == 0) | (i_f * PAGES > classes):
        return
    o_c = i_f * PAGES + o_f
    p_r = p_reach + i_row.to(tl.int64) * page_stride * GW
    b_first = highest_of_classes(p_r, i_g, o_c, classes, ranked, GW, BJ)
    b_first = tl.where(o_c == classes, ranked, b_first)
    tl.store(p_first_page + i_head * (FT * PAGES) + o_c, b_first)
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    b_page = tl.load(p_table + b_first, mask=b_first >= 0, other=0).to(tl.int32)
    b_logical = tl.where(b_first >= 0, b_first, NO_PAGE)
    b_page = tl.reshape(tl.broadcast_to(b_page[:, None], [PAGES, P]), [BN])
    b_logical = tl.reshape(tl.broadcast_to(b_logical[:, None], [PAGES, P]), [BN])
    p_k = p_key + i_h.to(tl.int64) * s_head
    b_k = load_rows(p_k, b_page, o_n, o_d, s_page, D, P)  # [BN, DP]
    b_z = score_rows(b_k, b_q, b_logical, o_n, n, 0, b_scale, b_slope, P, False, ALIBI)
    b_z = tl.sum(tl.where((o_g == i_g)[None, :], b_z, 0.0), 1)
    tl.store(p_first_score + i_head * (FT * BN) + i_f * BN + o_n, b_z)
    o_reach = i_row.to(tl.int64) * page_stride * GW + b_first * GW + i_g
    m_first = (b_first >= 0) & (o_c < classes)
    b_reach = tl.load(p_reach + o_reach, mask=m_first, other=0.0)
    b_spread = tl.load(p_spread + o_reach, mask=m_first, other=1.0)
    b_z = tl.max(tl.reshape(b_z, [PAGES, P]), 1)
    b_ratio = (b_z - (b_reach - b_spread)) / b_spread
    b_ratio = tl.where((b_ratio == b_ratio) & m_first, b_ratio, -float("inf"))
    tl.store(p_first_reach + i_head * (FT * PAGES) + o_c, b_ratio)


@triton.jit
def solve_heads(b_z, b_exponent, ORDER: tl.constexpr):
    """tau of the scores [GW, N] of each query head, [GW]."""
    b_peak = tl.max(b_z, 1)
    b_peak = tl.where(b_peak > -float("inf"), b_peak, 0.0)
    b_z -= b_peak[:, None]
    b_tau = tl.full([b_z.shape[0]], -1.0, tl.float32)
    excess, steps = tl.full([], 1.0, tl.float32), tl.full([], 0, tl.int32)
    # One step more than to where the excess is small: it squares that.
    while (excess > EXCESS_MASS) & (steps < NEWTON_STEPS):
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0)
        b_w, b_d = weights_and_slopes(b_x, b_exponent[:, None], ORDER)
        # Both go through the block's one exchange of partial sums.
        b_mass, b_slope = tl.split(tl.sum(tl.join(b_w, b_d), 1))
        b_tau += newton_step(b_mass, b_slope, 1.0, b_exponent, ORDER)
        excess = tl.max(b_mass, 0) - 1.0
        steps += 1
    return b_tau + b_peak


@triton.jit
def is_first(
    p_first_page, i_row, o_page, classes, G: tl.constexpr, GW: tl.constexpr, FP: tl.constexpr
):
    """Whether any head of the group has had pages [BL] read first; [BL] int32."""
    o_g = tl.arange(0, GW)
    p_f = p_first_page + (i_row * G + o_g)[None, :] * FP + (o_page % classes)[:, None]
    b_first = tl.load(p_f, mask=(o_g < G)[None, :], other=-1)
    return tl.max((b_first == o_page[:, None]).to(tl.int32), 1)


@triton.jit
def reach_of_heads(
    p_first_reach, i_row, classes, margin, G: tl.constexpr, GW: tl.constexpr, D: tl.constexpr,
    FP: tl.constexpr, FPP: tl.constexpr,
):  # fmt: skip
    """How far scores are taken to reach above the centers of pages [GW], in half-widths."""
    o_g, o_c = tl.arange(0, GW), tl.arange(0, FPP)
    p_f = p_first_reach + (i_row * G + o_g)[:, None] * FP + o_c[None, :]
    b_ratio = tl.load(p_f, mask=(o_g < G)[:, None] & (o_c < classes)[None, :], other=0.0)
    return margin * tl.minimum(tl.maximum(tl.max(b_ratio, 1), 0.0), D**0.5)


@triton.jit
def load_radii(p_scales, p_block_table, i_b, i_h, o_page, ranked, s_page, s_head, s_block_table):
    """Radii of pages of a sequence; s_page and s_head are in bytes."""
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    b_page = tl.load(p_table + o_page, mask=o_page < ranked, other=0)
    o_radius = b_page.to(tl.int64) * (s_page // 4) + i_h.to(tl.int64) * (s_head // 4) + 2
    return tl.load(p_scales + o_radius, mask=o_page < ranked, other=0.0)


@triton.jit
def are_outlying(b_radius, m_page, guard, BL: tl.constexpr):
    """Whether a radius is infinite, or more than `guard` times the mean of the finite ones of NEAR
    pages, [BL]."""
    m_near = m_page & (b_radius < float("inf"))
    b_near = tl.reshape(tl.where(m_near, b_radius, 0.0), [BL // NEAR, NEAR])
    b_held = tl.sum(tl.reshape(m_near.to(tl.float32), [BL // NEAR, NEAR]), 1)
    m_outlying = b_near * b_held[:, None] > guard * tl.sum(b_near, 1)[:, None]
    return tl.reshape(m_outlying, [BL]) | (b_radius == float("inf"))


@triton.jit
def wanted_kernel(
    p_query, p_scales, p_block_table, p_seq_lens, p_exact_rows, p_alpha, p_slopes, p_reach,
    p_spread, p_span, p_first_page, p_first_score, p_first_reach, p_distance, p_tile_count,
    s_query_b, s_query_h, s_head, s_block_table, page_stride, exact_below, scale, factor,
    exponent, margin, reach, guard,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, FIRST: tl.constexpr, MOST: tl.constexpr, FP: tl.constexpr,
    FPP: tl.constexpr, FN: tl.constexpr, BL: tl.constexpr, NT: tl.constexpr, PS: tl.constexpr,
    PSP: tl.constexpr, GUARDED: tl.constexpr, OWN_REACH: tl.constexpr, PROVE: tl.constexpr,
    ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, EXACT_ROWS: tl.constexpr,
    ORDER: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Distance 0 for the pages of a tile that are to be read, NEVER for the others, and how many
    are to be.

    OWN_REACH: how high scores reach is what each head's first pages show, times the margin; else
    it is `reach`.
    PROVE: pages are to be read that can hold weight, whatever rounding did.
    GUARDED: pages with a radius of more than `guard` times the mean of their neighbours' are judged
    by their bounds.
    FP: places of the first pages of a head. FPP, FN: for those and their scores, powers of two.
    """
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    o_g, o_f, o_page = tl.arange(0, GW), tl.arange(0, FN), i_t * BL + tl.arange(0, BL)
    m_g, m_page = o_g < G, o_page < ranked
    classes = count_classes(ranked, FIRST, MOST)
    if PROVE or GUARDED:
        b_radius = load_radii(
            p_scales, p_block_table, i_b, i_h, o_page, ranked, s_page, s_head, s_block_table
        )
    b_scale, b_slope, b_exponent = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    if PROVE:
        p_last = place_last_scales(
            p_block_table, p_scales, i_b, i_h, ranked, s_block_table, s_page // 4, s_head // 4
        )
        b_q = load_queries(p_query, i_b, i_h, o_g, tl.arange(0, DP), s_query_b, s_query_h, G, D)
        b_size = tl.sum(tl.abs(b_q.to(tl.float32)), 0)
        b_unit, b_fixed = rounding_of(b_size, b_scale, b_slope, n, D, ALIBI)
    await_previous(CHAINED)
    allow_next(CHAINED)
    if i_t * BL >= ranked:
        return
    p_s = p_first_score + (i_row * G + o_g)[:, None] * (FP * P) + o_f[None, :]
    b_z = tl.load(p_s, mask=m_g[:, None] & (o_f < (classes + 1) * P)[None, :], other=-float("inf"))
    o_reach = (i_row.to(tl.int64) * page_stride + o_page)[:, None] * GW + o_g[None, :]
    m_reach = m_page[:, None] & m_g[None, :]
    b_reach = tl.load(p_reach + o_reach, mask=m_reach, other=-float("inf"))
    b_spread = tl.load(p_spread + o_reach, mask=m_reach, other=0.0)
    b_tau = solve_heads(b_z, b_exponent, ORDER)
    b_above = b_reach - b_tau[None, :]
    if PROVE:
        b_span, last = load_spans(p_span, i_row, PS, PSP), load_last_span(p_last, ranked)
        b_slack = most_rounding(b_span, last, b_unit, b_fixed)
        b_slack += TAU_ROUNDING * (1.0 + tl.abs(b_tau))
        b_more = (b_radius[:, None] - 1.0) * b_spread + b_slack[None, :]
    elif OWN_REACH:
        b_own = reach_of_heads(p_first_reach, i_row, classes, margin, G, GW, D, FP, FPP)
        b_more = (b_own[None, :] - 1.0) * b_spread
    else:
        b_more = (reach - 1.0) * b_spread
    # Not "greater": what is no number may be anything.
    m_wanted = 1 - (b_above + b_more <= 0.0).to(tl.int32)
    if GUARDED:
        b_bound = b_above + (b_radius[:, None] - 1.0) * b_spread
        m_outlying = are_outlying(b_radius, m_page, guard, BL)
        m_wanted |= m_outlying[:, None].to(tl.int32) & (1 - (b_bound <= 0.0).to(tl.int32))
    b_wanted = tl.max(tl.where(m_g[None, :], m_wanted, 0), 1)
    b_wanted |= is_first(p_first_page, i_row, o_page, classes, G, GW, FP)
    b_wanted = tl.where(m_page, b_wanted, 0)
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    tl.store(p_d + o_page, tl.where(b_wanted > 0, 0, NEVER), mask=m_page)
    tl.store(p_tile_count + i_row * NT + i_t, tl.sum(b_wanted, 0))
