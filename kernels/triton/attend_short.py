"""Entmax attention of one query head over so few tokens that one program holds all their scores."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .attend import load_near, load_values, solve_held, store_head, sum_values
from .certificate import (
    BOUNDED,
    load_query,
    load_unread,
    own_rounding,
    store_certificate,
    sum_unread,
)
from .counters import count_step
from .entmax import head_parameters, newton_step, sum_moments, weigh_scores
from .fallback import any_of, make_up
from .filter import above
from .pages import count_listed, gathered_places, ranked_pages
from .scores import await_previous, page_source, prefetch

# Scores that lie less below the largest one of a head are likely to have weight: with alpha 1.5 the
# threshold of sixteen equal ones lies there.
LIKELY = tl.constexpr(-0.25)
# Newton steps over the largest scores of parts of the splits: a third one changes little.
PEAK_STEPS = tl.constexpr(2)
# Scores that are all solved and looked up; of more, as many of those above a lower bound.
WHOLE = tl.constexpr(2048)


@triton.jit
def entries_of(o_place, S: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, P: tl.constexpr):
    """Entries in the list of a row's pages of the tokens at places of a head's scores."""
    if TILES == 1:
        return o_place // P
    else:
        o_split, o_row = o_place // (TILES * BN), o_place % (TILES * BN)
        return (o_split + o_row // BN * S) * (BN // P) + o_row % BN // P


@triton.jit
def look_up(
    p_score, p_pages, p_near_place, o_near, kept, peak,
    S: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scores, less the peak, of a head's packed places, and their pages and rows in them."""
    m_near = o_near < kept
    o_place = tl.load(p_near_place + o_near, mask=m_near, other=0)
    b_z = tl.load(p_score + o_place, mask=m_near, other=-float("inf")) - peak
    o_entry = entries_of(o_place, S, TILES, BN, P)
    b_page = tl.load(p_pages + o_entry, mask=m_near, other=0).to(tl.int32)
    return b_z, b_page, o_place % P


@triton.jit
def pack_support(b_z, b_slot, tau, p_near_score, p_near_slot):
    """Lists the scores above tau and their slots; returns how many they are."""
    b_position, kept = gathered_places(above(b_z, tau), 0)
    tl.store(p_near_score + b_position, b_z, mask=above(b_z, tau))
    tl.store(p_near_slot + b_position, b_slot, mask=above(b_z, tau))
    return kept


# Unaligned lists have one element per thread in loads, as scattered stores have: no exchange.
@triton.jit(do_not_specialize=["p_score", "p_near_place", "capacity", "page_stride", "rows"])
def attend_short_kernel(
    p_query, p_key, p_value, p_block_table, p_listed, p_listed_count, p_seq_lens, p_exact_rows,
    p_alpha, p_slopes, p_score, p_maximum, p_near_place, p_near_score, p_near_slot, p_near_count,
    p_state, p_words, p_trial_mass, p_partial, p_total, p_support, p_out, p_counters, p_certificate,
    p_bound, p_span, p_unread_mass,
    s_query_b, s_query_h, s_out_b, s_out_h, s_head, s_block_table, list_stride, window,
    capacity, limit, rows, exact_below, scale, factor, exponent, value_scale, page_stride,
    s_certificate, budget,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DS: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, CLASSES: tl.constexpr, TILES: tl.constexpr, FP: tl.constexpr,
    SHARES: tl.constexpr, R: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
    LISTED: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr,
    PS: tl.constexpr, PSP: tl.constexpr, BC: tl.constexpr, BU: tl.constexpr, DC: tl.constexpr,
    EXACT_ROWS: tl.constexpr, CERTIFY: tl.constexpr, COUNT: tl.constexpr, MAKE_UP: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Solves tau of one query head from its stored scores, packs the support and weighs its values,
    for one part in DS of the head size.

    The scores of a head are TILES tiles of BN tokens of each of S splits, which is the capacity of
    their lists, and at most R in all.
    The parts repeat the solution and pack the same into the same place.
    Of more than WHOLE scores those above a lower bound are packed first, as places among them, and
    solved alone, unless they are too many; pages are looked up, and values asked for, of these.

    MAKE_UP: rows that are read whole may have more scores, and are left to all programs together.
    DC: parts that share the bounds of unread pages, which are loaded with the scores.
    """
    i_d, i_hq, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_h = i_hq // G
    i_head = i_b * HKV * G + i_hq
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    ROOM: tl.constexpr = TILES * S * (BN // P)
    listed = None
    if budget is not None or CERTIFY > 0:
        _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    if budget is not None:
        listed = count_listed(n, ranked, budget, P)
    if CERTIFY == BOUNDED:
        parts = load_query(p_query, i_b, i_hq, s_query_b, s_query_h, D, DP)
        slope = tl.load(p_slopes + i_hq) if ALIBI else 0.0
    if MAKE_UP:
        left = any_of(p_exact_rows, rows // HKV)
    await_previous(CHAINED)
    if COUNT and i_d + i_hq == 0:
        count_step(p_counters, n, window, HKV, G, P, WINDOW, LISTED)
    if MAKE_UP and left != 0:
        make_up(
            p_query, p_key, p_value, p_block_table, p_listed, p_listed_count, p_seq_lens,
            p_exact_rows, p_alpha, p_slopes, p_maximum, p_state, p_near_count, p_words,
            p_trial_mass, p_partial, p_total, p_support, p_out, p_counters, p_certificate, p_bound,
            p_span, p_unread_mass, s_query_b, s_query_h, s_out_b, s_out_h, s_page, s_head,
            s_block_table, list_stride, window, limit, rows, exact_below, scale, factor, exponent,
            value_scale, page_stride, s_certificate, HKV, G, GP, D, DP, P, BK, S, SP, CLASSES, FP,
            ROOM, SHARES, WINDOW, LISTED, ALIBI, ALPHA_PER_HEAD, ORDER, PS, PSP, BC, BU, EXACT_ROWS,
            CERTIFY, COUNT,
        )  # fmt: skip
    if ALPHA_PER_HEAD and tl.load(p_alpha + i_hq) == 1.0:
        return
    own_factor, b = head_parameters(p_alpha, factor, exponent, i_hq, i_hq >= 0, ALPHA_PER_HEAD)
    if R > WHOLE:
        o_a = tl.arange(0, SP * CLASSES)
        p_maximum += i_head * (S * CLASSES)
        b_maximum = tl.load(p_maximum + o_a, mask=o_a < S * CLASSES, other=-float("inf"))
    p_pages, _, entries = page_source(
        p_block_table, p_listed, p_listed_count, i_b, i_b * HKV + i_h, n, window, s_block_table,
        list_stride, P, WINDOW, LISTED, listed,
    )  # fmt: skip
    if MAKE_UP and entries > ROOM:
        return
    o_r = tl.arange(0, R)
    o_entry = entries_of(o_r, S, TILES, BN, P)
    # Of one tile of each split the entries are in order.
    m_entry = o_r < entries * P if TILES == 1 else o_entry < entries
    m_entry &= o_r < S * TILES * BN
    # The lists have room for what is read at most, so one begins where the one before ends.
    p_score += (i_head * S).to(tl.int64) * capacity
    b_z = tl.load(p_score + o_r, mask=m_entry, other=-float("inf"))
    if R <= WHOLE:
        b_page = tl.load(p_pages + o_entry, mask=m_entry, other=0).to(tl.int32)
    if CERTIFY > 0:
        unread, spans, b_bound = load_unread(
            p_listed_count, p_bound, p_span, i_b * HKV + i_h, i_head, i_d, n, ranked,
            page_stride, P, PS, PSP, BC, LISTED, CERTIFY,
        )  # fmt: skip
        # Loads are moved to where they are needed, but not past this: they go out together.
        tl.debug_barrier()
    peak = tl.max(b_z if R <= WHOLE else b_maximum, 0)
    # Of an empty row, or one of scores that are no numbers. Differences from the largest score are
    # exact near it, where the threshold may lie closer than the scores' own precision.
    peak = tl.where(peak > -float("inf"), peak, 0.0)
    b_z -= peak
    p_value += i_h.to(tl.int64) * s_head
    p_near_score += (i_head * FP).to(tl.int64) * limit
    p_near_slot += (i_head * FP).to(tl.int64) * limit
    if R <= WHOLE:
        b_slot = b_page * P + o_r % P
        o_value = b_page.to(tl.int64) * s_page + (o_r % P * D + i_d * (DP // DS))
        # Likely ones come while the threshold is solved,
        prefetch(p_value + o_value, b_z > LIKELY, CHAINED)
        tau = solve_held(b_z, -1.0, b, ORDER)
        # and all while slots are packed.
        prefetch(p_value + o_value, b_z > tau, CHAINED)
        kept = pack_support(b_z, b_slot, tau, p_near_score, p_near_slot)
    else:
        # The threshold of the largest scores of parts of the splits is a lower bound.
        lower = tl.full([], -1.0, tl.float32)
        b_maximum -= peak
        for _ in tl.static_range(PEAK_STEPS):
            mass, slope = sum_moments(b_maximum, lower, b, ORDER)
            lower += newton_step(mass, slope, 1.0, b, ORDER)
        b_position, near = gathered_places(above(b_z, lower), 0)
        if near <= WHOLE:
            p_near_place += i_head * R
            tl.store(p_near_place + b_position, o_r, mask=above(b_z, lower))
            # The program's other threads wrote some of what is read.
            tl.debug_barrier()
            o_near = tl.arange(0, WHOLE)
            b_near, b_page, o_token = look_up(
                p_score, p_pages, p_near_place, o_near, near, peak, S, TILES, BN, P
            )
            # Values come while the threshold is solved.
            o_value = b_page.to(tl.int64) * s_page + (o_token * D + i_d * (DP // DS))
            prefetch(p_value + o_value, o_near < near, CHAINED)
            tau = solve_held(b_near, lower, b, ORDER)
            b_slot = b_page * P + o_token
            kept = pack_support(b_near, b_slot, tau, p_near_score, p_near_slot)
        else:
            b_all = tl.load(p_pages + o_entry, mask=m_entry, other=0).to(tl.int32) * P + o_r % P
            tau = solve_held(b_z, lower, b, ORDER)
            kept = pack_support(b_z, b_all, tau, p_near_score, p_near_slot)
    # The program's other threads wrote some of what is read.
    tl.debug_barrier()
    o_v, o_d = tl.arange(0, BV), i_d * (DP // DS) + tl.arange(0, DP // DS)
    o_f = o_v * 0
    b_first = load_near(p_near_score, kept, o_f, o_v, limit, -float("inf"))
    b_first_slot = load_near(p_near_slot, kept, o_f, o_v, limit, 0)
    b_w = weigh_scores(b_first, tau, b, ORDER)  # [BV]
    b_v = load_values(p_value, b_first_slot, b_w, o_d, s_page, D, P)  # [BV, DS]
    rounding = 0.0, 0.0
    if CERTIFY == BOUNDED:
        rounding = own_rounding(parts, own_factor * scale, own_factor * slope, n, D, DP, ALIBI)
    if CERTIFY > 0:
        bound, complete = sum_unread(
            p_bound, p_unread_mass, unread, spans, rounding, b_bound, i_head, i_d, ranked, tau,
            peak, b, page_stride, P, BC, BU, DC, CERTIFY, ORDER, False,
        )  # fmt: skip
    b_acc, total, support = sum_values(
        p_value, p_near_score, p_near_slot, b_w, b_v, kept, o_f, o_v, o_d, kept, limit, tau, b,
        s_page, D, P, BV, ORDER,
    )  # fmt: skip
    if CERTIFY > 0:
        store_certificate(
            p_certificate, p_counters, bound, complete, i_b, i_hq, n, s_certificate, COUNT
        )
    store_head(
        p_out, p_counters, b_acc, total, support, i_b, i_hq, i_d, o_d, n, s_out_b, s_out_h,
        value_scale, D, COUNT,
    )  # fmt: skip
