"""What a sparse step can say of the pages that it left out; see `reference/certificate.py`.

box writes an upper bound of the scores of every page for every head; who reads a page takes its
bounds away; who solves the threshold of a head weighs those that are left.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..reference.certificate import LEAST_BOUND, THRESHOLD_ROUNDING
from ..report import BOUND_LIMITS, Counter
from .entmax import weigh_scores
from .pages import INTERPRETED
from .scores import prefetch

CERTIFIED = tl.constexpr(int(Counter.CERTIFIED))
LEAST, LESS, MORE, MOST = map(tl.constexpr, BOUND_LIMITS)
TAU_ROUNDING = tl.constexpr(THRESHOLD_ROUNDING * 2.0**-23)
TINY = tl.constexpr(LEAST_BOUND)

# What CERTIFY says: nothing is asked for; how many pages are unread is all that is known of them;
# their scores are bounded; they hold no weight.
BOUNDED = tl.constexpr(2)
PROVED = tl.constexpr(3)

# What programs that share a head add up: how many of them came, and their parts of the mass in
# units so small that each is a whole number of them, rounded up. Such a sum does not depend on the
# order.
ARRIVAL = tl.constexpr(1 << 48)
UNITS = tl.constexpr(2.0**40)


@triton.jit
def take_bounds(
    p_bound, b_logical, o_n, i_row, o_g, n, page_stride, G: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Takes away the bounds that the heads o_g of a group have of the pages of a tile of tokens:
    of numbers b_logical [BN] in a sequence of n tokens; o_n are the tokens' places in the tile."""
    p_b = p_bound + (i_row * G + o_g)[None, :].to(tl.int64) * page_stride + b_logical[:, None]
    m_first = (o_n % P == 0) & (b_logical * P < n)
    m_bound = m_first[:, None] & (o_g < G)[None, :]
    tl.store(p_b, tl.full(m_bound.shape, -float("inf"), tl.float32), mask=m_bound)


@triton.jit
def load_rounding(
    p_span, p_rounding, i_row, o_head, m_head, PS: tl.constexpr, PSP: tl.constexpr
):  # fmt: skip
    """By how much at most rounding can change bounds of heads, the scores below them, and those of
    keys that were read, by which the threshold moves; shaped as o_head."""
    o_s = tl.arange(0, PSP)
    b_span = tl.load(p_span + i_row * PS + o_s, mask=o_s < PS, other=0.0)
    b_unit = tl.load(p_rounding + 3 * o_head, mask=m_head, other=0.0)
    b_fixed = tl.load(p_rounding + 3 * o_head + 1, mask=m_head, other=0.0)
    b_last = tl.load(p_rounding + 3 * o_head + 2, mask=m_head, other=0.0)
    return 2.0 * (tl.maximum(tl.max(b_span, 0), b_last) * b_unit + b_fixed)


@triton.jit
def load_bounds(p_bound, i_head, o_page, ranked, page_stride):
    """Bounds of a head's pages, -inf of those that were read."""
    p_b = p_bound + i_head.to(tl.int64) * page_stride
    return tl.load(p_b + o_page, mask=o_page < ranked, other=-float("inf"))


@triton.jit
def load_unread(
    p_listed_count, p_bound, p_span, p_rounding, i_row, i_head, i_c, n, ranked, page_stride,
    P: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    LISTED: tl.constexpr, CERTIFY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """What a certificate takes but the threshold: how many pages are unread where nothing bounds
    them, else what rounding can do, and bounds of the first BC pages of part i_c in C; the others
    are asked for."""
    unread = tl.full([], 0, tl.int32)
    rounding = tl.full([], 0.0, tl.float32)
    b_bound = tl.zeros([BC], tl.float32)
    if CERTIFY == BOUNDED:
        o_page = i_c * BC + tl.arange(0, BC)
        b_bound = load_bounds(p_bound, i_head, o_page, ranked, page_stride)
        # One of eight, as many as a sector of the cache has.
        o_page = i_c * BC + tl.arange(0, max(1, BC // 8)) * 8
        for i_p in range(C * BC, ranked, C * BC):
            p_b = p_bound + i_head.to(tl.int64) * page_stride + o_page + i_p
            prefetch(p_b, o_page + i_p < ranked, CHAINED)
        rounding = load_rounding(p_span, p_rounding, i_row, i_head, i_head >= 0, PS, PSP)
    elif LISTED and CERTIFY != PROVED:
        unread += (n + P - 1) // P - tl.load(p_listed_count + i_row)
    return unread, rounding, b_bound


@triton.jit
def add_alone(p_sum, part):
    """Adds to a sum of 64 bits. What it was before is known to the program's first thread, the one
    that stores what is no tensor, and the others go on: `tl.atomic_add` has all of them wait."""
    if INTERPRETED:
        return tl.atomic_add(p_sum, part, sem="relaxed")
    else:
        return tl.inline_asm_elementwise(
            """{
                .reg .pred %first;
                .reg .b32 %thread;
                mov.u32 %thread, %tid.x;
                setp.eq.u32 %first, %thread, 0;
                mov.b64 $0, 0;
                @%first atom.global.relaxed.gpu.add.u64 $0, [$1], $2;
            }""",
            "=&l,l,l,~{memory}",
            [p_sum.to(tl.int64), part],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )


@triton.jit
def weigh_bounds(b_bound, raised, tau, b, ORDER: tl.constexpr, SOFTMAX: tl.constexpr):
    """What a token of each unread page weighs at most: more than 0 if it can weigh anything."""
    b_z = tl.where(b_bound == -float("inf"), b_bound, b_bound + raised)
    b_w = tl.exp(b_z - tau) if SOFTMAX else weigh_scores(b_z, tau, b, ORDER)
    b_w = tl.maximum(b_w, TINY, propagate_nan=tl.PropagateNan.ALL)
    # Not "greater": a bound that is no number allows anything.
    return tl.where(b_z <= (-float("inf") if SOFTMAX else tau), 0.0, b_w)


@triton.jit
def sum_unread(
    p_bound, p_unread_mass, unread, rounding, b_bound, i_head, i_c, ranked, tau, peak, b,
    page_stride,
    P: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, CERTIFY: tl.constexpr, ORDER: tl.constexpr,
    SOFTMAX: tl.constexpr,
):  # fmt: skip
    """The certificate of a head, which is what its unread tokens weigh at most and 0 if they can
    weigh nothing, and whether it is complete.

    C programs share a head, each with every C-th BC of its pages; it is complete with the one that
    comes last. Both are known to the program's first thread, with C = 1 to all.

    tau: the threshold less `peak`, or for SOFTMAX the logarithm of the sum of exponentials.
    """
    complete = tl.full([], 0, tl.int32) + i_c == 0
    if CERTIFY == BOUNDED:
        raised = rounding + TAU_ROUNDING * (1.0 + tl.abs(tau + peak)) - peak
        b_mass = weigh_bounds(b_bound, raised, tau, b, ORDER, SOFTMAX)
        for i_p in range((i_c + C) * BC, ranked, C * BC):
            o_page = i_p + tl.arange(0, BC)
            b_bound = load_bounds(p_bound, i_head, o_page, ranked, page_stride)
            b_mass += weigh_bounds(b_bound, raised, tau, b, ORDER, SOFTMAX)
        # More than the rounding of the weights, whose powers are good to less digits, and of their
        # sum.
        mass = tl.sum(b_mass, 0) * (P * (1.0 + (16.0 + b) * 2.0**-16))
        if SOFTMAX:
            mass = tl.where(mass < float("inf"), mass / (1.0 + mass), 1.0)
        bound = tl.where(mass < 1.0, mass, 1.0)
        if C > 1:
            part = tl.ceil(bound * UNITS).to(tl.int64) + ARRIVAL
            total = add_alone(p_unread_mass + i_head, part) + part
            bound = tl.minimum((total % ARRIVAL).to(tl.float32) * (1.0 / UNITS), 1.0)
            complete = total // ARRIVAL == C
    else:
        bound = (unread > 0).to(tl.float32)
    return bound, complete


@triton.jit
def store_certificate(
    p_certificate, p_counters, bound, complete, i_b, i_hq, n, s_certificate, COUNT: tl.constexpr
):  # fmt: skip
    """Writes a head's certificate, if it is complete, and counts it by its size, unless the row is
    empty."""
    tl.store(p_certificate + i_b.to(tl.int64) * s_certificate + i_hq, bound, mask=complete)
    if COUNT:
        size = (bound > 0.0).to(tl.int32) + (bound > LEAST).to(tl.int32)
        size += (bound > LESS).to(tl.int32) + (bound > MORE).to(tl.int32)
        size += (bound > MOST).to(tl.int32) + (bound >= 1.0).to(tl.int32)
        one, counted = tl.full([], 1, tl.int64), complete & (n > 0)
        tl.atomic_add(p_counters + CERTIFIED + size, one, mask=counted, sem="relaxed")
