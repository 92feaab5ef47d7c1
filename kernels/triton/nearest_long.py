"""The pages of a fixed budget, of rows that are too long for one program to rank.

Several programs rank a tile of the pages each. A sample tells all of them between which distances
the last page of the budget lies. Where few pages are wanted, those before and between are
collected, and the program that comes last finds the last page among them and lists the chosen ones.
Else pages before are counted, those between collected, and another launch of as many programs lists
the chosen ones, each of its own tile.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .nearest import (
    STEPS,
    find,
    first_beyond,
    last_within,
    list_own,
    load_extremes,
    load_reach,
    measure,
    place_nearest,
    row_scale,
    try_four,
)
from .pages import (
    NEVER,
    gathered_places,
    list_rest,
    load_table,
    places,
    ranked_pages,
    store_pages,
)
from .scores import allow_next, await_previous

# Pages of a long row that stand for all, at most.
SAMPLED = tl.constexpr(2048)
# How far the last page of the budget may lie from where the sample has it, in standard deviations.
DEVIATIONS = tl.constexpr(4.0)


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
def bracket(b_distance, within, lower, upper, slack):
    """A distance below which lie at most `lower` of `within` pages, how many do, and a distance
    below which lie more than `upper - slack` but hardly more than `upper`.

    The first is as large as shows while the last one is sought.
    """
    none = tl.full([], 0, tl.int32)
    low, below, found, nearer, far = none, none, none, none, none + STEPS
    if upper >= within:
        found, nearer = far, none + upper
    while (far - found > 1) & (nearer < upper - slack):
        trials, counts = try_four(b_distance, found, far)
        low, below = last_within(low, below, trials, counts, lower)
        found, nearer = last_within(found, nearer, trials, counts, upper)
        far = first_beyond(far, trials, counts, upper)
    # Where no distance has the wanted number of pages below it, the next one has more.
    return low, below, found + 1


@triton.jit
def list_by_distances(
    p_block_table, p_distance, p_list, i_b, i_row, ranked, s_block_table, list_stride,
    page_stride, budget,
    BL: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the chosen pages of one long row by the distances of all."""
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    found, nearer = tl.full([], STEPS, tl.int32), budget
    if budget < ranked:
        found, nearer = find_in_row(p_d, ranked, budget, BL)
    before, tied_before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i_l in range(0, ranked, BL):
        o_page = i_l + tl.arange(0, BL)
        b_distance = tl.load(p_d + o_page, mask=o_page < ranked, other=NEVER)
        b_page, _ = load_table(p_block_table, i_b, o_page, ranked, s_block_table)
        b_place, before, tied_before = place_nearest(
            b_distance, found, budget - nearer, before, tied_before, BL, CHAINED
        )
        store_pages(p_list, b_place, b_page, o_page, b_place < NEVER, list_stride)


@triton.jit
def load_candidates(
    p_candidates, p_tile_count, i_row, ranked, page_stride,
    BL: tl.constexpr, NT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The first BF candidates of a row, in their order: distances, numbers in the sequence and
    physical pages [BF]; how many there are in all, and how many of them are chosen for certain.

    p_candidates: [rows, 3, page_stride], those of each BL pages from the place of the first one on.
    p_tile_count: [rows, NT], both numbers of a tile as one.
    """
    o_f = tl.arange(0, BF)
    o_place, total, certain = o_f, 0, 0
    for i_t in tl.static_range(NT):
        both = tl.load(p_tile_count + i_row * NT + i_t, mask=i_t * BL < ranked, other=0)
        total += both & 0xFFFF
        certain += both >> 16
        # Those of the next tile lie at its beginning.
        o_place += tl.where(o_f >= total, BL - (both & 0xFFFF), 0)
    p_c = p_candidates + i_row.to(tl.int64) * (3 * page_stride) + o_place.to(tl.uint32)
    b_distance = tl.load(p_c, mask=o_f < total, other=NEVER)
    b_logical = tl.load(p_c + page_stride, mask=o_f < total, other=0)
    b_page = tl.load(p_c + 2 * page_stride, mask=o_f < total, other=0)
    return b_distance, b_logical, b_page, total, certain


@triton.jit
def list_candidates(
    p_block_table, p_distance, p_tile_count, p_candidates, p_list, i_b, i_row, low, high,
    ranked, s_block_table, list_stride, page_stride, budget,
    BL: tl.constexpr, NT: tl.constexpr, BF: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the chosen pages of one long row among its candidates, which lie nearer than `high`.

    Where the sample was wrong, or the candidates are more than BF, it looks at all distances.
    """
    b_distance, b_logical, b_page, total, certain = load_candidates(
        p_candidates, p_tile_count, i_row, ranked, page_stride, BL, NT, BF
    )
    if (certain <= budget) & (budget <= total) & (total <= BF):
        found, nearer = find(b_distance, low, high, certain, total, budget, 0)
        b_place, _, _ = place_nearest(b_distance, found, budget - nearer, 0, 0, BF, CHAINED)
        store_pages(p_list, b_place, b_page, b_logical, b_place < NEVER, list_stride)
    else:
        list_by_distances(
            p_block_table, p_distance, p_list, i_b, i_row, ranked, s_block_table,
            list_stride, page_stride, budget, BL, CHAINED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def distance_kernel(
    p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_page_sample,
    p_distance, p_tile_count, p_bracket, p_members, p_member_count, p_listed, p_listed_count,
    p_counters, p_candidates,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, G: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, BL: tl.constexpr,
    NT: tl.constexpr, BM: tl.constexpr, ALONE: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    STEP: tl.constexpr, BF: tl.constexpr, EXACT_ROWS: tl.constexpr,
    COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The distances of one tile of a long row's pages. A sample tells between which distances the
    last page of the budget lies; pages before are counted, those between collected in any order.

    Of a row of at most ALONE pages the first program lists the chosen ones.

    STEP: one page in so many is sampled. p_members: [rows, 2, BM], distances and pages.
    BF: unless it is 0, both kinds are collected in their order, and the program of the row that
    comes last lists the chosen ones, if they are at most BF; rows read whole are listed as well.
    """
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    pages = (n + P - 1) // P
    short = pages <= ALONE
    o_page = i_t * BL + tl.arange(0, BL)
    if BF > 0:
        b_page, last_page = load_table(p_block_table, i_b, o_page, pages, s_block_table)
    if short & (i_t == 0):
        list_own(
            p_block_table, p_seq_lens, p_exact_rows, p_reach, p_page_extreme, p_listed,
            p_listed_count, p_counters, i_b, i_h, i_row, 0, s_block_table,
            list_stride, page_stride, exact_below, budget, G, GW, P, 1, 1, ALONE, 0, PS, PSP,
            EXACT_ROWS, COUNT, CHAINED,
        )  # fmt: skip
    else:
        await_previous(CHAINED)
    allow_next(CHAINED)
    if short:
        return
    if BF > 0:
        p_list = p_listed + i_row.to(tl.int64) * (2 * list_stride)
        if ranked == 0:
            b_place = tl.where(o_page < pages, o_page, NEVER)
            store_pages(p_list, b_place, b_page, o_page, b_place < NEVER, list_stride)
        if i_t == 0:
            list_rest(
                p_list, last_page, p_listed_count, p_counters, i_row, i_h,
                tl.minimum(budget, ranked), ranked, pages, list_stride, COUNT,
            )  # fmt: skip
    if i_t * BL >= ranked:
        return
    o_sample = tl.arange(0, SAMPLED)
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
    slack = (margin * 0.5).to(tl.int32)
    lower = tl.maximum(rank - margin, 0.0).to(tl.int32)
    upper = (rank + margin).to(tl.int32) + 1 + slack
    low, below, high = bracket(b_sample, samples, lower, upper, slack)
    if BF > 0:
        m_candidate = b_distance < high
        b_place, _, candidates, certain = places(m_candidate, b_distance < low, BL, CHAINED)
        tl.store(p_tile_count + i_row * NT + i_t, candidates + (certain << 16))
        p_c = p_candidates + i_row.to(tl.int64) * (3 * page_stride) + i_t * BL + b_place
        tl.store(p_c, b_distance, mask=m_candidate)
        tl.store(p_c + page_stride, o_page, mask=m_candidate)
        tl.store(p_c + 2 * page_stride, b_page, mask=m_candidate)
        # All that the program has stored is seen by the one that comes last.
        tl.debug_barrier()
        come = tl.atomic_add(p_member_count + i_row, 1, sem="acq_rel")
        if (come + 1) * BL >= ranked:
            list_candidates(
                p_block_table, p_distance, p_tile_count, p_candidates, p_list, i_b, i_row,
                low, high, ranked, s_block_table, list_stride, page_stride, budget, BL, NT, BF,
                CHAINED,
            )  # fmt: skip
    else:
        # Of many pages only those about the last one are collected.
        low, _ = find(b_sample, low, high, below, samples, lower, slack)
        if i_t == 0:
            tl.store(p_bracket + 2 * i_row, low)
            tl.store(p_bracket + 2 * i_row + 1, high)
        m_before, m_member = b_distance < low, (b_distance >= low) & (b_distance < high)
        b_place, members = gathered_places(m_member, 0)
        tl.store(p_tile_count + i_row * NT + i_t, tl.sum(m_before.to(tl.int32), 0))
        b_place += tl.atomic_add(p_member_count + i_row, members, sem="relaxed")
        p_m = p_members + i_row.to(tl.int64) * (2 * BM) + b_place
        m_member &= b_place < BM
        tl.store(p_m, b_distance, mask=m_member)
        tl.store(p_m + BM, o_page, mask=m_member)


@triton.jit(do_not_specialize=["list_stride", "page_stride", "s_block_table"])
def list_nearest_kernel(
    p_seq_lens, p_exact_rows, p_block_table, p_distance, p_tile_count, p_bracket, p_members,
    p_member_count, p_listed, p_listed_count, p_counters,
    s_block_table, list_stride, page_stride, exact_below, budget,
    HKV: tl.constexpr, P: tl.constexpr, BL: tl.constexpr, NT: tl.constexpr, BM: tl.constexpr,
    ALONE: tl.constexpr, EXACT_ROWS: tl.constexpr, COUNT: tl.constexpr,
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
            found, nearer = find(b_member, low, high, 0, members, wanted, 0)
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
        b_place, _, _ = place_nearest(b_distance, found, ties, before, tied_before, BL, CHAINED)
    elif ranked > 0:
        b_place = tl.full([BL], NEVER, tl.int32)
    store_pages(p_list, b_place, b_page, o_page, b_place < NEVER, list_stride)
    if i_t == 0:
        list_rest(
            p_list, last_page, p_listed_count, p_counters, i_row, i_h, tl.minimum(budget, ranked),
            ranked, pages, list_stride, COUNT,
        )  # fmt: skip
