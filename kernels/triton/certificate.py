"""What a sparse step can say of the pages that it left out; see `reference/certificate.py`."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..reference.certificate import LEAST_BOUND, THRESHOLD_ROUNDING
from ..report import BOUND_LIMITS, Counter
from .entmax import weigh_scores

CERTIFIED = tl.constexpr(int(Counter.CERTIFIED))
LEAST, LESS, MORE, MOST = map(tl.constexpr, BOUND_LIMITS)
TAU_ROUNDING = tl.constexpr(THRESHOLD_ROUNDING * 2.0**-23)
TINY = tl.constexpr(LEAST_BOUND)

# What CERTIFY says: nothing is asked for; how many pages are unread is all that is known of them;
# their scores are bounded; they hold no weight.
BOUNDED = tl.constexpr(2)
PROVED = tl.constexpr(3)


@triton.jit
def mark_read(p_unread, i_row, o_page, m_page, page_stride):
    """Takes the pages of a row that m_page names from the unread ones."""
    tl.store(p_unread + i_row.to(tl.int64) * page_stride + o_page, 0, mask=m_page)


@triton.jit
def sum_unread(
    p_bound, p_unread, p_rounding, i_row, i_head, i_c, ranked, tau, peak, b, page_stride,
    P: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    ORDER: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Of every C-th BC of a head's pages: what the tokens of the unread ones weigh at most, before
    the weights are divided by their sum, and how many of the pages can hold any weight.

    tau: the threshold less `peak`, or for SOFTMAX the logarithm of the sum of exponentials.
    """
    o_c, o_s = tl.arange(0, BC), tl.arange(0, PSP)
    b_rounding = tl.load(p_rounding + i_head * PS + o_s, mask=o_s < PS, other=0.0)
    # Of the bounds and the scores below them, and of scores that were read, by which the threshold
    # moves.
    slack = 2.0 * tl.max(b_rounding, 0) + TAU_ROUNDING * (1.0 + tl.abs(tau + peak))
    p_b = p_bound + i_head.to(tl.int64) * page_stride
    p_u = p_unread + i_row.to(tl.int64) * page_stride
    b_mass, b_possible = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.int32)
    for i_p in tl.range(i_c * BC, ranked, C * BC, num_stages=1):
        o_page = i_p + o_c
        b_bound = tl.load(p_b + o_page, mask=o_page < ranked, other=-float("inf"))
        b_unread = tl.load(p_u + o_page, mask=o_page < ranked, other=0)
        b_z = tl.where(b_unread != 0, b_bound - peak + slack, -float("inf"))
        # Not "greater": a bound that is no number allows anything.
        b_possible += 1 - (b_z <= tau).to(tl.int32)
        b_mass += tl.exp(b_z - tau) if SOFTMAX else weigh_scores(b_z, tau, b, ORDER)
    # More than the rounding of the weights, whose powers are good to less digits, and of their sum.
    more = 1.0 + (16.0 + b) * 2.0**-16
    return tl.sum(b_mass, 0) * (P * more), tl.sum(b_possible, 0)


@triton.jit
def store_certificate(
    p_certificate, p_counters, i_b, i_hq, n, bound, s_certificate, COUNT: tl.constexpr
):  # fmt: skip
    """Writes a head's bound, and counts it by its size, unless the row is empty."""
    tl.store(p_certificate + i_b.to(tl.int64) * s_certificate + i_hq, bound)
    if COUNT and n > 0:
        size = (bound > 0.0).to(tl.int32) + (bound > LEAST).to(tl.int32)
        size += (bound > LESS).to(tl.int32) + (bound > MORE).to(tl.int32)
        size += (bound > MOST).to(tl.int32) + (bound >= 1.0).to(tl.int32)
        tl.atomic_add(p_counters + CERTIFIED + size, tl.full([], 1, tl.int64), sem="relaxed")


@triton.jit
def certify(
    p_certificate, p_counters, p_bound, p_unread, p_rounding, p_unread_mass, p_possible, p_arrived,
    p_listed_count, i_b, i_row, i_hq, i_head, i_c, n, tau, peak, b, page_stride, s_certificate,
    P: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    LISTED: tl.constexpr, CERTIFY: tl.constexpr, COUNT: tl.constexpr, ORDER: tl.constexpr,
    SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Writes and counts what a head's unread tokens weigh at most, 0 if nothing is unread.

    C programs share a head's pages; the last one to have its part adds them up, in their order.
    """
    unread = tl.full([], 0, tl.int32)
    if LISTED and CERTIFY != PROVED:
        unread += (n + P - 1) // P - tl.load(p_listed_count + i_row)
    if CERTIFY == BOUNDED and unread > 0:
        mass, possible = sum_unread(
            p_bound, p_unread, p_rounding, i_row, i_head, i_c, (n + P - 1) // P - 1, tau, peak, b,
            page_stride, P, PS, PSP, BC, C, ORDER, SOFTMAX,
        )  # fmt: skip
        last = C == 1
        if C > 1:
            o_c = i_head * C + tl.arange(0, C)
            tl.store(p_unread_mass + i_head * C + i_c, mass)
            tl.store(p_possible + i_head * C + i_c, possible)
            tl.debug_barrier()
            last = tl.atomic_add(p_arrived + i_head, 1, sem="acq_rel") == C - 1
            tl.debug_barrier()
            mass = tl.sum(tl.load(p_unread_mass + o_c, cache_modifier=".cg"), 0)
            possible = tl.sum(tl.load(p_possible + o_c, cache_modifier=".cg"), 0)
        if SOFTMAX:
            bound = tl.where(mass < float("inf"), tl.maximum(mass / (1.0 + mass), TINY), 1.0)
        else:
            bound = tl.where(mass < 1.0, tl.maximum(mass, TINY), 1.0)
            bound = tl.where(possible > 0, bound, 0.0)
        if last:
            store_certificate(p_certificate, p_counters, i_b, i_hq, n, bound, s_certificate, COUNT)
    elif i_c == 0:
        bound = (unread > 0).to(tl.float32)
        store_certificate(p_certificate, p_counters, i_b, i_hq, n, bound, s_certificate, COUNT)
