"""Entmax attention of one query head over its packed candidates: threshold, weights and values.

Programs that share a head by the parts of its size solve the threshold and weigh the values.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .certificate import (
    BOUNDED,
    load_query,
    load_unread,
    own_rounding,
    store_certificate,
    sum_unread,
)
from .counters import SUPPORT, count_step
from .entmax import (
    EXCESS_MASS,
    NEWTON_STEPS,
    head_parameters,
    newton_step,
    sum_moments,
    sum_pairs,
    weigh_scores,
    weights_and_slopes,
)
from .fallback import any_of, make_up
from .filter import DONE
from .pages import ranked_pages
from .scores import await_previous
from .together import WANTED


@triton.jit
def load_near(p_near, b_count, o_list, o_j, limit, other):
    """Elements at places o_j of a head's packed lists o_list."""
    return tl.load(p_near + o_list * limit + o_j, mask=o_j < b_count, other=other)


@triton.jit
def solve_held(b_z, tau, b, ORDER: tl.constexpr):
    """tau of the scores b_z, from a lower bound of it."""
    # The loop takes no number that is known to the compiler for what it changes.
    tau = tl.full([], 0.0, tl.float32) + tau
    mass, slope = sum_moments(b_z, tau, b, ORDER)
    steps = 0
    while (mass > 1.0 + EXCESS_MASS) & (steps < NEWTON_STEPS):
        tau += newton_step(mass, slope, 1.0, b, ORDER)
        mass, slope = sum_moments(b_z, tau, b, ORDER)
        steps += 1
    return tau + newton_step(mass, slope, 1.0, b, ORDER)


@triton.jit
def solve_near(
    p_near_score, p_near_count, longest, lower, limit, b,
    FP: tl.constexpr, R: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """tau of the packed candidates, from a lower bound of it."""
    o_r = tl.arange(0, R)
    o_f, o_j = o_r // (R // FP), o_r % (R // FP)
    b_count = tl.load(p_near_count + o_f)
    b_z = load_near(p_near_score, b_count, o_f, o_j, limit, -float("inf"))
    # Of more candidates this is the threshold of a part: again a lower bound.
    tau = solve_held(b_z, lower, b, ORDER)
    going = longest > R // FP
    steps = 0
    while going & (steps < NEWTON_STEPS):
        b_mass = tl.zeros([R], tl.float32)
        b_slope = tl.zeros([R], tl.float32)
        for i_j in tl.range(0, longest, R // FP, num_stages=1):
            b_x = load_near(p_near_score, b_count, o_f, i_j + o_j, limit, -float("inf"))
            b_w, b_d = weights_and_slopes(tl.maximum(b_x - tau, 0.0), b, ORDER)
            b_mass += b_w
            b_slope += b_d
        mass, slope = sum_pairs((b_mass, b_slope))
        tau += newton_step(mass, slope, 1.0, b, ORDER)
        going = mass > 1.0 + EXCESS_MASS
        steps += 1
    return tau


@triton.jit
def load_values(p_value, b_slot, b_weight, o_d, s_page, D: tl.constexpr, P: tl.constexpr):
    """Values of the slots that have any weight, zeros for the others."""
    o_row = (b_slot // P).to(tl.int64) * s_page + (b_slot % P) * D
    m_v = (b_weight != 0.0)[:, None] & (o_d < D)[None, :]
    return tl.load(p_value + o_row[:, None] + o_d[None, :], mask=m_v, other=0.0)


@triton.jit
def sum_values(
    p_value, p_near_score, p_near_slot, b_w, b_v, b_count, o_f, o_j, o_d, longest, limit, tau, b,
    s_page, D: tl.constexpr, P: tl.constexpr, JV: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Weighted sum of the values of packed candidates [DS], sum of the weights, and how many there
    are.

    b_w, b_v: weights [BV] and values [BV, DS] of the first JV candidates of each list, which are
    under way.
    """
    b_z = load_near(p_near_score, b_count, o_f, o_j + JV, limit, -float("inf"))
    b_slot = load_near(p_near_slot, b_count, o_f, o_j + JV, limit, 0)
    b_acc = tl.zeros(b_v.shape, tl.float32)
    b_total = tl.zeros(b_w.shape, tl.float32)
    b_support = tl.zeros(b_w.shape, tl.int32)
    for i_j in tl.range(0, longest, JV, num_stages=1):
        b_next = weigh_scores(b_z, tau, b, ORDER)
        b_next_v = load_values(p_value, b_slot, b_next, o_d, s_page, D, P)
        o_next = i_j + 2 * JV + o_j
        b_z = load_near(p_near_score, b_count, o_f, o_next, limit, -float("inf"))
        b_slot = load_near(p_near_slot, b_count, o_f, o_next, limit, 0)
        b_acc += b_w[:, None] * b_v.to(tl.float32)
        b_total += b_w
        b_support += (b_w != 0.0).to(tl.int32)
        b_w, b_v = b_next, b_next_v
    return tl.sum(b_acc, 0), tl.sum(b_total, 0), tl.sum(b_support, 0)


@triton.jit
def store_head(
    p_out, p_counters, b_acc, total, support, i_b, i_hq, i_d, o_d, n, s_out_b, s_out_h, value_scale,
    D: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Writes one part of a head's output, zeros for an empty row, and with the first counts its
    support."""
    b_out = b_acc / tl.where(n > 0, total, 1.0) * value_scale
    p_o = p_out + i_b.to(tl.int64) * s_out_b + i_hq * s_out_h + o_d
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=o_d < D)
    if COUNT and i_d == 0:
        tl.atomic_add(p_counters + SUPPORT, support.to(tl.int64), sem="relaxed")


# Bounds whose rows are not aligned have one element per thread in loads: no exchange.
@triton.jit(do_not_specialize=["page_stride", "rows"])
def attend_kernel(
    p_query, p_key, p_value, p_block_table, p_listed, p_listed_count, p_seq_lens, p_exact_rows,
    p_alpha, p_slopes, p_maximum, p_near_score, p_near_slot, p_near_count, p_lower, p_peak, p_state,
    p_words, p_trial_mass, p_partial, p_total, p_support, p_out, p_counters, p_certificate,
    p_bound, p_span, p_unread_mass,
    s_query_b, s_query_h, s_out_b, s_out_h, s_head, s_block_table, list_stride, window,
    limit, rows, exact_below, scale, factor, exponent, value_scale, page_stride, s_certificate,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DS: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    CLASSES: tl.constexpr, FP: tl.constexpr, SHARES: tl.constexpr, R: tl.constexpr,
    BV: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr, ALIBI: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    BC: tl.constexpr, BU: tl.constexpr, DC: tl.constexpr, EXACT_ROWS: tl.constexpr,
    CERTIFY: tl.constexpr, COUNT: tl.constexpr, MAKE_UP: tl.constexpr, FLAGGED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Solves tau of one query head and weighs the values of its support, for one part in DS of
    the head size.

    The parts repeat the solution, which costs less than to wait for each other.

    DC: parts that share the bounds of unread pages, which are loaded with the first candidates.
    MAKE_UP: heads may be left, to all programs together.
    FLAGGED: they are of rows of `p_exact_rows` alone, which are known beforehand.
    """
    i_d, i_hq, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_h = i_hq // G
    i_head = i_b * HKV * G + i_hq
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    if CERTIFY > 0:
        _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    if CERTIFY == BOUNDED:
        parts = load_query(p_query, i_b, i_hq, s_query_b, s_query_h, D, DP)
        slope = tl.load(p_slopes + i_hq) if ALIBI else 0.0
    left = 0
    if MAKE_UP and FLAGGED:
        left = any_of(p_exact_rows, rows // HKV)
    await_previous(CHAINED)
    if COUNT and i_d + i_hq == 0:
        count_step(p_counters, n, window, HKV, G, P, WINDOW, LISTED)
    b_count = tl.load(p_near_count + i_head * FP + tl.arange(0, FP))
    state = tl.load(p_state + i_head)
    if MAKE_UP:
        if not FLAGGED:
            left = tl.load(p_words + WANTED)
        if left != 0:
            make_up(
                p_query, p_key, p_value, p_block_table, p_listed, p_listed_count, p_seq_lens,
                p_exact_rows, p_alpha, p_slopes, p_maximum, p_state, p_near_count, p_words,
                p_trial_mass, p_partial, p_total, p_support, p_out, p_counters, p_certificate,
                p_bound, p_span, p_unread_mass, s_query_b, s_query_h, s_out_b, s_out_h, s_page,
                s_head, s_block_table, list_stride, window, limit, rows, exact_below, scale, factor,
                exponent, value_scale, page_stride, s_certificate, HKV, G, GP, D, DP, P, BK, S, SP,
                CLASSES, FP, 0, SHARES, WINDOW, LISTED, ALIBI, ALPHA_PER_HEAD, ORDER, PS, PSP, BC,
                BU, EXACT_ROWS, CERTIFY, COUNT,
            )  # fmt: skip
    if ALPHA_PER_HEAD and tl.load(p_alpha + i_hq) == 1.0:
        return
    longest = tl.max(b_count, 0)
    if (state != DONE) | (longest > limit):
        return
    p_near_count += i_head * FP
    p_near_score += (i_head * FP).to(tl.int64) * limit
    p_near_slot += (i_head * FP).to(tl.int64) * limit
    own_factor, b = head_parameters(p_alpha, factor, exponent, i_hq, i_hq >= 0, ALPHA_PER_HEAD)
    p_value += i_h.to(tl.int64) * s_head
    o_v, o_d = tl.arange(0, BV), i_d * (DP // DS) + tl.arange(0, DP // DS)
    o_f, o_j = o_v // (BV // FP), o_v % (BV // FP)
    b_count = tl.load(p_near_count + o_f)
    # What is first is under way while the threshold is solved, and later what is next.
    b_z = load_near(p_near_score, b_count, o_f, o_j, limit, -float("inf"))
    b_slot = load_near(p_near_slot, b_count, o_f, o_j, limit, 0)
    if CERTIFY > 0:
        unread, spans, b_bound = load_unread(
            p_listed_count, p_bound, p_span, i_b * HKV + i_h, i_head, i_d, n, ranked,
            page_stride, P, PS, PSP, BC, LISTED, CERTIFY,
        )  # fmt: skip
        peak = tl.load(p_peak + i_head)
        tl.debug_barrier()
    lower = tl.load(p_lower + i_head)
    tau = solve_near(p_near_score, p_near_count, longest, lower, limit, b, FP, R, ORDER)
    b_w = weigh_scores(b_z, tau, b, ORDER)  # [BV]
    b_v = load_values(p_value, b_slot, b_w, o_d, s_page, D, P)  # [BV, DS]
    rounding = 0.0, 0.0
    if CERTIFY == BOUNDED:
        rounding = own_rounding(parts, own_factor * scale, own_factor * slope, n, D, DP, ALIBI)
    if CERTIFY > 0:
        bound, complete = sum_unread(
            p_bound, p_unread_mass, unread, spans, rounding, b_bound, i_head,
            i_d, ranked, tau, peak, b, page_stride, P, BC, BU, DC, CERTIFY, ORDER, False,
        )  # fmt: skip

    b_acc, total, support = sum_values(
        p_value, p_near_score, p_near_slot, b_w, b_v, b_count, o_f, o_j, o_d, longest, limit,
        tau, b, s_page, D, P, BV // FP, ORDER,
    )  # fmt: skip
    if CERTIFY > 0:
        store_certificate(
            p_certificate, p_counters, bound, complete, i_b, i_hq, n, s_certificate, COUNT
        )
    store_head(
        p_out, p_counters, b_acc, total, support, i_b, i_hq, i_d, o_d, n, s_out_b, s_out_h,
        value_scale, D, COUNT,
    )  # fmt: skip
