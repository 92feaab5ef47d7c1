"""Page scores from the page statistics, for the selectors, and the list of the chosen pages.

Every page but the last is scored. The scores of a page become one rank per KV head, which its
query heads share, as a distance that is zero for the best page; the pages of the least distance
are listed in their order, and the last page after them.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..report import Counter
from .scores import load_queries, load_scales

SPARSE_STEPS = tl.constexpr(int(Counter.SPARSE_STEPS))
PAGES_READ = tl.constexpr(int(Counter.PAGES_READ))

# The search goes through the bits of a distance, a float that is not negative, by digits.
DIGIT_BITS = tl.constexpr(8)
DIGITS = tl.constexpr(256)
NEVER = tl.constexpr(0x7F800000)


@triton.jit
def ranked_pages(
    p_seq_lens, p_exact_rows, i_b, exact_below, P: tl.constexpr, EXACT_ROWS: tl.constexpr
):
    """Length of a sequence and how many of its pages are to be ranked, 0 if it is read whole."""
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    ranked = tl.maximum((n + P - 1) // P - 1, 0)
    sparse = n > exact_below
    if EXACT_ROWS:
        sparse = sparse & (tl.load(p_exact_rows + i_b).to(tl.int32) == 0)
    return n, tl.where(sparse, ranked, 0)


@triton.jit
def load_statistics(p_statistics, b_page, o_d, s_page, D: tl.constexpr):
    """The two statistics of pages, [BP, DP] each."""
    p_s = p_statistics + (b_page.to(tl.int64) * s_page)[:, None] + o_d[None, :]
    if o_d.shape[0] == D:
        return tl.load(p_s), tl.load(p_s + D)
    else:
        m_d = (o_d < D)[None, :]
        return tl.load(p_s, mask=m_d, other=0.0), tl.load(p_s + D, mask=m_d, other=0.0)


@triton.jit
def box_kernel(
    p_query, p_statistics, p_block_table, p_seq_lens, p_exact_rows, p_alpha, p_slopes,
    p_reach, p_page_maximum,
    s_query_b, s_query_h, s_page, s_head, s_block_table, page_stride, exact_below,
    scale, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BP: tl.constexpr, S: tl.constexpr, ALIBI: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, EXACT_ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Quest's upper bounds of the scores z of pages, per query head, and the largest of a split.

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
        tl.store(p_r + o_page[:, None], b_bound, mask=m_g[None, :] & m_page)
    p_m = p_page_maximum + (i_row * S + i_s) * G + o_g
    tl.store(p_m, tl.max(b_maximum, 0), mask=m_g)


@triton.jit
def box_distance_kernel(
    p_seq_lens, p_exact_rows, p_reach, p_page_maximum, p_distance, page_stride, exact_below,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, P: tl.constexpr, BR: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, EXACT_ROWS: tl.constexpr,
):  # fmt: skip
    """How far below a head's best page a page lies, for the head to which it matters most."""
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    o_g, o_s, o_r = tl.arange(0, GP), tl.arange(0, SP), tl.arange(0, BR)
    m_g = (o_g < G)[:, None]
    p_m = p_page_maximum + (i_row * S + o_s[None, :]) * G + o_g[:, None]
    b_peak = tl.load(p_m, mask=m_g & (o_s < S)[None, :], other=-float("inf"))
    b_peak = tl.max(b_peak, 1)  # [GP]
    p_r = p_reach + (i_row * G + o_g).to(tl.int64)[:, None] * page_stride
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    for i_p in range(i_s * BR, ranked, S * BR):
        m_page = i_p + o_r < ranked
        b_r = tl.load(p_r + (i_p + o_r)[None, :], mask=m_g & m_page[None, :], other=0.0)
        b_d = tl.where(m_g, b_peak[:, None] - b_r, float("inf"))
        tl.store(p_d + i_p + o_r, tl.min(b_d, 0).to(tl.int32, bitcast=True), mask=m_page)


@triton.jit
def digits(b_distance, found, shift, o_page, ranked):
    """The next bits of distances that agree with what was found; one too many for others."""
    m_left = ((b_distance ^ found) >> shift) < DIGITS
    b_digit = (b_distance >> shift) % DIGITS
    return tl.where((o_page < ranked) & m_left, b_digit, DIGITS)


@triton.jit
def search_kernel(
    p_seq_lens, p_exact_rows, p_distance, p_found, page_stride, exact_below, budget,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, EXACT_ROWS: tl.constexpr,
):  # fmt: skip
    """The distance of the last page within the budget, and how many pages of that distance are
    within it: all pages if there are no more than the budget."""
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    i_row = i_b * HKV + i_h
    _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    o_l, o_digit = tl.arange(0, BL), tl.arange(0, 2 * DIGITS)
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    ties = tl.minimum(budget, ranked)
    found = tl.where(ties < ranked, 0, NEVER)
    if ties < ranked:
        for i_round in tl.static_range(4):
            shift = 24 - i_round * DIGIT_BITS
            b_histogram = tl.zeros([2 * DIGITS], tl.int32)
            for i_l in range(0, ranked, BL):
                b_d = tl.load(p_d + i_l + o_l, mask=i_l + o_l < ranked, other=0)
                b_digit = digits(b_d, found, shift, i_l + o_l, ranked)
                b_histogram += tl.histogram(b_digit, 2 * DIGITS)
            b_before = tl.cumsum(b_histogram, 0) - b_histogram
            # The last digit before which fewer pages lie than are still wanted.
            m_digit = (b_before < ties) & (o_digit < DIGITS) & (b_histogram > 0)
            digit = tl.max(tl.where(m_digit, o_digit, 0), 0)
            ties -= tl.sum(tl.where(o_digit == digit, b_before, 0), 0)
            found += digit << shift
    tl.store(p_found + 2 * i_row, found)
    tl.store(p_found + 2 * i_row + 1, ties)


@triton.jit
def list_kernel(
    p_seq_lens, p_exact_rows, p_block_table, p_distance, p_found, p_listed, p_listed_count,
    p_counters,
    s_block_table, list_stride, page_stride, exact_below, chunk,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, SEARCHED: tl.constexpr,
    EXACT_ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Lists the chosen pages of a chunk of one row in their order, after those of the chunks
    before it: pages nearer than what was found, and of those as near the earliest."""
    i_c, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    pages = (n + P - 1) // P
    start = i_c * chunk
    if start > pages:
        return
    o_l = tl.arange(0, BL)
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    found, ties = 0, ranked
    if SEARCHED:
        found = tl.load(p_found + 2 * i_row)
        ties = tl.load(p_found + 2 * i_row + 1)
    b_nearer, b_tied = tl.zeros([BL], tl.int32), tl.zeros([BL], tl.int32)
    for i_l in range(0, tl.minimum(start, ranked), BL):
        b_d = tl.load(p_d + i_l + o_l, mask=i_l + o_l < tl.minimum(start, ranked), other=-1)
        b_nearer += ((b_d >= 0) & (b_d < found)).to(tl.int32)
        b_tied += (b_d == found).to(tl.int32)
    tied = tl.sum(b_tied, 0)
    count = tl.sum(b_nearer, 0) + tl.minimum(tied, ties)
    # A row that is not ranked is read whole.
    count += tl.where(ranked == 0, start, 0)
    p_page = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    p_logical = p_page + list_stride
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    for i_l in range(start, tl.minimum(start + chunk, pages), BL):
        o_page = i_l + o_l
        m_page = o_page < ranked
        b_d = tl.load(p_d + o_page, mask=m_page, other=NEVER)
        m_tied = ((b_d == found) & m_page).to(tl.int32)
        tie = tied + tl.cumsum(m_tied, 0) - m_tied
        m_chosen = ((b_d < found) & m_page) | ((m_tied > 0) & (tie < ties))
        # The last page is read always.
        m_chosen = (m_chosen | (o_page >= ranked)) & (o_page < pages)
        chosen = m_chosen.to(tl.int32)
        position = count + tl.cumsum(chosen, 0) - chosen
        b_page = tl.load(p_table + o_page, mask=m_chosen, other=0).to(tl.int32)
        tl.store(p_page + position, b_page, mask=m_chosen)
        tl.store(p_logical + position, o_page, mask=m_chosen)
        count += tl.sum(chosen, 0)
        tied += tl.sum(m_tied, 0)
    last = tl.maximum(pages - 1, 0)
    if (start <= last) & (last < start + chunk):
        tl.store(p_listed_count + i_row, count)
        if COUNT:
            tl.atomic_add(p_counters + PAGES_READ, count.to(tl.int64), sem="relaxed")
            if (i_h == 0) & (ranked > 0):
                one = tl.minimum(ranked, 1).to(tl.int64)
                tl.atomic_add(p_counters + SPARSE_STEPS, one, sem="relaxed")
