"""The first kernel of entmax prefill: the threshold of each row, and the key units above it.

Bounds come from more and more keys: from the last ones that the tile sees, then from a sample of
those before them, then from all. A subset's threshold is a lower bound, and so is what a Newton
step from a lower bound gives (see `entmax`). A unit that has no score above the bound has none
above the threshold: each pass reads only the units that had such a score in the pass before.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import newton_step
from .prefill_lists import (
    PAST,
    append_masked,
    keep_flagged,
    listed_count,
    listed_keys,
    listed_rows,
)
from .prefill_tiles import (
    UNIT,
    above,
    any_flag,
    flag_units,
    key_tiles,
    load_rows,
    load_tile,
    moments,
    row_offsets,
    score,
    seen_keys,
    spaced_offsets,
    spaced_pages,
    visible,
)

# Newton steps from the last keys alone, whose scores are in registers.
RECENT_STEPS = tl.constexpr(3)
LEAST = tl.constexpr(-3e38)


@triton.jit
def recent_scores(
    rows, b_base, p_key, p_table, s_page, i_t, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BN: tl.constexpr, TILES: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores of tile i_t of the last TILES * BN keys that the tile of queries sees."""
    position, count, lowest = rows[5], rows[6], rows[7]
    first = tl.maximum(position + count - TILES * BN, lowest) + i_t * BN
    o_key = first + tl.arange(0, BN)
    m_key = o_key < position + count
    b_k = load_rows(p_key, row_offsets(p_table, o_key, m_key, s_page, D, P), m_key, D, DP)
    b_z = score(rows, b_base, b_k, o_key, ALIBI)
    return tl.where(visible(rows, o_key, WINDOW), b_z, -float("inf"))


@triton.jit
def tile_sums(b_z, b_tau, b_exponent, ORDER: tl.constexpr):
    """`moments` of all units together, [BM, 4] each."""
    b_mass, b_power = moments(above(b_z, b_tau), b_exponent, ORDER)
    return tl.sum(b_mass, 1), tl.sum(b_power, 1)


@triton.jit
def add_sample(
    rows, b_base, p_key, p_table, b_tau, b_mass, b_power, first, count, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, SPACE: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the moments of `count` tiles of keys, SPACE positions apart, from the multiple `first`
    of BN on, which all rows see."""
    o_n = tl.arange(0, BN)
    stop = first + count * BN * SPACE
    # Pages are loaded an iteration ahead: a load that waits for another one in the same iteration
    # would take the stages of the pipeline.
    b_next = spaced_pages(p_table, first, 0, stop, BN, SPACE, P)
    for i_t in tl.range(0, count, num_stages=STAGES):
        o_key, b_page = first + (i_t * BN + o_n) * SPACE, b_next
        b_next = spaced_pages(p_table, first, i_t + 1, stop, BN, SPACE, P)
        b_offset = spaced_offsets(b_page, o_key, s_page, BN, SPACE, D, P)
        m_key = o_n * SPACE < stop - first - i_t * (BN * SPACE)
        b_k = load_rows(p_key, b_offset, m_key, D, DP)
        b_z = score(rows, b_base, b_k, o_key, ALIBI)
        b_tile_mass, b_tile_power = tile_sums(b_z, b_tau, rows[3], ORDER)
        b_mass += b_tile_mass
        b_power += b_tile_power
    return b_mass, b_power


@triton.jit
def add_all(
    rows, b_base, p_key, p_table, p_words, b_tau, tiles, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Moments of all key tiles, [BM, 4] each. Of those that every row sees whole the units with a
    score above the bound are flagged; the loads as in `add_sample`."""
    first, whole, after, last = tiles
    o_n = tl.arange(0, BN)
    each: tl.constexpr = BN // UNIT.value
    b_mass = tl.zeros([rows[0].shape[0], 4], tl.float32)
    b_power = tl.zeros([rows[0].shape[0], 4], tl.float32)
    b_flags = tl.zeros([rows[0].shape[0] // 16, 8, 4], tl.int32)
    start, stop = first * BN, rows[5] + rows[6]
    b_next = spaced_pages(p_table, start, 0, stop, BN, 1, P)
    for i_t in tl.range(0, last - first, num_stages=STAGES):
        o_key, b_page = start + i_t * BN + o_n, b_next
        b_next = spaced_pages(p_table, start, i_t + 1, stop, BN, 1, P)
        b_offset = spaced_offsets(b_page, o_key, s_page, BN, 1, D, P)
        m_key = seen_keys(start + i_t * BN, rows[7], stop, BN, WINDOW)
        b_k = load_rows(p_key, b_offset, m_key, D, DP)
        b_x = above(score(rows, b_base, b_k, o_key, ALIBI), b_tau)
        edge = (first + i_t >= after) | (first + i_t < whole)
        if edge:
            b_x = tl.where(visible(rows, o_key, WINDOW), b_x, 0.0)
        b_unit_mass, b_unit_power = moments(b_x, rows[3], ORDER)
        b_mass += tl.sum(b_unit_mass, 1)
        b_power += tl.sum(b_unit_power, 1)
        b_tile_flags = flag_units(b_unit_mass, b_unit_power, ORDER)
        b_flags |= tl.where(edge, 0, b_tile_flags) << (i_t % (32 // each) * each)
        complete = ((i_t + 1) % (32 // each) == 0) | (i_t == last - first - 1)
        if complete:
            tl.store(p_words + i_t // (32 // each), any_flag(b_flags))
        b_flags = tl.where(complete, 0, b_flags)
    return b_mass, b_power


@triton.jit
def add_listed(
    rows, b_base, p_key, lists, p_words, b_tau, whole, keys,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Moments of the `keys` listed keys, [BM, 4] each, and for alpha 1.5 how many fours of keys
    have one above the bound. Units of the first `whole` tiles, which need no masks, are flagged."""
    p_units, p_offsets = lists
    o_n = tl.arange(0, BN)
    each: tl.constexpr = BN // UNIT.value
    b_mass = tl.zeros([rows[0].shape[0], 4], tl.float32)
    b_power = tl.zeros([rows[0].shape[0], 4], tl.float32)
    b_fours = tl.zeros([rows[0].shape[0], 4], tl.float32)
    b_flags = tl.zeros([rows[0].shape[0] // 16, 8, 4], tl.int32)
    count = tl.cdiv(keys, BN)
    b_next = listed_rows(p_offsets, 0, keys, BN)
    for i_t in tl.range(0, count, num_stages=STAGES):
        b_offset, o_key = b_next + o_n % UNIT * D, o_n
        b_next = listed_rows(p_offsets, i_t + 1, keys, BN)
        b_k = load_rows(p_key, b_offset, o_n < keys - i_t * BN, D, DP)
        if ALIBI:
            o_key = listed_keys(p_units, i_t, BN)
        b_x = above(score(rows, b_base, b_k, o_key, ALIBI), b_tau)
        if i_t >= whole:
            o_edge = tl.where(o_n < keys - i_t * BN, listed_keys(p_units, i_t, BN), PAST)
            b_x = tl.where(visible(rows, o_edge, WINDOW), b_x, 0.0)
        b_unit_mass, b_unit_power = moments(b_x, rows[3], ORDER)
        b_mass += tl.sum(b_unit_mass, 1)
        b_power += tl.sum(b_unit_power, 1)
        if ORDER == 2:
            b_fours += tl.sum((b_unit_power > 0.0).to(tl.float32), 1)
        b_flags |= flag_units(b_unit_mass, b_unit_power, ORDER) << (i_t % (32 // each) * each)
        complete = ((i_t + 1) % (32 // each) == 0) | (i_t == count - 1)
        if complete:
            tl.store(p_words + i_t // (32 // each), any_flag(b_flags))
        b_flags = tl.where(complete, 0, b_flags)
    return b_mass, b_power, b_fours


@triton.jit
def raise_bound(
    p_tau, b_tau, b_mass, b_power, b_exponent, keys, excess_mass, ORDER: tl.constexpr
):  # fmt: skip
    """Stores the bounds a Newton step further; returns whether that is not exact for a row.

    keys: how many may be above the bound.
    """
    b_mass, b_power = tl.sum(b_mass, 1), tl.sum(b_power, 1)
    b_step = newton_step(b_mass, b_power, 1.0, b_exponent, ORDER)
    tl.store(p_tau, b_tau + b_step)
    m_unfinished = (b_mass > 1.0 + excess_mass) & (b_tau + b_step > b_tau)
    if ORDER == 2:
        # Of each key above the bound (x - step) ** 2 is at least what is left of its weight.
        b_left = b_mass - b_step * (2.0 * b_power - b_step * keys)
        m_unfinished &= b_left > 1.0 + excess_mass
    return tl.max(m_unfinished.to(tl.int32), 0)


@triton.jit
def mark_kept(p_units, p_words, start, kept, words, BC: tl.constexpr):
    """Flags of the units kept, by their positions, for the next kernel."""
    o_c = tl.arange(0, BC)
    for i_c in tl.range(0, words, BC, num_stages=1):
        tl.store(p_words + i_c + o_c, 0, mask=i_c + o_c < words)
    tl.debug_barrier()
    for i_c in tl.range(0, kept, BC, num_stages=1):
        m_c = i_c + o_c < kept
        o_unit = tl.load(p_units + i_c + o_c, mask=m_c, other=0) - start
        one = tl.full([BC], 1, tl.int32)
        tl.atomic_or(p_words + o_unit // 32, one << (o_unit % 32), mask=m_c, sem="relaxed")


@triton.jit(
    do_not_specialize=["batch", "first_tile", "slab", "s_words", "s_list", "window"],
    do_not_specialize_on_alignment=["p_block_table", "p_seq_lens", "p_query_start_loc"],
)
def prefill_thresholds_kernel(
    p_query,  # [tokens, HKV * G, D]
    p_key,  # [pages, HKV, P, D]
    p_block_table,  # [batch, max_pages]
    p_seq_lens,  # [batch]
    p_query_start_loc,  # [batch + 1]
    p_alpha,  # [HKV * G] float64
    p_slopes,  # [HKV * G] float32
    p_tickets,  # [2] int32, the first one zero
    p_tau,  # [HKV, slab, BM] float32
    p_base,  # [HKV, slab, BM] float32, for fp32
    p_words,  # [HKV, slab, s_words] int32
    p_units,  # [programs, s_list] int32
    p_offsets,  # [programs, s_list] int64
    s_query_t, s_query_h, s_page, s_head, s_block_table, s_words, s_list,
    batch, first_tile, slab, window, scale, factor, exponent, excess_mass,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    ORDER: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Thresholds of all heads of alpha > 1. A program takes one (tile, KV head) after the other.

    Programs that run together have the same KV head, whose keys stay in L2; late tiles, which
    see the most keys, go first.
    """
    each: tl.constexpr = BN // UNIT.value
    i_p = tl.program_id(0).to(tl.int64)
    lists = p_units + i_p * s_list, p_offsets + i_p * s_list
    item = tl.atomic_add(p_tickets, 1, sem="relaxed")
    while item < slab * HKV:
        i_h, i_slab = item // slab, slab - 1 - item % slab
        i_b, count, _token, _q, _head, m_row, rows = load_tile(
            p_query, p_alpha, p_slopes, p_query_start_loc, p_seq_lens, i_h, first_tile + i_slab,
            s_query_t, s_query_h, batch, window, scale, factor, exponent,
            G, D, DP, BQ, BM, ALPHA_PER_HEAD, ALIBI, WINDOW,
        )  # fmt: skip
        if count > 0:
            b_exponent, position, lowest = rows[3], rows[5], rows[7]
            p_k = p_key + i_h.to(tl.int64) * s_head
            p_table = p_block_table + i_b.to(tl.int64) * s_block_table
            o_row = (i_h * slab + i_slab).to(tl.int64) * BM + tl.arange(0, BM)
            p_word = p_words + (i_h * slab + i_slab).to(tl.int64) * s_words

            # Every row sees one of the recent keys.
            recent: tl.constexpr = (BQ + BN - 1) // BN
            b_base = tl.zeros([BM], tl.float32)
            if rows[0].dtype == tl.float32:
                b_z = recent_scores(
                    rows, b_base, p_k, p_table, s_page, 0, D, DP, P, BN, recent, ALIBI, WINDOW
                )
                b_peak = tl.max(b_z, 1)
                b_base = tl.where(b_peak > -float("inf"), b_peak, 0.0)
                tl.store(p_base + o_row, b_base)
            # No finite bound and no visible key make NaN of their difference.
            b_tau = tl.where(m_row, LEAST, float("inf"))
            b_mass, b_power = tl.zeros([BM, 4], tl.float32), tl.zeros([BM, 4], tl.float32)
            for i_t in tl.static_range(recent):
                b_z = recent_scores(
                    rows, b_base, p_k, p_table, s_page, i_t, D, DP, P, BN, recent, ALIBI, WINDOW
                )
                b_tau = tl.maximum(b_tau, tl.max(b_z, 1) - 1.0)
                for _ in tl.static_range(RECENT_STEPS):
                    b_mass, b_power = tile_sums(b_z, b_tau, b_exponent, ORDER)
                    b_tau += newton_step(
                        tl.sum(b_mass, 1), tl.sum(b_power, 1), 1.0, b_exponent, ORDER
                    )
                b_mass, b_power = tile_sums(b_z, b_tau, b_exponent, ORDER)

            tiles = key_tiles(position, count, lowest, window, BN, WINDOW)
            first, whole, after, last = tiles
            sampled = (position + count - recent * BN - whole * BN) // (BN * SAMPLED)
            b_mass, b_power = add_sample(
                rows, b_base, p_k, p_table, b_tau, b_mass, b_power, whole * BN, sampled, s_page,
                D, DP, P, BN, SAMPLED, ORDER, ALIBI, STAGES,
            )  # fmt: skip
            b_tau += newton_step(tl.sum(b_mass, 1), tl.sum(b_power, 1), 1.0, b_exponent, ORDER)

            b_mass, b_power = add_all(
                rows, b_base, p_k, p_table, p_word, b_tau, tiles, s_page,
                D, DP, P, BN, ORDER, ALIBI, WINDOW, STAGES,
            )  # fmt: skip
            start, units = first * each, (last - first) * each
            edges = lowest // UNIT, whole * each, after * each, (position + count - 1) // UNIT + 1
            kept = keep_flagged(lists, p_word, p_table, start, units, units, s_page, D, P, BC, True)
            listed = append_masked(lists, kept, p_table, edges, s_page, D, P, BC)
            unfinished = raise_bound(
                p_tau + o_row, b_tau, b_mass, b_power, b_exponent, listed * UNIT, excess_mass, ORDER
            )
            # Stored by other threads than will load it.
            tl.debug_barrier()
            while unfinished > 0:
                # Bounds wait in memory: rows that are carried around this loop would be converted
                # between layouts in the loops inside it.
                b_tau = tl.load(p_tau + o_row)
                full = kept // each
                b_mass, b_power, b_fours = add_listed(
                    rows, b_base, p_k, lists, p_word, b_tau, full,
                    listed_count(listed, edges, position + count),
                    D, DP, BN, ORDER, ALIBI, WINDOW, STAGES,
                )  # fmt: skip
                kept = keep_flagged(
                    lists, p_word, p_table, start, kept, full * each, s_page, D, P, BC, False
                )
                listed = append_masked(lists, kept, p_table, edges, s_page, D, P, BC)
                unfinished = raise_bound(
                    p_tau + o_row, b_tau, b_mass, b_power, b_exponent, 4.0 * tl.sum(b_fours, 1),
                    excess_mass, ORDER,
                )  # fmt: skip
                tl.debug_barrier()
            tl.debug_barrier()
            mark_kept(lists[0], p_word, start, kept, tl.cdiv(units, 32), BC)
        # The list is the next tile's now.
        tl.debug_barrier()
        item = tl.atomic_add(p_tickets, 1, sem="relaxed")
