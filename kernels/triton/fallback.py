"""Entmax attention of the rows that candidates did not serve, over all of their keys.

A guess may have been too high, lists may have overflowed, or the support of a head may be larger
than its program keeps. Programs that attend work on such a row together before they see to their
own heads, and meet between the passes over its keys. What they add up does not depend on how many
they are.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .bracket import NARROW, PASSES, TRIALS, narrow_bracket
from .certificate import (
    BOUNDED,
    load_query,
    load_unread,
    own_rounding,
    store_certificate,
    sum_unread,
)
from .counters import FALLBACKS, SUPPORT
from .entmax import (
    FP16_WEIGHT,
    newton_step,
    weigh,
    weigh_scores,
    weights_and_slopes,
)
from .filter import DONE
from .pages import ranked_pages
from .scores import load_pages, load_queries, load_rows, load_scales, page_source, score_rows
from .together import join, meet
from .values import weighted_columns

# Rows whose flags are looked at together.
FLAGS = tl.constexpr(256)


@triton.jit
def any_of(p_flag, count):
    """Whether any of `count` numbers, of which none is negative, is not 0."""
    o_i = tl.arange(0, FLAGS)
    b_any = tl.zeros([FLAGS], tl.int32)
    for i in range(0, count, FLAGS):
        b_any |= tl.load(p_flag + i + o_i, mask=i + o_i < count, other=0).to(tl.int32)
    return tl.max(b_any, 0) > 0


@triton.jit
def score_tile(
    p_pages, i_t, first, entries, list_stride, p_k, s_page, o_n, o_d, b_q, n,
    window, b_scale, b_slope, b_peak,
    D: tl.constexpr, P: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr,
    ALIBI: tl.constexpr,
):  # fmt: skip
    """Pages [BN] of the tokens of a row's tile i_t, and their scores less the largest, [BN, GP]."""
    o_entry = i_t * (o_n.shape[0] // P) + o_n // P
    b_page, b_logical = load_pages(p_pages, o_entry, first, entries, list_stride, LISTED)
    b_k = load_rows(p_k, b_page, o_n, o_d, s_page, D, P)  # [BN, DP]
    b_z = score_rows(b_k, b_q, b_logical, o_n, n, window, b_scale, b_slope, P, WINDOW, ALIBI)
    return b_page, b_z - b_peak[None, :]


@triton.jit
def left_heads(
    p_alpha, p_state, p_near_count, i_row, i_h, entries, limit, o_g,
    G: tl.constexpr, FP: tl.constexpr, ROOM: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Which heads of a row's group are left, [GP]: those of rows of more than ROOM pages, or if
    that is 0 those whose lists were too short, or their guesses too high."""
    m_left = o_g < G
    if ALPHA_PER_HEAD:
        m_left &= tl.load(p_alpha + i_h * G + o_g, mask=m_left, other=1.0) != 1.0
    if ROOM > 0:
        m_left &= entries > ROOM
    else:
        o_head = i_row * G + o_g
        b_state = tl.load(p_state + o_head, mask=m_left, other=DONE)
        o_near = o_head[:, None] * FP + tl.arange(0, FP)[None, :]
        b_near = tl.load(p_near_count + o_near, mask=m_left[:, None], other=0)
        m_left &= (b_state != DONE) | (tl.max(b_near, 1) > limit)
    return m_left


@triton.jit
def make_up_row(
    p_query, p_key, p_value, p_pages, p_listed_count, p_seq_lens, p_exact_rows, p_alpha, p_slopes,
    p_maximum, p_words, p_trial_mass, p_partial, p_total, p_support, p_out, p_counters,
    p_certificate, p_bound, p_span, p_unread_mass,
    m_left, number, together, meetings, i_b, i_h, i_row, n, first, entries,
    s_query_b, s_query_h, s_out_b, s_out_h, s_page, s_head, list_stride, window,
    exact_below, scale, factor, exponent, value_scale, page_stride, s_certificate,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, CLASSES: tl.constexpr,
    SHARES: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr, ALIBI: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    BC: tl.constexpr, BU: tl.constexpr, EXACT_ROWS: tl.constexpr, CERTIFY: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Writes the output of those heads of a row's group that are left, `m_left` [GP], with others;
    returns how often they have met.

    The tiles of BK tokens are dealt out in SHARES, of which each program has some.
    """
    o_n, o_d, o_g = tl.arange(0, BK), tl.arange(0, DP), tl.arange(0, GP)
    o_j, o_s = tl.arange(0, TRIALS), tl.arange(0, SP * CLASSES)
    m_g = o_g < G
    if COUNT and number == 0:
        left = tl.sum((m_left & (n > 0)).to(tl.int64), 0)
        tl.atomic_add(p_counters + FALLBACKS, left, sem="relaxed")
    tiles = tl.cdiv(entries, BK // P)
    shares = tl.minimum(tiles, SHARES)
    b_scale, b_slope, b_exponent = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    p_k = p_key + i_h.to(tl.int64) * s_head
    p_v = p_value + i_h.to(tl.int64) * s_head

    p_m = p_maximum + (i_row * G + o_g)[:, None] * (S * CLASSES) + o_s[None, :]
    m_m = m_g[:, None] & (o_s < S * CLASSES)[None, :]
    b_peak = tl.max(tl.load(p_m, mask=m_m, other=-float("inf")), 1)  # [GP]
    m_open = m_left & (b_peak > -float("inf"))
    # Scores and thresholds are less the largest score. Of n equal scores the threshold
    # is n ** (-1 / b) below them, and nowhere is it nearer.
    b_peak = tl.where(m_open, b_peak, 0.0)
    b_log = tl.log2((entries * P).to(tl.float32))
    b_high = tl.where(m_open, -tl.exp2(-b_log / b_exponent), 0.0)
    b_low = tl.where(m_open, -1.0, 0.0)
    passes = 0
    m_wide = b_high - b_low > -NARROW * b_high
    wide = tl.max((m_open & m_wide).to(tl.int32), 0)
    while (wide > 0) & (passes < PASSES):
        b_step = (b_high - b_low) / TRIALS
        b_trial = b_low[:, None] + b_step[:, None] * o_j[None, :]  # [GP, TRIALS]
        # Two buffers: a program may be one meeting ahead of those that still read.
        p_t = p_trial_mass + passes % 2 * SHARES * (GP * TRIALS)
        o_trial = o_g[:, None] * TRIALS + o_j[None, :]
        for i_s in range(number, shares, together):
            b_mass = tl.zeros([BK, GP, TRIALS], tl.float32)
            for i_t in tl.range(i_s, tiles, shares, num_stages=1):
                _, b_z = score_tile(
                    p_pages, i_t, first, entries, list_stride, p_k, s_page, o_n, o_d,
                    b_q, n, window, b_scale, b_slope, b_peak, D, P, WINDOW, LISTED,
                    ALIBI,
                )  # fmt: skip
                b_x = tl.maximum(b_z[:, :, None] - b_trial[None, :, :], 0.0)
                b_mass += weigh(b_x, b_exponent[None, :, None], ORDER)
            tl.store(p_t + i_s * (GP * TRIALS) + o_trial, tl.sum(b_mass, 0))
        meetings = meet(p_words, meetings, together)
        b_sum = tl.zeros([GP, TRIALS], tl.float32)
        for i_s in range(shares):
            b_sum += tl.load(p_t + i_s * (GP * TRIALS) + o_trial)
        b_lower, b_upper = narrow_bracket(b_sum, b_low, b_high, b_exponent, ORDER)
        b_low = tl.where(m_open, b_lower, b_low)
        b_high = tl.where(m_open, b_upper, b_high)
        m_wide = b_high - b_low > -NARROW * b_high
        wide = tl.max((m_open & m_wide).to(tl.int32), 0)
        passes += 1

    # What is left to the threshold is a number of its own: their sum would be rounded
    # to the precision of the distance from the largest score, not of the weights.
    p_t = p_trial_mass + passes % 2 * SHARES * (GP * TRIALS) + o_g * TRIALS
    for i_s in range(number, shares, together):
        b_mass = tl.zeros([BK, GP], tl.float32)
        b_moment = tl.zeros([BK, GP], tl.float32)
        for i_t in tl.range(i_s, tiles, shares, num_stages=1):
            _, b_z = score_tile(
                p_pages, i_t, first, entries, list_stride, p_k, s_page, o_n, o_d, b_q,
                n, window, b_scale, b_slope, b_peak, D, P, WINDOW, LISTED, ALIBI,
            )  # fmt: skip
            b_x = tl.maximum(b_z - b_low[None, :], 0.0)
            b_w, b_d = weights_and_slopes(b_x, b_exponent[None, :], ORDER)
            b_mass += b_w
            b_moment += b_d
        tl.store(p_t + i_s * (GP * TRIALS), tl.sum(b_mass, 0))
        tl.store(p_t + i_s * (GP * TRIALS) + 1, tl.sum(b_moment, 0))
    meetings = meet(p_words, meetings, together)
    b_all_mass = tl.zeros([GP], tl.float32)
    b_all_moment = tl.zeros([GP], tl.float32)
    for i_s in range(shares):
        b_all_mass += tl.load(p_t + i_s * (GP * TRIALS))
        b_all_moment += tl.load(p_t + i_s * (GP * TRIALS) + 1)
    b_rest = newton_step(b_all_mass, b_all_moment, 1.0, b_exponent, ORDER)

    # Heads that are done take no part: nothing lies above their threshold, and it is a number.
    b_low = tl.where(m_left, b_low, float("inf"))
    b_rest = tl.where(m_left, b_rest, 0.0)
    for i_s in range(number, shares, together):
        b_support = tl.zeros([GP], tl.int32)
        b_total = tl.zeros([GP], tl.float32)
        b_acc = tl.zeros([DP, GP], tl.float32)
        for i_t in tl.range(i_s, tiles, shares, num_stages=1):
            b_page, b_z = score_tile(
                p_pages, i_t, first, entries, list_stride, p_k, s_page, o_n, o_d, b_q,
                n, window, b_scale, b_slope, b_peak, D, P, WINDOW, LISTED, ALIBI,
            )  # fmt: skip
            b_x = b_z - b_low[None, :]
            b_w = weigh_scores(b_x, b_rest[None, :], b_exponent[None, :], ORDER)
            if b_q.dtype == tl.float16:
                b_w *= FP16_WEIGHT
            m_support = (b_w != 0.0).to(tl.int32)
            b_support += tl.sum(m_support, 0)
            b_total += tl.sum(b_w, 0)
            o_v = b_page.to(tl.int64) * s_page + (o_n % P) * D
            m_v = (tl.max(m_support, 1) > 0)[:, None] & (o_d < D)[None, :]
            b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_v, other=0.0)
            b_acc = weighted_columns(b_w, b_v.to(b_q.dtype), b_acc)
        o_part = i_s * G + o_g
        tl.store(p_total + o_part, b_total, mask=m_g)
        tl.store(p_support + o_part, b_support, mask=m_g)
        m_acc = m_g[None, :] & (o_d < D)[:, None]
        tl.store(p_partial + o_part[None, :] * D + o_d[:, None], b_acc, mask=m_acc)
    meetings = meet(p_words, meetings, together)
    for i_g in range(number, G, together):
        m_own = o_g == i_g
        if tl.max((m_left & m_own).to(tl.int32), 0) > 0:
            b_out = tl.zeros([DP], tl.float32)
            total = tl.full([], 0.0, tl.float32)
            support = tl.full([], 0, tl.int64)
            for i_s in range(shares):
                i_part = i_s * G + i_g
                b_out += tl.load(p_partial + i_part * D + o_d, mask=o_d < D, other=0.0)
                total += tl.load(p_total + i_part)
                support += tl.load(p_support + i_part)
            p_o = p_out + i_b.to(tl.int64) * s_out_b + (i_h * G + i_g) * s_out_h + o_d
            b_out = b_out / total * value_scale
            tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=o_d < D)
            if COUNT:
                tl.atomic_add(p_counters + SUPPORT, support, sem="relaxed")
            if CERTIFY > 0:
                tau = tl.sum(tl.where(m_own, b_low + b_rest, 0.0), 0)
                peak = tl.sum(tl.where(m_own, b_peak, 0.0), 0)
                b = tl.sum(tl.where(m_own, b_exponent, 0.0), 0)
                _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
                rounding = 0.0, 0.0
                if CERTIFY == BOUNDED:
                    parts = load_query(p_query, i_b, i_h * G + i_g, s_query_b, s_query_h, D, DP)
                    own_scale = tl.sum(tl.where(m_own, b_scale, 0.0), 0)
                    slope = tl.sum(tl.where(m_own, b_slope, 0.0), 0)
                    rounding = own_rounding(parts, own_scale, slope, n, D, DP, ALIBI)
                unread, spans, b_bound = load_unread(
                    p_listed_count, p_bound, p_span, i_row, i_row * G + i_g, 0, n, ranked,
                    page_stride, P, PS, PSP, BC, LISTED, CERTIFY,
                )  # fmt: skip
                bound, complete = sum_unread(
                    p_bound, p_unread_mass, unread, spans, rounding, b_bound, i_row * G + i_g, 0,
                    ranked, tau, peak, b, page_stride, P, BC, BU, 1, CERTIFY, ORDER, False,
                )  # fmt: skip
                store_certificate(
                    p_certificate, p_counters, bound, complete, i_b, i_h * G + i_g, n,
                    s_certificate, COUNT,
                )  # fmt: skip
    # The parts are written again for the next row.
    return meet(p_words, meetings, together)


@triton.jit
def make_up(
    p_query, p_key, p_value, p_block_table, p_listed, p_listed_count, p_seq_lens, p_exact_rows,
    p_alpha, p_slopes, p_maximum, p_state, p_near_count, p_words, p_trial_mass, p_partial, p_total,
    p_support, p_out, p_counters, p_certificate, p_bound, p_span, p_unread_mass,
    s_query_b, s_query_h, s_out_b, s_out_h, s_page, s_head, s_block_table, list_stride, window,
    limit, rows, exact_below, scale, factor, exponent, value_scale, page_stride, s_certificate,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, CLASSES: tl.constexpr,
    FP: tl.constexpr, ROOM: tl.constexpr, SHARES: tl.constexpr, WINDOW: tl.constexpr,
    LISTED: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr,
    PS: tl.constexpr, PSP: tl.constexpr, BC: tl.constexpr, BU: tl.constexpr,
    EXACT_ROWS: tl.constexpr, CERTIFY: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Writes the output of every head that is left, together with other programs of the launch."""
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    number, together = join(p_words, tl.minimum(programs, SHARES))
    if number < together:
        o_g = tl.arange(0, GP)
        # Loops take no number that is known to the compiler for what they change.
        meetings = tl.full([], 0, tl.int32)
        for i in range(0, rows):
            # The interpreter's loop variables are no tensors.
            i_row = tl.full([], 0, tl.int32) + i
            i_b, i_h = i_row // HKV, i_row % HKV
            n = tl.load(p_seq_lens + i_b).to(tl.int32)
            p_pages, first, entries = page_source(
                p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table,
                list_stride, P, WINDOW, LISTED,
            )  # fmt: skip
            m_left = left_heads(
                p_alpha, p_state, p_near_count, i_row, i_h, entries, limit, o_g, G, FP, ROOM,
                ALPHA_PER_HEAD,
            )  # fmt: skip
            if tl.max(m_left.to(tl.int32), 0) > 0:
                meetings = make_up_row(
                    p_query, p_key, p_value, p_pages, p_listed_count, p_seq_lens, p_exact_rows,
                    p_alpha, p_slopes, p_maximum, p_words, p_trial_mass, p_partial, p_total,
                    p_support, p_out, p_counters, p_certificate, p_bound, p_span,
                    p_unread_mass, m_left, number, together, meetings, i_b, i_h, i_row, n, first,
                    entries, s_query_b, s_query_h, s_out_b, s_out_h, s_page, s_head, list_stride,
                    window, exact_below, scale, factor, exponent, value_scale, page_stride,
                    s_certificate, G, GP, D, DP, P, BK, S, SP, CLASSES, SHARES, WINDOW, LISTED,
                    ALIBI, ALPHA_PER_HEAD, ORDER, PS, PSP, BC, BU, EXACT_ROWS, CERTIFY, COUNT,
                )  # fmt: skip
