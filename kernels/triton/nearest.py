"""The pages of a fixed budget: those that lie nearest below the best page of any query head.

One program lists those of a short row, or each that reads the row does. Long rows take two launches
of many programs: a sample of the pages tells between which distances the last page of the budget
lies; pages before are counted, the few between are collected, and among these every program finds
the last one by itself. Which rows are short is seen at run time, where block tables have room for
long ones.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .certificate import mark_unread
from .entmax import sum_pairs
from .pages import (
    NEVER,
    WARP,
    count_read,
    list_last,
    list_rest,
    load_table,
    places,
    ranked_pages,
    store_pages,
)
from .scores import allow_next, await_previous

# Distances are whole steps, so many between the best page and the worst: nearly as fine as what
# fp32 tells apart of scores.
STEPS = tl.constexpr(1 << 21)
# Pages of a long row that stand for all, at most.
SAMPLED = tl.constexpr(2048)
# How far the last page of the budget may lie from where the sample has it, in standard deviations.
DEVIATIONS = tl.constexpr(4.0)


@triton.jit
def load_reach(p_reach, o_page, count, G: tl.constexpr, GW: tl.constexpr):
    """How high the scores of pages reach for each head of a group, [BL, GW]; 0 from page `count`.

    p_reach: [pages, GW].
    """
    o_g = tl.arange(0, GW)
    mask = (o_page < count)[:, None] & (o_g < G)[None, :]
    return tl.load(p_reach + o_page[:, None] * GW + o_g[None, :], mask=mask, other=0.0)


@triton.jit
def load_extremes(
    p_page_extreme, i_row, G: tl.constexpr, GW: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr
):
    """The largest and the negated least reach of each head of a group in each split,
    [PSP, 2 * GW]."""
    o_s, o_e = tl.arange(0, PSP), tl.arange(0, 2 * GW)
    mask = (o_s < PS)[:, None] & (o_e < 2 * G)[None, :]
    p_e = p_page_extreme + i_row * (PS * 2 * GW) + o_s[:, None] * (2 * GW) + o_e[None, :]
    return tl.load(p_e, mask=mask, other=-float("inf"))


@triton.jit
def row_scale(b_extreme, GW: tl.constexpr):
    """The highest reach of each query head [GW], and steps per unit of the scores."""
    b_peak, b_least = tl.split(tl.reshape(tl.max(b_extreme, 0), [GW, 2]))
    width = tl.max(b_peak + b_least, 0)
    return b_peak, tl.where(width > 0.0, STEPS / width, 0.0)


@triton.jit
def measure(b_reach, b_peak, steps, o_page, count, G: tl.constexpr):
    """How far below a head's best page each page lies [BL], for the head to which it matters most;
    NEVER from page `count` on."""
    m_g = (tl.arange(0, b_reach.shape[1]) < G)[None, :]
    b_distance = tl.min(tl.where(m_g, b_peak[None, :] - b_reach, float("inf")), 1)
    # Also what is no number is far.
    b_steps = tl.minimum(b_distance * steps, STEPS * 1.0 - 1.0)
    return tl.where(o_page < count, b_steps.to(tl.int32), NEVER)


@triton.jit
def narrow(found, nearer, far, trial, count, wanted):
    """What `find` knows once `count` pages were found below a trial, in whatever order it tries."""
    within = count <= wanted
    farther = within & (trial > found)
    nearer = tl.where(farther, count, nearer)
    return tl.where(farther, trial, found), nearer, tl.where(within, far, tl.minimum(far, trial))


@triton.jit
def find(b_distance, found, far, within, wanted, slack):
    """The largest distance below which lie at most `wanted` of at most 2 ** 16 pages, and how many
    do; any such distance if they are at least `wanted - slack`.

    No page lies below `found`, and `within` below `far`, which is returned if these are not more
    than wanted.
    """
    nearer = tl.full([], 0, tl.int32)
    # Loops take no numbers that are known to the compiler for what they change.
    found, far, within, wanted = nearer + found, nearer + far, nearer + within, nearer + wanted
    if wanted >= within:
        found, nearer = far, wanted
    while (far - found > 1) & (nearer < wanted - slack):
        # Four trials, about the fifths; 51 / 256 is a little less than one.
        fifth = (far - found) * 51
        first = found + tl.maximum(fifth >> 8, 1)
        second = found + tl.maximum(fifth * 2 >> 8, 1)
        third = found + tl.maximum(fifth * 3 >> 8, 1)
        fourth = found + tl.maximum(fifth * 4 >> 8, 1)
        # Counts are at most 2 ** 16 - 1, so one sum serves two.
        b_low = (b_distance < first).to(tl.uint32) + ((b_distance < second).to(tl.uint32) << 16)
        b_high = (b_distance < third).to(tl.uint32) + ((b_distance < fourth).to(tl.uint32) << 16)
        low, high = sum_pairs((b_low, b_high))
        found, nearer, far = narrow(found, nearer, far, fourth, (high >> 16).to(tl.int32), wanted)
        found, nearer, far = narrow(found, nearer, far, third, (high & 0xFFFF).to(tl.int32), wanted)
        found, nearer, far = narrow(found, nearer, far, second, (low >> 16).to(tl.int32), wanted)
        found, nearer, far = narrow(found, nearer, far, first, (low & 0xFFFF).to(tl.int32), wanted)
    return found, nearer


@triton.jit
def count_tiles(p_distance, distance, stop, BL: tl.constexpr):
    """How many of the first `stop` pages of a row are nearer than a distance, and how many are as
    near."""
    o_l = tl.arange(0, BL)
    b_nearer, b_tied = tl.zeros([BL], tl.int32), tl.zeros([BL], tl.int32)
    for i_l in range(0, stop, BL):
        b_d = tl.load(p_distance + i_l + o_l, mask=i_l + o_l < stop, other=NEVER)
        b_nearer += (b_d < distance).to(tl.int32)
        b_tied += (b_d == distance).to(tl.int32)
    return tl.sum(b_nearer, 0), tl.sum(b_tied, 0)


@triton.jit
def find_in_row(p_distance, ranked, wanted, BL: tl.constexpr):
    """What `find` says of all pages of a row, of which more than wanted are ranked."""
    found, far = tl.full([], 0, tl.int32), tl.full([], STEPS, tl.int32)
    nearer = tl.full([], 0, tl.int32)
    while (far - found > 1) & (nearer < wanted):
        middle = found + (far - found) // 2
        count, _ = count_tiles(p_distance, middle, ranked, BL)
        if count <= wanted:
            found, nearer = middle, count
        else:
            far = middle
    return found, nearer


@triton.jit
def place_nearest(
    b_distance, found, ties, before, tied_before, BL: tl.constexpr, CHAINED: tl.constexpr
):
    """Places in the list, NEVER of the others, of those of BL neighbouring pages that are nearer
    than `found`, and of a row's pages that are as near of the earliest `ties`.

    before, tied_before: how many of either kind come before these.
    """
    m_nearer, m_tied = b_distance < found, b_distance == found
    b_nearer, b_tied, _, _ = places(m_nearer, m_tied, BL, CHAINED)
    b_tied += tied_before
    m_chosen = m_nearer | (m_tied & (b_tied < ties))
    return tl.where(m_chosen, before + b_nearer + tl.minimum(b_tied, ties), NEVER)


@triton.jit
def list_few(
    p_table, p_reach, p_page_extreme, p_list, p_unread, i_row, i_s, ranked, pages, list_stride,
    page_stride, budget,
    G: tl.constexpr, GW: tl.constexpr, PAGES: tl.constexpr, S: tl.constexpr, BL: tl.constexpr,
    PS: tl.constexpr, PSP: tl.constexpr, CERTIFY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Awaits the launch before; lists those pages of a row of at most BL but the last one that
    are chosen and that split i_s reads: the `budget` nearest, of pages as near the earlier; all
    that it reads, if the row is read whole."""
    o_page = tl.arange(0, BL)
    b_page = tl.load(p_table + o_page, mask=o_page < pages, other=0).to(tl.int32)
    await_previous(CHAINED)
    b_place = tl.where(o_page < pages, o_page, NEVER)
    if ranked > 0:
        p_r = p_reach + i_row.to(tl.int64) * page_stride * GW
        b_reach = load_reach(p_r, o_page, ranked, G, GW)
        b_extreme = load_extremes(p_page_extreme, i_row, G, GW, PS, PSP)
        # Loads are moved to where they are needed, but not past this: they go out together.
        tl.debug_barrier()
        b_peak, steps = row_scale(b_extreme, GW)
        b_distance = measure(b_reach, b_peak, steps, o_page, ranked, G)
        found, nearer = find(b_distance, 0, STEPS, ranked, budget, 0)
        b_place = place_nearest(b_distance, found, budget - nearer, 0, 0, BL, CHAINED)
    m_own = (b_place < NEVER) & (b_place // PAGES % S == i_s)
    store_pages(p_list, b_place, b_page, o_page, m_own, list_stride)
    if CERTIFY and i_s == 0:
        mark_unread(p_unread, i_row, o_page, b_place < NEVER, ranked, page_stride)


@triton.jit
def list_own(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed,
    p_listed_count, p_unread, p_counters, i_b, i_h, i_row, i_s, s_block_table, list_stride,
    page_stride, exact_below, budget,
    G: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, PAGES: tl.constexpr, S: tl.constexpr,
    BL: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr, EXACT_ROWS: tl.constexpr,
    CERTIFY: tl.constexpr, COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Awaits the launch before; lists the chosen pages of one short row, of at most BL pages, that
    split i_s reads, in their order: of S splits every S-th PAGES.

    Every split stores their number, the same, and reads what it has stored itself. A row of few
    pages is not made to pay for the room that others have.
    """
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    pages = (n + P - 1) // P
    p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    last_page = tl.load(p_table + tl.maximum(pages - 1, 0), mask=pages > 0, other=0).to(tl.int32)
    FEW: tl.constexpr = max(BL // 8, WARP)
    if pages <= FEW:
        list_few(
            p_table, p_reach, p_page_extreme, p_list, p_unread, i_row, i_s, ranked, pages,
            list_stride, page_stride, budget, G, GW, PAGES, S, FEW, PS, PSP, CERTIFY, CHAINED,
        )  # fmt: skip
    else:
        list_few(
            p_table, p_reach, p_page_extreme, p_list, p_unread, i_row, i_s, ranked, pages,
            list_stride, page_stride, budget, G, GW, PAGES, S, BL, PS, PSP, CERTIFY, CHAINED,
        )  # fmt: skip
    chosen = tl.minimum(budget, ranked)
    if chosen // PAGES % S == i_s:
        list_last(p_list, last_page, chosen, ranked, list_stride)
    tl.store(p_listed_count + i_row, chosen + pages - ranked)
    if COUNT and i_s == 0:
        count_read(p_counters, i_h, chosen + pages - ranked, ranked)
    # The program's other threads stored some of what a thread reads.
    tl.debug_barrier()


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def choose_kernel(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed, p_listed_count,
    p_unread, p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, G: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, BL: tl.constexpr,
    PS: tl.constexpr, PSP: tl.constexpr, EXACT_ROWS: tl.constexpr, CERTIFY: tl.constexpr,
    COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the chosen pages of one short row in their order."""
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    list_own(
        p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed,
        p_listed_count, p_unread, p_counters, i_b, i_h, i_b * HKV + i_h, 0, s_block_table,
        list_stride, page_stride, exact_below, budget, G, GW, P, 1, 1, BL, PS, PSP, EXACT_ROWS,
        CERTIFY, COUNT, CHAINED,
    )  # fmt: skip
    allow_next(CHAINED)


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def distance_kernel(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_page_sample,
    p_distance, p_tile_count, p_bracket, p_members, p_member_count, p_listed, p_listed_count,
    p_unread, p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, G: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, BL: tl.constexpr,
    NT: tl.constexpr, BM: tl.constexpr, ALONE: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    STEP: tl.constexpr, EXACT_ROWS: tl.constexpr, CERTIFY: tl.constexpr, COUNT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """The distances of one tile of a long row's pages; counts those before where the sample has
    the last page of the budget, and collects those about there, in any order.

    Of a row of at most ALONE pages the first program lists the chosen ones.

    STEP: one page in so many is sampled. p_members: [rows, 2, BM], distances and pages.
    """
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    short = (n + P - 1) // P <= ALONE
    if short & (i_t == 0):
        list_own(
            p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed,
            p_listed_count, p_unread, p_counters, i_b, i_h, i_row, 0, s_block_table,
            list_stride, page_stride, exact_below, budget, G, GW, P, 1, 1, ALONE, PS, PSP,
            EXACT_ROWS, CERTIFY, COUNT, CHAINED,
        )  # fmt: skip
    else:
        await_previous(CHAINED)
    allow_next(CHAINED)
    if short | (i_t * BL >= ranked):
        return
    o_page, o_sample = i_t * BL + tl.arange(0, BL), tl.arange(0, SAMPLED)
    samples = (ranked + STEP - 1) // STEP
    p_r = p_reach + i_row.to(tl.int64) * page_stride * GW
    b_sample = load_reach(p_page_sample + i_row * SAMPLED * GW, o_sample, samples, G, GW)
    b_reach = load_reach(p_r, o_page, ranked, G, GW)
    b_extreme = load_extremes(p_page_extreme, i_row, G, GW, PS, PSP)
    tl.debug_barrier()
    b_peak, steps = row_scale(b_extreme, GW)
    b_sample = measure(b_sample, b_peak, steps, o_sample, samples, G)
    b_distance = measure(b_reach, b_peak, steps, o_page, ranked, G)
    tl.store(
        p_distance + i_row.to(tl.int64) * page_stride + o_page, b_distance, mask=o_page < ranked
    )

    share = tl.minimum(budget / ranked.to(tl.float32), 1.0)
    rank = share * samples.to(tl.float32)
    margin = DEVIATIONS * tl.sqrt(rank * (1.0 - share)) + 1.0
    slack = (margin * 0.25).to(tl.int32)
    lower = tl.maximum(rank - margin, 0.0).to(tl.int32)
    low, _ = find(b_sample, 0, STEPS, samples, lower, slack)
    upper = (rank + margin).to(tl.int32) + 1 + slack
    high, _ = find(b_sample, low, STEPS, samples, upper, slack)
    # Where no distance has the wanted number of samples below it, the next one has more.
    high += 1
    m_before, m_member = b_distance < low, (b_distance >= low) & (b_distance < high)
    b_place, _, members, _ = places(m_member, m_member, BL, CHAINED)
    tl.store(p_tile_count + i_row * NT + i_t, tl.sum(m_before.to(tl.int32), 0))
    if i_t == 0:
        tl.store(p_bracket + 2 * i_row, low)
        tl.store(p_bracket + 2 * i_row + 1, high)
    b_place += tl.atomic_add(p_member_count + i_row, members, sem="relaxed")
    p_m = p_members + i_row.to(tl.int64) * (2 * BM) + b_place
    m_member &= b_place < BM
    tl.store(p_m, b_distance, mask=m_member)
    tl.store(p_m + BM, o_page, mask=m_member)


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def list_nearest_kernel(
    p_seq_lens, p_exact_rows, p_block_table, p_distance, p_tile_count, p_bracket, p_members,
    p_member_count, p_listed, p_listed_count, p_unread, p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, NT: tl.constexpr, BM: tl.constexpr,
    ALONE: tl.constexpr, EXACT_ROWS: tl.constexpr, CERTIFY: tl.constexpr, COUNT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the chosen pages of one tile of a long row, and with the first tile the last page.
    Rows of at most ALONE pages are listed already.

    Where the sample was wrong, or the pages about the last one are more than there is room for,
    it looks at all distances of the row.
    """
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    pages = (n + P - 1) // P
    p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
    first = i_t * BL
    o_page, o_t, o_m = first + tl.arange(0, BL), tl.arange(0, NT), tl.arange(0, BM)
    b_page, last_page = load_table(p_block_table, i_b, o_page, pages, s_block_table)
    await_previous(CHAINED)
    allow_next(CHAINED)
    if pages <= ALONE:
        return
    b_place = tl.where(o_page < pages, o_page, NEVER)
    if first < ranked:
        p_d = p_distance + i_row.to(tl.int64) * page_stride
        b_distance = tl.load(p_d + o_page, mask=o_page < ranked, other=NEVER)
        b_count = tl.load(p_tile_count + i_row * NT + o_t, mask=o_t * BL < ranked, other=0)
        members = tl.load(p_member_count + i_row)
        low, high = tl.load(p_bracket + 2 * i_row), tl.load(p_bracket + 2 * i_row + 1)
        wanted = budget - tl.sum(b_count, 0)
        before = tl.sum(tl.where(o_t < i_t, b_count, 0), 0)
        tied_before = tl.full([], 0, tl.int32)
        if budget >= ranked:
            found, ties, before = tl.full([], STEPS, tl.int32), tied_before, first
        elif (wanted >= 0) & (wanted <= members) & (members <= BM):
            p_m = p_members + i_row.to(tl.int64) * (2 * BM) + o_m
            b_member = tl.load(p_m, mask=o_m < members, other=NEVER)
            b_member_page = tl.load(p_m + BM, mask=o_m < members, other=NEVER)
            found, nearer = find(b_member, low, high, members, wanted, 0)
            ties = wanted - nearer
            m_before = b_member_page < first
            counts = (m_before & (b_member < found)).to(tl.int32)
            counts = tl.sum(counts + ((m_before & (b_member == found)).to(tl.int32) << 16), 0)
            before += counts & 0xFFFF
            tied_before = counts >> 16
        else:
            found, nearer = find_in_row(p_d, ranked, budget, BL)
            ties = budget - nearer
            before, tied_before = count_tiles(p_d, found, first, BL)
        b_place = place_nearest(b_distance, found, ties, before, tied_before, BL, CHAINED)
    elif ranked > 0:
        b_place = tl.full([BL], NEVER, tl.int32)
    store_pages(p_list, b_place, b_page, o_page, b_place < NEVER, list_stride)
    if CERTIFY:
        mark_unread(p_unread, i_row, o_page, b_place < NEVER, ranked, page_stride)
    if i_t == 0:
        list_rest(
            p_list, last_page, p_listed_count, p_counters, i_row, i_h, tl.minimum(budget, ranked),
            ranked, pages, list_stride, COUNT,
        )  # fmt: skip
