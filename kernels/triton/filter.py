"""Packing the candidates of one query head that lie above a lower bound of its threshold."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import head_parameters, newton_step, sum_moments, sum_pairs
from .pages import gathered_places
from .scores import allow_next, await_previous, page_source
from .together import WANTED

# What becomes of a head: its program serves it, or it is left to all, see `fallback.py`.
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
        # With a large exponent the weight of a key far above the guess is past fp32.
        step = tl.where(mass < float("inf"), newton_step(mass, slope, 1.0, b, ORDER), 0.0)
        lower = tl.maximum(lower, guess - peak + step)
    return lower, proved


@triton.jit
def above(b_z, lower):
    """Which of b_z are not at most `lower`."""
    # Not "greater": a NaN is kept.
    return ~(b_z <= lower)


@triton.jit
def load_slots(
    p_pages, p_slot, o_split, o_place, o_list, m_place, entries, filtered,
    S: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, GUESSED: tl.constexpr,
):  # fmt: skip
    """Slots of the tokens at places of the lists of splits: where they are filtered, listed beside
    their scores; else those of the tiles that a split has scored."""
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
    p_near_score, p_near_slot, p_near_count, p_lower, p_peak, p_state, p_words,
    s_block_table, list_stride, window, capacity, store_below, limit, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, CLASSES: tl.constexpr, FP: tl.constexpr, JC: tl.constexpr,
    WIDTH: tl.constexpr, GUESSED: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr,
    SLOTS_FIRST: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ORDER: tl.constexpr,
    MAKE_UP: tl.constexpr, CHAINED: tl.constexpr,
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
        tl.store(p_near_count + i_head * FP + i_f, 0)
        return
    SF: tl.constexpr = SP // FP
    o_f = tl.arange(0, SF * JC)
    o_s, o_j = i_f * SF + o_f // JC, o_f % JC
    o_list = o_s * capacity + o_j
    p_score += (i_head * S).to(tl.int64) * capacity
    p_slot += (i_row * S).to(tl.int64) * capacity
    # Of a list that is full, the count says how many it should have had room for.
    b_count = tl.load(p_count + i_row * S + o_s, mask=o_s < S, other=0)
    b_count = tl.minimum(b_count, capacity)
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
        tl.store(p_peak + i_head, peak)
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
        b_slot = o_list + i_j
        if SLOTS_FIRST:
            # Of pages that were chosen much is kept: all slots at once.
            b_slot = load_slots(
                p_pages, p_slot, o_s, i_j + o_j, b_slot, i_j + o_j < b_count, entries, filtered, S,
                BN, P, GUESSED,
            )  # fmt: skip
        b_position, near = gathered_places(above(b_z, lower), kept)
        m_stored = above(b_z, lower) & (b_position < limit)
        tl.store(p_near_score + b_position, b_z, mask=m_stored)
        tl.store(p_near_slot + b_position, b_slot, mask=m_stored)
        kept += near
    if not SLOTS_FIRST:
        # Places in the lists become slots. The program's other threads stored some of them.
        tl.debug_barrier()
        o_w = tl.arange(0, WIDTH)
        for i_w in tl.range(0, tl.minimum(kept, limit), WIDTH, num_stages=1):
            m_w = i_w + o_w < tl.minimum(kept, limit)
            o_place = tl.load(p_near_slot + i_w + o_w, mask=m_w, other=0)
            b_slot = load_slots(
                p_pages, p_slot, o_place // capacity, o_place % capacity, o_place, m_w, entries,
                filtered, S, BN, P, GUESSED,
            )  # fmt: skip
            tl.store(p_near_slot + i_w + o_w, b_slot, mask=m_w)
    tl.store(p_near_count + i_part, kept)
    if MAKE_UP:
        tl.store(p_words + WANTED, 1, mask=(kept > limit) | ~proved)
