"""The first kernel of entmax prefill: the threshold of each row, and the key units above it.

Bounds come from more and more keys: from the last ones that the tile sees, then from a sample of
those before them, then from all. A subset's threshold is a lower bound, and so is what a Newton
step gives (see `entmax`). A unit that has no score above the bound has none above the threshold:
each pass reads only the units that had such a score in the pass before.

Tiles that have a sample read all keys at a guess instead, which is nearer to the threshold than
the sample's bound. A mass of at least one proves that it is a lower bound too; else a Newton step
down from it gives one, at which all keys are read again.

With rough sums the flagged units are first read at a likely threshold, where the mass may be less
than one. A Newton step from there is one of the convex norm of the keys in these units, which has
the same root: it leads to a lower bound from either side.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import longest_step, newton_step
from .prefill_guess import guess_step, guess_thresholds
from .prefill_lists import (
    keep_flagged,
    listed_rows,
    masked_keys,
    masked_scores,
    masked_units,
    next_rows,
)
from .prefill_rough import (
    BACK,
    LEAST,
    bound_step,
    bound_step_down,
    likely_step,
    rough_moments,
    scaled_rows,
    sum_bounds,
    unscaled,
)
from .prefill_tiles import (
    UNIT,
    any_flag,
    heads_in_turn,
    key_tiles,
    load_rows,
    load_tile,
    moments,
    next_pages,
    score,
    tile_keys,
    tile_of,
    tile_offsets,
)

# Newton steps from the last keys alone, whose scores are in registers.
RECENT_STEPS = tl.constexpr(2)
# Of a lower bound, but for rounding.
LEAST_MASS = tl.constexpr(1.0 - 4e-6)
# Mass below which a step down would depend on its rounding.
LITTLE_MASS = tl.constexpr(0.25)
# Mass from which differences of the sums are exact enough to tell what a step leaves.
MOST_MASS = tl.constexpr(4.0)


@triton.jit
def recent_scores(
    rows, b_base, p_key, p_table, s_page, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BN: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores of the last BN keys that the tile sees, of which every row sees one."""
    position, count, lowest = rows[5], rows[6], rows[7]
    o_key = position + count - BN + tl.arange(0, BN)
    m_key = o_key >= lowest
    o_key = tl.where(m_key, o_key, position + count)  # one that no row sees
    b_z, _ = masked_scores(
        rows, b_base, p_key, p_table, o_key, m_key, s_page, D, DP, P, ALIBI, WINDOW
    )
    return b_z


@triton.jit
def guess_tile(
    rows, m_row, p_base, p_key, p_table, b_zero, first, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    SAMPLED: tl.constexpr, GUESSED: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Base, lower bound and guess [BM] from the last keys and a sample of those from `first` on."""
    b_exponent, last = rows[3], rows[5] + rows[6]
    b_base = tl.zeros_like(b_exponent)
    b_z = recent_scores(rows, b_base, p_key, p_table, s_page, D, DP, P, BN, ALIBI, WINDOW)
    if rows[0].dtype == tl.float32:
        b_peak = tl.max(b_z, 1)
        b_base = tl.where(b_peak > -float("inf"), b_peak, 0.0)
        tl.store(p_base, b_base)
        # Once more, that its scores are less the base in one rounding, as all later ones.
        b_z = recent_scores(rows, b_base, p_key, p_table, s_page, D, DP, P, BN, ALIBI, WINDOW)
    # No finite bound and no visible key make NaN of their difference.
    b_tau = tl.where(m_row, tl.maximum(tl.max(b_z, 1) - 1.0, LEAST), float("inf"))
    b_mass, b_power, _, _ = moments(rows, b_z, b_tau, None, ORDER)
    for _ in tl.static_range(RECENT_STEPS):
        b_tau += newton_step(tl.sum(b_mass, 1), tl.sum(b_power, 1), 1.0, b_exponent, ORDER)
        b_mass, b_power, _, _ = moments(rows, b_z, b_tau, None, ORDER)
    b_bound, b_tau = guess_thresholds(
        rows, b_base, p_key, p_table, b_tau, tl.sum(b_mass, 1), tl.sum(b_power, 1), b_zero,
        first, tl.maximum(last - BN, first), s_page, D, DP, P, BN,
        SAMPLED, GUESSED, ORDER, ALIBI, WINDOW, STAGES,
    )  # fmt: skip
    return b_base, b_bound, tl.where(m_row, b_tau, float("inf"))


@triton.jit
def gather_flags(p_words, b_flags, b_tile_flags, i_t, count, EACH: tl.constexpr):
    """Adds the EACH flags of tile i_t of `count` to those of the tiles before it, and stores them
    where their word is complete; returns those of a word that is not."""
    b_flags |= b_tile_flags << (i_t % (32 // EACH) * EACH)
    complete = ((i_t + 1) % (32 // EACH) == 0) | (i_t == count - 1)
    if complete:
        tl.store(p_words + i_t // (32 // EACH), any_flag(b_flags))
    return tl.where(complete, 0, b_flags)


@triton.jit
def add_all(
    rows, b_base, p_key, p_table, p_words, b_tau, b_zero, first, count, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass and power [BM] of `count` tiles of keys from the multiple `first` of BN on, from
    `rough_moments`, and flags of the units. The loads as in `prefill_guess.add_sample`."""
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    rows, b_base, b_tau = scaled_rows(rows, b_base, b_tau, ORDER)
    b_mass, b_power = b_zero, b_zero
    each: tl.constexpr = BN // UNIT.value
    b_flags = tl.zeros([rows[0].shape[0] // 16, 8, 4], tl.int32)
    b_next = next_pages(p_table, first, 0, count, BN, P)
    for i_t in tl.range(0, count, num_stages=STAGES):
        b_offset = tile_offsets(b_next, first, i_t, s_page, BN, D, P)
        b_next = next_pages(p_table, first, i_t + 1, count, BN, P)
        o_key = first + tile_keys(i_t, BN)
        b_k = load_rows(p_key, b_offset, o_n, o_d, D, MASKED=False)
        b_z = score(rows, b_base, b_k, o_key, ALIBI, WINDOW, MASKED=False)
        b_tile_mass, b_tile_power, b_tile_flags, _ = rough_moments(rows, b_z, b_tau, ORDER)
        b_mass += b_tile_mass
        b_power += b_tile_power
        b_flags = gather_flags(p_words, b_flags, b_tile_flags, i_t, count, each)
    return unscaled(rows, tl.sum(b_mass, 1), tl.sum(b_power, 1), ORDER)


@triton.jit
def add_listed(
    rows, b_base, p_key, lists, p_words, b_tau, b_margin, b_mass, b_power, b_count, count,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds those of the first `count` listed key tiles, and flags units as `add_all`."""
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    each: tl.constexpr = BN // UNIT.value
    b_flags = tl.zeros([rows[0].shape[0] // 16, 8, 4], tl.int32)
    b_next, o_next = next_rows(lists, 0, count, BN, ALIBI)
    for i_t in tl.range(0, count, num_stages=STAGES):
        b_offset, o_key = listed_rows(b_next, o_next, BN, D)
        b_next, o_next = next_rows(lists, i_t + 1, count, BN, ALIBI)
        b_k = load_rows(p_key, b_offset, o_n, o_d, D, MASKED=False)
        b_z = score(rows, b_base, b_k, o_key, ALIBI, WINDOW, MASKED=False)
        b_tile_mass, b_tile_power, b_tile_count, b_tile_flags = moments(
            rows, b_z, b_tau, b_margin, ORDER
        )
        b_mass += b_tile_mass
        b_power += b_tile_power
        b_count += b_tile_count
        b_flags = gather_flags(p_words, b_flags, b_tile_flags, i_t, count, each)
    return b_mass, b_power, b_count


@triton.jit
def add_masked(
    rows, b_base, p_key, p_table, edges, b_tau, b_margin, b_zero, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The moments of the key tiles that need masks."""
    b_mass, b_power, b_count = b_zero, b_zero, b_zero
    for i_t in tl.range(0, tl.cdiv(masked_units(edges), BN // UNIT), num_stages=1):
        o_key, m_key = masked_keys(rows, edges, i_t, BN)
        b_z, _ = masked_scores(
            rows, b_base, p_key, p_table, o_key, m_key, s_page, D, DP, P, ALIBI, WINDOW
        )
        b_tile_mass, b_tile_power, b_tile_count, _ = moments(rows, b_z, b_tau, b_margin, ORDER)
        b_mass += b_tile_mass
        b_power += b_tile_power
        b_count += b_tile_count
    return b_mass, b_power, b_count


@triton.jit
def read_all(
    rows, b_base, p_key, p_table, p_words, edges, b_tau, b_zero, first, count, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass and power [BM] of all keys, and the flags of the units that no row needs masks for."""
    b_row_mass, b_row_power = add_all(
        rows, b_base, p_key, p_table, p_words, b_tau, b_zero, first, count,
        s_page, D, DP, P, BN, ORDER, ALIBI, WINDOW, STAGES,
    )  # fmt: skip
    b_mass, b_power, _ = add_masked(
        rows, b_base, p_key, p_table, edges, b_tau, None, b_zero,
        s_page, D, DP, P, BN, ORDER, ALIBI, WINDOW,
    )  # fmt: skip
    return b_row_mass + tl.sum(b_mass, 1), b_row_power + tl.sum(b_power, 1)


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
    batch, first_tile, slab, window, scale, factor, exponent, excess_mass, left_mass,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    ORDER: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, SAMPLED: tl.constexpr, GUESSED: tl.constexpr,
):  # fmt: skip
    """Thresholds of all heads of alpha > 1. A program takes one (tile, KV head) after the other.

    Programs that run together have the same KV head, whose keys stay in L2, unless it holds those
    of all heads.
    """
    each: tl.constexpr = BN // UNIT.value
    i_p = tl.program_id(0).to(tl.int64)
    lists = p_units + i_p * s_list, p_offsets + i_p * s_list
    together = heads_in_turn(p_key, p_seq_lens, batch, HKV, D)
    item = tl.atomic_add(p_tickets, 1, sem="relaxed")
    while item < slab * HKV:
        i_h, i_slab = tile_of(item, slab, together)
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

            b_zero = tl.zeros([BM, 8], tl.float32)
            _first, whole, after, _stop = key_tiles(position, count, lowest, window, BN, WINDOW)
            b_base, b_bound, b_tau = guess_tile(
                rows, m_row, p_base + o_row, p_k, p_table, b_zero, whole * BN, s_page,
                D, DP, P, BN, SAMPLED, GUESSED, ORDER, ALIBI, WINDOW, STAGES,
            )  # fmt: skip

            start, units = whole * each, (after - whole) * each
            edges = lowest // UNIT, start, start + units, (position + count - 1) // UNIT + 1
            keys = position + count - lowest
            b_row_mass, b_row_power = b_tau, b_tau
            unproved = 1
            while unproved > 0:
                b_row_mass, b_row_power = read_all(
                    rows, b_base, p_k, p_table, p_word, edges, b_tau, b_zero, whole * BN,
                    after - whole, s_page, D, DP, P, BN, ORDER, ALIBI, WINDOW, STAGES,
                )  # fmt: skip
                b_least, b_most = sum_bounds(rows, b_row_mass, b_row_power, keys, BN, ORDER)
                # A guess with less mass than one is above the threshold.
                m_wrong = (b_least[0] < LEAST_MASS) & (b_tau > b_bound)
                unproved = tl.max(m_wrong.to(tl.int32), 0)
                if unproved > 0:
                    b_step = bound_step_down(b_least, b_most, b_exponent, ORDER)
                    b_bound = tl.where(m_wrong, tl.maximum(b_tau + b_step, b_bound), b_tau)
                    b_tau = b_bound
            b_least, b_most = sum_bounds(rows, b_row_mass, b_row_power, keys, BN, ORDER)
            b_likely, b_margin = likely_step(
                rows, m_row, b_row_mass, b_row_power, keys, left_mass, ORDER
            )
            b_tau += tl.maximum(bound_step(b_least, b_most, b_exponent, ORDER), b_likely)
            # Such that their difference is exact.
            b_margin = tl.where(m_row, b_tau - (b_tau - b_margin), 0.0)
            kept = keep_flagged(lists, p_word, p_table, start, units, s_page, each, D, P, BC, True)
            unfinished = 1
            while unfinished > 0:
                b_mass, b_power, b_count = add_masked(
                    rows, b_base, p_k, p_table, edges, b_tau, b_margin, b_zero,
                    s_page, D, DP, P, BN, ORDER, ALIBI, WINDOW,
                )  # fmt: skip
                b_mass, b_power, b_count = add_listed(
                    rows, b_base, p_k, lists, p_word, b_tau, b_margin, b_mass, b_power, b_count,
                    kept // each, D, DP, BN, ORDER, ALIBI, WINDOW, STAGES,
                )  # fmt: skip
                b_row_mass, b_row_power = tl.sum(b_mass, 1), tl.sum(b_power, 1)
                # Down from a likely threshold to a lower bound, but not past the one before it, and
                # as far as that where little mass is left, which rounding may have changed much.
                b_step = guess_step(b_row_mass, b_row_power, 1.0, b_exponent, ORDER)
                b_step = tl.where(b_row_mass >= LITTLE_MASS, b_step, LEAST)
                b_step = tl.maximum(b_step, b_margin * (-1.0 / BACK))
                m_above = b_step < -b_margin
                # Units are flagged down to the margin.
                if tl.max(m_above.to(tl.int32), 0) == 0:
                    kept = keep_flagged(
                        lists, p_word, p_table, start, kept, s_page, each, D, P, BC, False
                    )
                m_unfinished = tl.abs(b_row_mass - 1.0) > excess_mass
                m_unfinished &= b_tau + b_step != b_tau
                b_last = b_step
                if ORDER == 2:
                    # Often enough after one step from far more mass.
                    b_row_count = tl.sum(b_count, 1)
                    b_left = b_row_mass - b_step * (2.0 * b_row_power - b_step * b_row_count)
                    m_near = (b_row_mass < MOST_MASS) & (b_left <= 1.0 + 2.0 * left_mass)
                    m_unfinished &= ~m_near
                    b_longest = longest_step(b_row_mass, b_row_power, b_row_count)
                    b_last = tl.where(m_near, 0.5 * (b_step + b_longest), b_step)
                unfinished = tl.max((m_unfinished | m_above).to(tl.int32), 0)
                b_tau += tl.where(unfinished > 0, b_step, b_last)
                b_margin = tl.zeros_like(b_margin)
            tl.store(p_tau + o_row, b_tau)
            tl.debug_barrier()
            mark_kept(lists[0], p_word, start, kept, tl.cdiv(units, 32), BC)
        # The list is the next tile's now.
        tl.debug_barrier()
        item = tl.atomic_add(p_tickets, 1, sem="relaxed")
