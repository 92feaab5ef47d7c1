"""How high the scores of pages reach, by boxes around their keys or by codes; `topk` ranks pages by
it."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .codes import SPREAD_UNITS, first_columns, highest_of_codes, span, turn_queries
from .nearest_long import SAMPLED
from .pages import INTERPRETED, load_center, load_statistics, ranked_pages
from .scores import allow_next, await_if, load_queries, load_scales, may_be_fresh


@triton.jit
def widen(b_small):
    """8-bit numbers of at least 0 in bf16, by a third of what the compiler takes for it.

    Their bits below 0x43 are in bf16 the numbers and 128.
    """
    return (
        tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0x43, 0x4140; prmt.b32 $1, $2, 0x43, 0x4342;",
            "=r,=r,r",
            [b_small],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
        - 128.0
    )


@triton.jit
def load_box_scales(p_scale, b_page, s_page):
    """Scales of the centers and of the half-widths of pages, and their radii, as one load of four
    numbers, of which the first is none of them. Each would take as long by itself."""
    o_scale = b_page.to(tl.int64) * (s_page // 4)
    b_four = tl.load(p_scale + o_scale[:, None] + tl.arange(0, 4)[None, :])
    b_even, b_odd = tl.split(tl.reshape(b_four, [b_page.shape[0], 2, 2]))
    _, b_half = tl.split(b_even)
    b_center, b_radius = tl.split(b_odd)
    return b_center, b_half, b_radius


@triton.jit
def sum_squares(b_half, b_q):
    """Sums over the channels of squares of half-widths [BP, DP] times those of queries [DP, GP],
    [BP, GP]. For queries of 16 bits squares are rounded to bf16, which has the range of theirs."""
    b_square = b_q.to(tl.float32) * b_q.to(tl.float32)
    if b_q.dtype == tl.bfloat16:
        b_half = widen(b_half)
        return tl.dot(b_half * b_half, b_square.to(tl.bfloat16))
    else:
        b_half = b_half.to(tl.float32)
        b_half *= b_half
        if b_q.dtype == tl.float32:
            return tl.dot(b_half, b_square, input_precision="ieee")
        else:
            b_half, b_square = b_half.to(tl.bfloat16), b_square.to(tl.bfloat16)
            # The products of bf16 in tf32 are exact.
            return tl.dot(b_half.to(tl.float32), b_square.to(tl.float32))


@triton.jit
def hold_like(b_own, b_other):
    """The same fp32 numbers, in the threads that hold the others. What the compiler would hold in
    two ways it loads twice."""
    if INTERPRETED:
        return b_own
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,f", [b_own, b_other], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def store_held(p_own, b_own, m_own):
    """Stores fp32 numbers by the threads that hold them. The compiler's stores are of neighbours
    side by side, after an exchange."""
    if INTERPRETED:
        tl.store(p_own, b_own, mask=m_own)
    else:
        tl.inline_asm_elementwise(
            """{
                .reg .pred %wanted;
                setp.ne.s32 %wanted, $3, 0;
                @%wanted st.global.f32 [$1], $2;
                mov.b32 $0, 0;
            }""",
            "=r,l,f,r,~{memory}",
            [p_own.to(tl.int64), b_own, m_own.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def most_of_two(most_0, most_1, own_0, own_1):
    return tl.maximum(most_0, own_0), tl.maximum(most_1, own_1)


@triton.jit
def most_of_three(most_0, most_1, most_2, own_0, own_1, own_2):
    return tl.maximum(most_0, own_0), tl.maximum(most_1, own_1), tl.maximum(most_2, own_2)


@triton.jit(do_not_specialize=["early"])
def box_kernel(
    p_query, p_statistics, p_block_table, p_seq_lens, p_exact_rows, p_alpha, p_slopes,
    p_reach, p_spread, p_page_extreme, p_page_sample, p_member_count, p_bound, p_span,
    p_unread_mass,
    s_query_b, s_query_h, s_head, s_block_table, page_stride, exact_below, early,
    scale, factor, exponent,
    s_page: tl.constexpr, o_scales: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GW: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, PS: tl.constexpr, ALIBI: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, EXACT_ROWS: tl.constexpr, LONG: tl.constexpr,
    STEP: tl.constexpr, CODES: tl.constexpr, SHORTER: tl.constexpr, SPREAD: tl.constexpr,
    ROUNDED: tl.constexpr, CERTIFY: tl.constexpr, OVERLAPPED: tl.constexpr,
    CHAINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """How high the scores z of pages reach, per query head, and the largest and the least of a
    split; of long rows also the sampled ones side by side. See `reference/quest.py`.

    p_reach: [rows, page_stride, GW], p_page_sample: [rows, SAMPLED, GW], and p_page_extreme:
    [rows, PS, GW, 2], of which the second is the negated least.

    CODES: by codes of the keys, in place of boxes; if SHORTER, as bounds are by them.
    SPREAD: also how far above the center that is, p_spread [rows, page_stride, GW].
    CERTIFY: also upper bounds of these scores but for rounding, p_bound [rows, G, page_stride].
    ROUNDED: also what that depends on, the largest sum of the two scales of a page of a split,
    p_span [rows, PS + 1]; at most 0 of a split without pages. That of the last page, which is not
    ranked, is added by who reads it.
    """
    # Where columns are left of those of the heads, that sum takes the place of a head's reach.
    SPARE: tl.constexpr = ROUNDED and GP > G
    await_if(early == 0, CHAINED)
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    if LONG and i_s == 0:
        tl.store(p_member_count + i_row, 0)
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    await_if(may_be_fresh(n, P), CHAINED)
    allow_next(CHAINED and OVERLAPPED)
    o_p, o_d, o_g = tl.arange(0, BP), tl.arange(0, DP), tl.arange(0, GP)
    m_g = o_g < G
    b_scale, b_slope, _ = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    p_stat = p_statistics + i_h.to(tl.int64) * s_head
    p_scale = (p_stat + o_scales).to(tl.pointer_type(tl.float32))
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    if CERTIFY and i_s == 0:
        tl.store(p_unread_mass + i_row * G + o_g, 0, mask=m_g)
    if CODES:
        b_0, b_1, b_2, b_3, b_shift, b_size, b_norm = turn_queries(
            p_query, i_b, i_h, s_query_b, s_query_h, G, GP, D, max(32, DP // 4)
        )
        # Of each pair of columns one is that of a query.
        o_n = tl.arange(0, 2 * GP)
        o_n = tl.where(o_n % 2 == 0, o_n // 2, G)
        b_q = load_queries(p_query, i_b, i_h, o_n, o_d, s_query_b, s_query_h, G, D)
    p_r = p_reach + i_row.to(tl.int64) * page_stride * GW + o_g[None, :]
    b_maximum = tl.full([BP, GP], -float("inf"), tl.float32)
    b_minimum = tl.full([BP, GP], float("inf"), tl.float32)
    b_next = tl.load(p_table + i_s * BP + o_p, mask=i_s * BP + o_p < ranked, other=0)
    if ROUNDED and not SPARE:
        b_span = tl.zeros([BP, GP], tl.float32)
    if CERTIFY:
        p_b = p_bound + i_row.to(tl.int64) * (G * page_stride)
    for i_p in tl.range(i_s * BP, ranked, PS * BP, num_stages=STAGES):
        o_page = i_p + o_p
        b_page = b_next
        b_next = tl.load(p_table + o_page + PS * BP, mask=o_page + PS * BP < ranked, other=0)
        b_center_scale, b_half_scale, b_radius = load_box_scales(p_scale, b_page, s_page)
        if CODES:
            b_center = load_center(p_stat, b_page, o_d, s_page, D)
            b_most, b_shorter = highest_of_codes(
                p_stat, b_page, o_page, b_0, b_1, b_2, b_3, b_shift, b_half_scale,
                b_size * b_scale, b_slope, n, s_page, D, P, ALIBI,
                2 if SHORTER else int(CERTIFY > 0),
            )  # fmt: skip
            b_spread = b_norm[None, :] * (b_half_scale * (SPREAD_UNITS / span(D)))[:, None]
        else:
            b_center, b_half = load_statistics(p_stat, b_page, o_d, s_page, D)
            b_spread = tl.sqrt(sum_squares(b_half, b_q)) * b_half_scale[:, None]
            if ALIBI:
                o_first = (o_page * P - (n - 1)).to(tl.float32)[:, None]
                b_last = b_slope[None, :] * (o_first + P - 1)
                b_most = tl.maximum(b_slope[None, :] * o_first, b_last)
        b_center = tl.dot(b_center.to(b_q.dtype), b_q, input_precision="ieee")
        if CODES:
            b_center = first_columns(b_center)
        b_center *= b_center_scale[:, None]
        b_reach = (b_center + b_spread) * b_scale[None, :]  # [BP, GP]
        if ALIBI or CODES:
            b_reach += b_most
        m_page = (o_page < ranked)[:, None]
        if ROUNDED:
            b_both = tl.broadcast_to((b_center_scale + b_half_scale)[:, None], [BP, GP])
            b_both = hold_like(b_both, b_reach)
        b_top = b_reach
        if SPARE:
            b_top = tl.where(m_g[None, :], b_reach, b_both)
        elif ROUNDED:
            b_span = tl.maximum(b_span, tl.where(m_page, b_both, 0.0))
        b_maximum = tl.maximum(b_maximum, tl.where(m_page, b_top, -float("inf")))
        b_minimum = tl.minimum(b_minimum, tl.where(m_page, b_reach, float("inf")))
        m_own = m_g[None, :] & m_page
        if CERTIFY:
            b_bound = (b_center + b_radius[:, None] * b_spread) * b_scale[None, :]
            if CODES:
                b_bound += b_shorter
            elif ALIBI:
                b_bound += b_most
            o_bound = o_g[None, :] * page_stride + o_page[:, None]
            store_held(p_b + o_bound, b_bound, m_own)
        store_held(p_r + o_page[:, None] * GW, b_reach, m_own)
        if SPREAD:
            p_w = p_spread + i_row.to(tl.int64) * page_stride * GW + o_g[None, :]
            b_spread *= b_scale[None, :]
            store_held(p_w + o_page[:, None] * GW, b_spread, m_own)
        if LONG:
            o_sample = i_row * SAMPLED + o_page // STEP
            p_s = p_page_sample + o_sample[:, None] * GW + o_g[None, :]
            store_held(p_s, b_reach, m_own & (o_page % STEP == 0)[:, None])
    allow_next(CHAINED and not OVERLAPPED)
    # They go through the block's one exchange.
    if ROUNDED and not SPARE:
        b_most, b_least, b_span = tl.reduce((b_maximum, -b_minimum, b_span), 0, most_of_three)
    else:
        b_most, b_least = tl.reduce((b_maximum, -b_minimum), 0, most_of_two)
        b_span = b_most
    if ROUNDED:
        p_own = p_span + i_row * (PS + 1) + i_s + o_g * 0
        store_held(p_own, b_span, o_g == (G if SPARE else 0))
    p_e = p_page_extreme + (i_row * PS + i_s) * (2 * GW) + 2 * o_g
    store_held(p_e, b_most, m_g)
    store_held(p_e + 1, b_least, m_g)
    await_if(i_s + i_h + i_b == 0, CHAINED)
