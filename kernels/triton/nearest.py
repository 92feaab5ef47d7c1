"""The pages of a fixed budget: those that lie nearest below the best page of any query head.

One program lists those of a short row, or each that reads the row does. Which rows are short is
seen at run time, where block tables have room for long ones.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import sum_pairs
from .pages import (
    NEVER,
    WARP,
    count_listed,
    count_read,
    gathered_places,
    list_last,
    places,
    ranked_pages,
    store_pages,
    sum_by_thread,
)
from .scores import allow_next, await_previous

# Distances are whole steps, so many between the best page and the worst: nearly as fine as what
# fp32 tells apart of scores.
STEPS = tl.constexpr(1 << 21)


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
def are_nearer(b_distance, trial):
    """1 for pages nearer than a trial, 0 for others, by the sign of the difference: for comparisons
    the compiler takes one predicate, and each waits for the one before."""
    return (b_distance - trial).to(tl.uint32, bitcast=True) >> 31


@triton.jit
def count_nearer(b_distance, trials):
    """For each page whether it is nearer than each of four trials, 1 or 0: two words [BL] of two
    numbers of 16 bits each. Counts are at most 2 ** 16 - 1, so a sum of words serves two."""
    b_low = are_nearer(b_distance, trials[0]) + (are_nearer(b_distance, trials[1]) << 16)
    b_high = are_nearer(b_distance, trials[2]) + (are_nearer(b_distance, trials[3]) << 16)
    return b_low, b_high


@triton.jit
def try_four(b_distance, found, far, b_rest=None):
    """Four distances between two, rising, and how many of at most 2 ** 16 pages are nearer than
    each."""
    # About the fifths; 51 / 256 is a little less than one.
    fifth = (far - found) * 51
    first = found + tl.maximum(fifth >> 8, 1)
    second = found + tl.maximum(fifth * 2 >> 8, 1)
    third = found + tl.maximum(fifth * 3 >> 8, 1)
    fourth = found + tl.maximum(fifth * 4 >> 8, 1)
    trials = (first, second, third, fourth)
    b_low, b_high = count_nearer(b_distance, trials)
    if b_rest is not None:
        b_rest_low, b_rest_high = count_nearer(b_rest, trials)
        b_low = sum_by_thread(b_low) + sum_by_thread(b_rest_low)
        b_high = sum_by_thread(b_high) + sum_by_thread(b_rest_high)
    low, high = sum_pairs((b_low, b_high))
    return (
        trials,
        (
            (low & 0xFFFF).to(tl.int32),
            (low >> 16).to(tl.int32),
            (high & 0xFFFF).to(tl.int32),
            (high >> 16).to(tl.int32),
        ),
    )


@triton.jit
def last_within(found, nearer, trials, counts, wanted):
    """The largest of rising distances below which lie at most `wanted` pages, and how many do."""
    for i in tl.static_range(4):
        found = tl.where(counts[i] <= wanted, trials[i], found)
        nearer = tl.where(counts[i] <= wanted, counts[i], nearer)
    return found, nearer


@triton.jit
def first_beyond(far, trials, counts, wanted):
    """The least of rising distances below which lie more than `wanted` pages."""
    for i in tl.static_range(3, -1, -1):
        far = tl.where(counts[i] > wanted, trials[i], far)
    return far


@triton.jit
def find(b_distance, found, far, nearer, within, wanted, slack, b_rest=None):
    """The largest distance below which lie at most `wanted` of at most 2 ** 16 pages, and how many
    do; any such distance if they are at least `wanted - slack`.

    b_distance, b_rest: [BL] and, of more pages, [BR], as many as a program has threads or more.

    `nearer` pages lie below `found`, not more than wanted, and `within` below `far`, which is
    returned if these are not more than wanted.
    """
    # Loops take no numbers that are known to the compiler for what they change.
    none = tl.full([], 0, tl.int32)
    found, far, nearer, within = none + found, none + far, none + nearer, none + within
    if wanted >= within:
        found, nearer = far, wanted
    while (far - found > 1) & (nearer < wanted - slack):
        trials, counts = try_four(b_distance, found, far, b_rest)
        found, nearer = last_within(found, nearer, trials, counts, wanted)
        far = first_beyond(far, trials, counts, wanted)
    return found, nearer


@triton.jit
def place_nearest(
    b_distance, found, ties, before, tied_before, BL: tl.constexpr, CHAINED: tl.constexpr
):
    """Places in the list, NEVER of the others, of those of BL neighbouring pages that are nearer
    than `found`, and of a row's pages that are as near of the earliest `ties`.

    before, tied_before: how many of either kind come before these. Also returns how many come
    before the pages after them; of those as near only where any is wanted, by `ties`, which is the
    same for all pages of a row. Only then are pages listed in their order.
    """
    if ties > 0:
        b_nearer, b_tied, nearer, tied = places(
            b_distance < found, b_distance == found, BL, CHAINED
        )
        b_tied += tied_before
        m_chosen = (b_distance < found) | ((b_distance == found) & (b_tied < ties))
        b_place = tl.where(m_chosen, before + b_nearer + tl.minimum(b_tied, ties), NEVER)
    else:
        tied = tl.full([], 0, tl.int32)
        b_place, nearer = gathered_places(b_distance < found, before)
        b_place = tl.where(b_distance < found, b_place, NEVER)
    return b_place, before + nearer, tied_before + tied


@triton.jit
def list_few(
    p_table, p_reach, p_page_extreme, p_list, i_row, i_s, ranked, pages, list_stride,
    page_stride, budget,
    G: tl.constexpr, GW: tl.constexpr, PAGES: tl.constexpr, S: tl.constexpr, BL: tl.constexpr,
    BR: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Awaits the launch before; lists those pages of a row of at most BL + BR but the last one that
    are chosen and that split i_s reads: the `budget` nearest, of pages as near the earlier; all
    that it reads, if the row is read whole."""
    o_page = tl.arange(0, BL)
    b_page = tl.load(p_table + o_page, mask=o_page < pages, other=0).to(tl.int32)
    if BR > 0:
        o_rest = BL + tl.arange(0, BR)
        b_rest_page = tl.load(p_table + o_rest, mask=o_rest < pages, other=0).to(tl.int32)
    await_previous(CHAINED)
    b_place = tl.where(o_page < pages, o_page, NEVER)
    if BR > 0:
        b_rest_place = tl.where(o_rest < pages, o_rest, NEVER)
    if ranked > 0:
        p_r = p_reach + i_row.to(tl.int64) * page_stride * GW
        b_reach = load_reach(p_r, o_page, ranked, G, GW)
        if BR > 0:
            b_rest_reach = load_reach(p_r, o_rest, ranked, G, GW)
        b_extreme = load_extremes(p_page_extreme, i_row, G, GW, PS, PSP)
        # Loads are moved to where they are needed, but not past this: they go out together.
        tl.debug_barrier()
        b_peak, steps = row_scale(b_extreme, GW)
        b_distance = measure(b_reach, b_peak, steps, o_page, ranked, G)
        b_rest = None
        if BR > 0:
            b_rest = measure(b_rest_reach, b_peak, steps, o_rest, ranked, G)
        found, nearer = find(b_distance, 0, STEPS, 0, ranked, budget, 0, b_rest)
        ties = budget - nearer
        b_place, before, tied = place_nearest(b_distance, found, ties, 0, 0, BL, CHAINED)
        if BR > 0:
            b_rest_place, _, _ = place_nearest(b_rest, found, ties, before, tied, BR, CHAINED)
    store_own(p_list, b_place, b_page, o_page, i_s, PAGES, S, list_stride)
    if BR > 0:
        store_own(p_list, b_rest_place, b_rest_page, o_rest, i_s, PAGES, S, list_stride)


@triton.jit
def store_own(
    p_list, b_place, b_page, o_page, i_s, PAGES: tl.constexpr, S: tl.constexpr, list_stride
):
    """Stores those of chosen pages that split i_s reads: of S splits every S-th PAGES."""
    m_own = (b_place < NEVER) & (b_place.to(tl.uint32) // PAGES % S == i_s)
    store_pages(p_list, b_place, b_page, o_page, m_own, list_stride)


@triton.jit
def list_own(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed,
    p_listed_count, p_counters, i_b, i_h, i_row, i_s, s_block_table, list_stride,
    page_stride, exact_below, budget,
    G: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, PAGES: tl.constexpr, S: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    EXACT_ROWS: tl.constexpr, COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Awaits the launch before; lists the chosen pages of one short row, of at most BL + BR pages,
    that split i_s reads: of S splits every S-th PAGES of the list. Returns how many there are.

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
            p_table, p_reach, p_page_extreme, p_list, i_row, i_s, ranked, pages,
            list_stride, page_stride, budget, G, GW, PAGES, S, FEW, 0, PS, PSP, CHAINED,
        )  # fmt: skip
    else:
        list_few(
            p_table, p_reach, p_page_extreme, p_list, i_row, i_s, ranked, pages,
            list_stride, page_stride, budget, G, GW, PAGES, S, BL, BR, PS, PSP, CHAINED,
        )  # fmt: skip
    chosen = tl.minimum(budget, ranked)
    if chosen // PAGES % S == i_s:
        list_last(p_list, last_page, chosen, ranked, list_stride)
    listed = count_listed(n, ranked, budget, P)
    tl.store(p_listed_count + i_row, listed)
    if COUNT and i_s == 0:
        count_read(p_counters, i_h, listed, ranked)
    # The program's other threads stored some of what a thread reads.
    tl.debug_barrier()
    return listed


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def choose_kernel(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed, p_listed_count,
    p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, G: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, BL: tl.constexpr,
    BR: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr, EXACT_ROWS: tl.constexpr,
    COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the chosen pages of one short row."""
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    list_own(
        p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed,
        p_listed_count, p_counters, i_b, i_h, i_b * HKV + i_h, 0, s_block_table,
        list_stride, page_stride, exact_below, budget, G, GW, P, 1, 1, BL, BR, PS, PSP, EXACT_ROWS,
        COUNT, CHAINED,
    )  # fmt: skip
    allow_next(CHAINED)
