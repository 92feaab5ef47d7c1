"""The pages of a fixed budget, ranked by Quest's bound (arXiv 2406.10774), on the device."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .pages import MOST_PAGES, NEVER, list_rest, load_statistics, places, ranked_pages
from .scores import allow_next, await_previous, load_queries, load_scales

# Distances are whole steps, so many between the best page and the worst: nearly as fine as what
# fp32 tells apart of scores.
STEPS = tl.constexpr(1 << 21)
# Of a long row the distances are counted in classes of so many steps; the last class that the
# budget reaches has few members, which are told apart one by one.
CLASS_STEPS = tl.constexpr(1 << 10)
CLASSES = tl.constexpr((1 << 21) // (1 << 10))


@triton.jit
def box_kernel(
    p_query, p_statistics, p_block_table, p_seq_lens, p_exact_rows, p_alpha, p_slopes,
    p_reach, p_page_maximum, p_page_minimum, p_histogram, p_member_count,
    s_query_b, s_query_h, s_page, s_head, s_block_table, page_stride, exact_below,
    scale, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BP: tl.constexpr, S: tl.constexpr, ALIBI: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, EXACT_ROWS: tl.constexpr, LONG: tl.constexpr,
    CHAINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Quest's upper bounds of the scores z of pages, per query head, and the largest and the least
    of a split.

    With k between minimum and maximum, q.k <= max(q, 0).maximum + min(q, 0).minimum.
    """
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    if LONG and i_s == 0:
        o_class = tl.arange(0, CLASSES)
        tl.store(p_histogram + i_row * CLASSES + o_class, tl.zeros_like(o_class))
        tl.store(p_member_count + i_row, 0)
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
        b_bound = tl.dot(b_low.to(b_q.dtype), b_below, input_precision="ieee")
        b_bound = tl.dot(b_high.to(b_q.dtype), b_above, b_bound, input_precision="ieee")
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
    G: tl.constexpr, GP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """How far below a head's best page each page lies, for the head to which it matters most."""
    o_g, o_s = tl.arange(0, GP), tl.arange(0, SP)
    o_own = (i_row * G + o_g)[:, None] * S + o_s[None, :]
    m_own = (o_g < G)[:, None] & (o_s < S)[None, :]
    b_peak = tl.max(tl.load(p_page_maximum + o_own, mask=m_own, other=-float("inf")), 1)  # [GP]
    b_least = tl.min(tl.load(p_page_minimum + o_own, mask=m_own, other=float("inf")), 1)
    width = tl.max(tl.where(o_g < G, b_peak - b_least, 0.0), 0)
    p_r = p_reach + (i_row * G).to(tl.int64) * page_stride
    b_distance = tl.full([o_page.shape[0]], float("inf"), tl.float32)
    for i_g in tl.static_range(G):
        peak = tl.max(tl.where(o_g == i_g, b_peak, -float("inf")), 0)
        b_r = tl.load(p_r + i_g * page_stride + o_page, mask=o_page < ranked, other=0.0)
        b_distance = tl.minimum(b_distance, peak - b_r)
    steps = tl.where(width > 0.0, STEPS / width, 0.0)
    # Also what is no number is far.
    b_steps = tl.minimum(b_distance * steps, STEPS * 1.0 - 1.0)
    return tl.where(o_page < ranked, b_steps.to(tl.int32), NEVER)


@triton.jit
def box_distance_kernel(
    p_seq_lens, p_exact_rows, p_reach, p_page_maximum, p_page_minimum, p_distance, p_histogram,
    page_stride, exact_below,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, P: tl.constexpr, BL: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, EXACT_ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The distances of one tile of a long row's pages, and the row's histogram of their classes."""
    await_previous(CHAINED)
    allow_next(CHAINED)
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    if i_t * BL >= ranked:
        return
    o_page = i_t * BL + tl.arange(0, BL)
    b_d = load_distances(
        p_reach, p_page_maximum, p_page_minimum, i_row, o_page, ranked, page_stride, G, GP, S, SP
    )
    tl.store(p_distance + i_row.to(tl.int64) * page_stride + o_page, b_d, mask=o_page < ranked)
    p_class = p_histogram + i_row * CLASSES + (b_d // CLASS_STEPS)
    tl.atomic_add(p_class, tl.full([BL], 1, tl.int32), mask=o_page < ranked, sem="relaxed")


@triton.jit
def rank_kernel(
    p_seq_lens, p_exact_rows, p_distance, p_histogram, p_tile_count, p_rank, p_members,
    p_member_count,
    page_stride, exact_below, budget,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, NT: tl.constexpr,
    EXACT_ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Counts the pages of one tile in classes that the budget holds whole, and collects those of
    the class after them, in any order; with the first tile, says which class that is and how many
    pages come before it."""
    await_previous(CHAINED)
    allow_next(CHAINED)
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    if i_t * BL >= ranked:
        return
    o_page, o_class = i_t * BL + tl.arange(0, BL), tl.arange(0, CLASSES)
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    b_d = tl.load(p_d + o_page, mask=o_page < ranked, other=NEVER)
    b_histogram = tl.load(p_histogram + i_row * CLASSES + o_class)
    m_whole = tl.cumsum(b_histogram, 0) <= budget
    last = tl.sum(m_whole.to(tl.int32), 0)
    b_class = b_d // CLASS_STEPS
    tl.store(p_tile_count + i_row * NT + i_t, tl.sum((b_class < last).to(tl.int32), 0))
    m_member = b_class == last
    b_before, _, members, _ = places(m_member, m_member, BL)
    first = tl.atomic_add(p_member_count + i_row, members, sem="relaxed")
    b_key = b_d % CLASS_STEPS * MOST_PAGES + o_page
    p_m = p_members + i_row.to(tl.int64) * page_stride
    tl.store(p_m + first + b_before, b_key, mask=m_member)
    if i_t == 0:
        tl.store(p_rank + 2 * i_row, last)
        tl.store(p_rank + 2 * i_row + 1, tl.sum(tl.where(m_whole, b_histogram, 0), 0))


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def choose_kernel(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_maximum, p_page_minimum,
    p_listed, p_listed_count, p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, P: tl.constexpr, BL: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, EXACT_ROWS: tl.constexpr, COUNT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the `budget` nearest pages of one row of at most BL pages in their order; of pages as
    near, the earlier."""
    await_previous(CHAINED)
    allow_next(CHAINED)
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    pages = (n + P - 1) // P
    o_l = tl.arange(0, BL)
    b_distance = load_distances(
        p_reach, p_page_maximum, p_page_minimum, i_row, o_l, ranked, page_stride, G, GP, S, SP
    )
    # At most `budget` pages are nearer than `found`, and more are nearer than `far`.
    found, far = tl.full([], 0, tl.int32), tl.full([], STEPS, tl.int32)
    nearer, within = tl.full([], 0, tl.int32), ranked
    if budget >= ranked:
        found, nearer = far, nearer + budget
    rounds = 0
    while (far - found > 1) & (nearer < budget):
        # Two trials on either side of where the last page is expected, so far apart that it likely
        # lies between them; at the thirds where that helps no more.
        width, members = (far - found).to(tl.float32), (within - nearer).to(tl.float32)
        share = (budget - nearer).to(tl.float32) / members
        margin = 2.0 * tl.sqrt(share * (1.0 - share) / members)
        margin = tl.minimum(tl.maximum(margin, tl.where(rounds < 2, 1.0 / 16, 0.0)), 1.0 / 6)
        thirds = (members < 25.0) | (rounds >= 8)
        share, margin = tl.where(thirds, 0.5, share), tl.where(thirds, 1.0 / 6, margin)
        low, high = ((share - margin) * width).to(tl.int32), ((share + margin) * width).to(tl.int32)
        low = tl.minimum(tl.maximum(found + low, found + 1), far - 1)
        high = tl.minimum(tl.maximum(found + high, found + 1), far - 1)
        # Both counts are below 2 ** 16, so one sum serves both.
        counts = (b_distance < low).to(tl.int32) + ((b_distance < high).to(tl.int32) << 16)
        counts = tl.sum(counts, 0)
        count_low, count_high = counts & 0xFFFF, counts >> 16
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
    m_nearer, m_tied = b_distance < found, (b_distance == found) & (o_l < ranked)
    b_nearer, b_tied, all_nearer, all_tied = places(m_nearer, m_tied, BL)
    m_chosen = m_nearer | (m_tied & (b_tied < ties))
    b_position = b_nearer + tl.minimum(b_tied, ties)
    chosen = all_nearer + tl.minimum(all_tied, ties)
    # A row that is not ranked is read whole.
    m_whole = o_l < tl.where(ranked == 0, pages, 0)
    b_position = tl.where(m_whole, o_l, b_position)
    m_chosen = m_chosen | m_whole
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    b_page = tl.load(p_table + o_l, mask=m_chosen, other=0).to(tl.int32)
    tl.store(p_list + b_position, b_page, mask=m_chosen)
    tl.store(p_list + list_stride + b_position, o_l, mask=m_chosen)
    list_rest(
        p_table, p_list, p_listed_count, p_counters, i_row, i_h, chosen, ranked, pages,
        list_stride, COUNT,
    )  # fmt: skip
