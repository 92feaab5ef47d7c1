"""Entmax attention of one query head over its listed candidates: threshold, weights and values.

Candidates above a lower bound of the threshold are packed, by several programs per head; then
programs that share a head by the parts of its size solve the threshold and weigh the values.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

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
from .scores import allow_next, await_previous, page_source

# What becomes of a head: its output is written, or left to `fallback_kernel`.
DONE = tl.constexpr(0)
LEFT = tl.constexpr(1)
# Newton steps over the largest scores of parts of the splits.
PEAK_STEPS = tl.constexpr(4)


@triton.jit
def lower_bound(
    p_guess, p_mass, p_slope, o_head, o_a, b_maximum, peak, filtered, b,
    S: tl.constexpr, CLASSES: tl.constexpr, GUESSED: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """A lower bound of tau, less the largest score `peak`, and whether it is proved.

    b_maximum: the largest scores of parts of the splits, less the peak.

    Where all scores are listed, it is the threshold of the largest ones of parts of the splits:
    that of a part is a lower bound of the whole one. A guess is one if the mass above it is at
    least one, and then a Newton step from it is, too.
    """
    proved = filtered == 0
    lower = -1.0
    if filtered == 0:
        for _ in tl.static_range(PEAK_STEPS):
            mass, slope = sum_moments(b_maximum, lower, b, ORDER)
            lower += newton_step(mass, slope, 1.0, b, ORDER)
    elif GUESSED:
        guess = tl.load(p_guess + o_head)
        m_a = o_a < S * CLASSES
        o_own = o_head * (S * CLASSES) + o_a
        b_mass = tl.load(p_mass + o_own, mask=m_a, other=0.0)
        mass, slope = sum_pairs((b_mass, tl.load(p_slope + o_own, mask=m_a, other=0.0)))
        # Not "at least": a mass that is no number shows in the output.
        proved = ~(mass < 1.0)
        lower = tl.maximum(lower, guess - peak + newton_step(mass, slope, 1.0, b, ORDER))
    return lower, proved


@triton.jit
def pack_above(b_z, lower, kept, limit, WIDTH: tl.constexpr):
    """Positions after `kept` of those of b_z [N] that are not at most `lower`, `limit` of the
    others; and how many they are.

    WIDTH: threads of the program; the positions of what a thread holds are a sum within it.
    """
    # Not "greater": a NaN is kept.
    m_near = tl.reshape(1 - (b_z <= lower).to(tl.int32), [b_z.shape[0] // WIDTH, WIDTH])
    b_thread = tl.sum(m_near, 0)  # [WIDTH]
    b_before = kept + tl.cumsum(b_thread, 0) - b_thread
    b_position = b_before[None, :] + tl.cumsum(m_near, 0) - m_near
    b_position = tl.where(m_near > 0, b_position, limit)
    return tl.reshape(b_position, b_z.shape), tl.sum(b_thread, 0)


@triton.jit
def load_slots(
    p_pages, p_slot, o_split, o_place, o_list, b_count, entries, filtered,
    S: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, GUESSED: tl.constexpr,
):  # fmt: skip
    """Slots of the tokens at places of the lists of splits: where they are filtered, listed beside
    their scores; else those of the tiles that a split has scored."""
    m_place = o_place < b_count
    if GUESSED and filtered > 0:
        b_slot = tl.load(p_slot + o_list, mask=m_place, other=0)
    else:
        o_entry = (o_split + o_place // BN * S) * (BN // P) + o_place % BN // P
        b_page = tl.load(p_pages + o_entry, mask=m_place & (o_entry < entries), other=0)
        b_slot = b_page.to(tl.int32) * P + o_place % P
    return b_slot


# Unaligned lists have one element per thread in loads, as scattered stores have: no exchange.
@triton.jit(do_not_specialize=["capacity"])
def filter_kernel(
    p_block_table, p_listed, p_listed_count, p_seq_lens, p_alpha, p_guess,
    p_slot, p_score, p_count, p_maximum, p_mass, p_slope,
    p_near_score, p_near_slot, p_near_count, p_lower, p_state,
    s_block_table, list_stride, window, capacity, store_below, limit, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, CLASSES: tl.constexpr, FP: tl.constexpr, JC: tl.constexpr,
    WIDTH: tl.constexpr, GUESSED: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Packs the candidates of one query head that lie above a lower bound of tau, with their
    slots, from one part in FP of the lists.

    What is packed, and the bound, are less the largest score: such differences are exact near it,
    where the threshold may lie closer than the scores' own precision.

    JC places of every list are looked at together, WIDTH being the threads of the program.
    """
    i_f, i_hq, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_hq // G
    i_head = i_b * HKV * G + i_hq
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    await_previous(CHAINED)
    allow_next(CHAINED)
    if ALPHA_PER_HEAD and tl.load(p_alpha + i_hq) == 1.0:
        tl.store(p_state + i_head, DONE)
        return
    SF: tl.constexpr = SP // FP
    o_f = tl.arange(0, SF * JC)
    o_s, o_j = i_f * SF + o_f // JC, o_f % JC
    o_list = o_s * capacity + o_j
    p_score += (i_head * S).to(tl.int64) * capacity
    p_slot += (i_row * S).to(tl.int64) * capacity
    b_count = tl.load(p_count + i_row * S + o_s, mask=o_s < S, other=0)
    b_next = tl.load(p_score + o_list, mask=o_j < b_count, other=-float("inf"))

    _, b = head_parameters(p_alpha, factor, exponent, i_hq, i_hq >= 0, ALPHA_PER_HEAD)
    p_pages, _, entries = page_source(
        p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table, list_stride,
        P, WINDOW, LISTED,
    )  # fmt: skip
    filtered = 0
    if GUESSED:
        filtered = (entries * P > store_below).to(tl.int32)
    o_c, o_a = tl.arange(0, SP), tl.arange(0, SP * CLASSES)
    b_all = tl.load(p_count + i_row * S + o_c, mask=o_c < S, other=0)
    p_maximum += i_head * (S * CLASSES)
    b_maximum = tl.load(p_maximum + o_a, mask=o_a < S * CLASSES, other=-float("inf"))
    peak = tl.max(b_maximum, 0)
    # Of an empty row, or one of scores that are no numbers.
    peak = tl.where(peak > -float("inf"), peak, 0.0)
    b_maximum -= peak
    lower, proved = lower_bound(
        p_guess, p_mass, p_slope, i_head, o_a, b_maximum, peak, filtered, b, S, CLASSES, GUESSED,
        ORDER,
    )  # fmt: skip
    proved = proved & (tl.max(b_all, 0) <= capacity)
    if i_f == 0:
        tl.store(p_lower + i_head, lower)
        tl.store(p_state + i_head, tl.where(proved, DONE, LEFT))

    i_part = i_head * FP + i_f
    p_near_score += i_part.to(tl.int64) * limit
    p_near_slot += i_part.to(tl.int64) * limit
    longest = tl.max(tl.where(proved, b_count, 0), 0)
    kept = 0
    for i_j in tl.range(0, longest, JC, num_stages=1):
        b_z = b_next - peak  # [SF * JC]
        m_next = i_j + JC + o_j < b_count
        b_next = tl.load(p_score + i_j + JC + o_list, mask=m_next, other=-float("inf"))
        b_slot = load_slots(
            p_pages, p_slot, o_s, i_j + o_j, o_list + i_j, b_count, entries, filtered, S, BN, P,
            GUESSED,
        )  # fmt: skip
        b_position, near = pack_above(b_z, lower, kept, limit, WIDTH)
        m_stored = b_position < limit
        tl.store(p_near_score + b_position, b_z, mask=m_stored)
        tl.store(p_near_slot + b_position, b_slot, mask=m_stored)
        kept += near
    tl.store(p_near_count + i_part, kept)


@triton.jit
def load_near(p_near, b_count, o_list, o_j, limit, other):
    """Elements at places o_j of a head's packed lists o_list."""
    return tl.load(p_near + o_list * limit + o_j, mask=o_j < b_count, other=other)


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
    tau = lower
    mass, slope = sum_moments(b_z, tau, b, ORDER)
    steps = 0
    # Of more candidates this is the threshold of a part: again a lower bound.
    while (mass > 1.0 + EXCESS_MASS) & (steps < NEWTON_STEPS):
        tau += newton_step(mass, slope, 1.0, b, ORDER)
        mass, slope = sum_moments(b_z, tau, b, ORDER)
        steps += 1
    tau += newton_step(mass, slope, 1.0, b, ORDER)
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
    p_value, p_near_score, p_near_slot, b_z, b_slot, b_count, o_f, o_j, o_d, longest, limit, tau, b,
    s_page, D: tl.constexpr, P: tl.constexpr, JV: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Weighted sum of the values of packed candidates [DS], sum of the weights, and how many there
    are.

    b_z, b_slot: the first JV candidates of each list, with which the ones after are loaded.
    """
    b_w = weigh_scores(b_z, tau, b, ORDER)  # [BV]
    b_v = load_values(p_value, b_slot, b_w, o_d, s_page, D, P)  # [BV, DS]
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
def attend_kernel(
    p_value, p_seq_lens, p_alpha, p_near_score, p_near_slot, p_near_count, p_lower, p_state,
    p_barrier, p_out, p_counters,
    s_out_b, s_out_h, s_page, s_head, window, limit, factor, exponent, value_scale,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DS: tl.constexpr,
    P: tl.constexpr, FP: tl.constexpr, R: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
    LISTED: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr, COUNT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Solves tau of one query head and weighs the values of its support, for one part in DS of
    the head size.

    The parts repeat the solution, which costs less than to wait for each other.
    """
    i_d, i_hq, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_h = i_hq // G
    i_head = i_b * HKV * G + i_hq
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    await_previous(CHAINED)
    if i_d + i_hq == 0:
        if COUNT:
            count_step(p_counters, n, window, HKV, G, P, WINDOW, LISTED)
        if i_b == 0:
            tl.store(p_barrier, 0)
    if ALPHA_PER_HEAD and tl.load(p_alpha + i_hq) == 1.0:
        return
    p_near_count += i_head * FP
    p_near_score += (i_head * FP).to(tl.int64) * limit
    p_near_slot += (i_head * FP).to(tl.int64) * limit
    longest = tl.max(tl.load(p_near_count + tl.arange(0, FP)), 0)
    if tl.load(p_state + i_head) != DONE:
        return
    if longest > limit:
        tl.store(p_state + i_head, LEFT)
        return
    _, b = head_parameters(p_alpha, factor, exponent, i_hq, i_hq >= 0, ALPHA_PER_HEAD)
    p_value += i_h.to(tl.int64) * s_head
    o_v, o_d = tl.arange(0, BV), i_d * (DP // DS) + tl.arange(0, DP // DS)
    o_f, o_j = o_v // (BV // FP), o_v % (BV // FP)
    b_count = tl.load(p_near_count + o_f)
    # What is first is under way while the threshold is solved, and later what is next.
    b_z = load_near(p_near_score, b_count, o_f, o_j, limit, -float("inf"))
    b_slot = load_near(p_near_slot, b_count, o_f, o_j, limit, 0)
    lower = tl.load(p_lower + i_head)
    tau = solve_near(p_near_score, p_near_count, longest, lower, limit, b, FP, R, ORDER)

    b_acc, total, support = sum_values(
        p_value, p_near_score, p_near_slot, b_z, b_slot, b_count, o_f, o_j, o_d, longest, limit,
        tau, b, s_page, D, P, BV // FP, ORDER,
    )  # fmt: skip
    b_out = b_acc / tl.where(n > 0, total, 1.0) * value_scale
    p_o = p_out + i_b.to(tl.int64) * s_out_b + i_hq * s_out_h + o_d
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=o_d < D)
    if COUNT and i_d == 0:
        tl.atomic_add(p_counters + SUPPORT, support.to(tl.int64), sem="relaxed")
