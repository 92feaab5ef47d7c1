"""What a sparse step can say of the pages that it left out; see `reference/certificate.py`.

box writes an upper bound of the scores of every page for every head; who reads a page takes its
bounds away; who solves the threshold of a head weighs those that are left.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..reference.certificate import LEAST_BOUND, THRESHOLD_ROUNDING
from ..reference.quest import LEAST_QUERY
from ..report import BOUND_LIMITS, Counter
from .entmax import weigh_scores
from .pages import INTERPRETED

CERTIFIED = tl.constexpr(int(Counter.CERTIFIED))
LEAST, LESS, MORE, MOST = map(tl.constexpr, BOUND_LIMITS)
TAU_ROUNDING = tl.constexpr(THRESHOLD_ROUNDING * 2.0**-23)
TINY = tl.constexpr(LEAST_BOUND)
QUERY_MIN = tl.constexpr(LEAST_QUERY)

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
    p_bound, b_logical, o_n, i_row, n, page_stride, G: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Takes away the bounds that the heads of a group have of the pages of a tile of tokens: of
    numbers b_logical [BN] in a sequence of n tokens; o_n are the tokens' places in the tile. Each
    token of a page sees to one head, so that a thread has one store where no more heads are."""
    for i_g in tl.static_range(0, G, P):
        o_g = i_g + o_n % P
        p_b = p_bound + (i_row * G + o_g).to(tl.int64) * page_stride + b_logical
        m_bound = (o_g < G) & (b_logical * P < n)
        tl.store(p_b, tl.full(m_bound.shape, -float("inf"), tl.float32), mask=m_bound)


@triton.jit
def rounding_of(b_size, b_scale, b_slope, n, D: tl.constexpr, ALIBI: tl.constexpr):
    """By how much at most rounding can change scores of keys, and bounds, for heads of which b_size
    adds up the query's magnitudes: per sum of a page's two scales, and besides; see `sound_bounds`
    in `reference/quest.py`."""
    ROUNDING: tl.constexpr = 4 * D * 2.0**-23
    b_size += QUERY_MIN
    b_fixed = b_size * 0.0
    if ALIBI:
        b_fixed += tl.abs(b_slope) * n.to(tl.float32) * ROUNDING
    return b_size * b_scale * (ROUNDING * 127), b_fixed


@triton.jit
def load_query(p_query, i_b, i_hq, s_query_b, s_query_h, D: tl.constexpr, DP: tl.constexpr):
    """The query of a head, as parts of which each warp has all. It is given with the step, so that
    no launch is awaited, and asked for here, before it is needed."""
    BD: tl.constexpr = min(DP, 32)
    p_q = p_query + i_b.to(tl.int64) * s_query_b + i_hq * s_query_h
    parts = ()
    for i_d in tl.static_range(0, DP, BD):
        o_d = i_d + tl.arange(0, BD)
        parts += (tl.load(p_q + o_d, mask=o_d < D, other=0.0),)  # type: ignore[assignment]
    return parts


@triton.jit
def own_rounding(
    parts, own_scale, slope, n, D: tl.constexpr, DP: tl.constexpr, ALIBI: tl.constexpr
):
    """`rounding_of` one query head. The sum needs no exchange between warps."""
    BD: tl.constexpr = min(DP, 32)
    b_size = tl.zeros([BD], tl.float32)
    for i_d in tl.static_range(0, DP // BD):
        b_size += tl.abs(parts[i_d].to(tl.float32))
    return rounding_of(tl.sum(b_size, 0), own_scale, slope, n, D, ALIBI)


@triton.jit
def place_last_scales(
    p_block_table, p_scales, i_b, i_h, ranked, s_block_table, s_scales_page, s_scales_head
):
    """Where the scales are of the last page of a row, which is read without being ranked."""
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    page = tl.load(p_table + ranked, mask=ranked > 0, other=0).to(tl.int64)
    return p_scales + page * s_scales_page + i_h.to(tl.int64) * s_scales_head


@triton.jit
def load_last_span(p_last, ranked):
    """Sum of the two scales of that page."""
    span = tl.load(p_last, mask=ranked > 0, other=0.0)
    return span + tl.load(p_last + 1, mask=ranked > 0, other=0.0)


@triton.jit
def load_spans(p_span, i_row, PS: tl.constexpr, PSP: tl.constexpr):
    """Sums of the two scales of pages of a row, the largest ones."""
    BS: tl.constexpr = min(PSP, 32)
    b_span = tl.zeros([BS], tl.float32)
    for i_s in tl.static_range(0, PSP, BS):
        o_s = i_s + tl.arange(0, BS)
        p_s = p_span + i_row * (PS + 1) + o_s
        b_span = tl.maximum(b_span, tl.load(p_s, mask=o_s < PS, other=0.0))
    return b_span


@triton.jit
def most_rounding(b_span, last, b_unit, b_fixed):
    """By how much at most rounding can change bounds of heads, the scores below them, and those of
    keys that were read, by which the threshold moves."""
    return 2.0 * (tl.maximum(tl.max(b_span, 0), last) * b_unit + b_fixed)


@triton.jit
def load_bounds(p_bound, i_head, o_page, ranked, page_stride):
    """Bounds of a head's pages, -inf of those that were read."""
    p_b = p_bound + i_head.to(tl.int64) * page_stride
    return tl.load(p_b + o_page, mask=o_page < ranked, other=-float("inf"))


@triton.jit
def load_unread(
    p_listed_count, p_bound, p_span, i_row, i_head, i_c, n, ranked, page_stride,
    P: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr, BC: tl.constexpr, LISTED: tl.constexpr,
    CERTIFY: tl.constexpr,
):  # fmt: skip
    """What a certificate takes but the threshold and the head's own rounding: how many pages are
    unread where nothing bounds them, else sums of the pages' scales, and bounds of the first BC
    pages of part i_c."""
    unread = tl.full([], 0, tl.int32)
    spans = tl.zeros([1], tl.float32), tl.full([], 0.0, tl.float32)
    b_bound = tl.zeros([BC], tl.float32)
    if CERTIFY == BOUNDED:
        b_bound = load_bounds(p_bound, i_head, i_c * BC + tl.arange(0, BC), ranked, page_stride)
        spans = load_spans(p_span, i_row, PS, PSP), tl.load(p_span + i_row * (PS + 1) + PS)
    elif LISTED and CERTIFY != PROVED:
        unread += (n + P - 1) // P - tl.load(p_listed_count + i_row)
    return unread, spans, b_bound


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
    p_bound, p_unread_mass, unread, spans, rounding, b_bound, i_head, i_c, ranked, tau, peak, b,
    page_stride,
    P: tl.constexpr, BC: tl.constexpr, BU: tl.constexpr, C: tl.constexpr, CERTIFY: tl.constexpr,
    ORDER: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """The certificate of a head, which is what its unread tokens weigh at most and 0 if they can
    weigh nothing, and whether it is complete.

    C programs share a head, each with one of C tiles of BC of its pages and of C of BU as long as
    there are more (BU is 0 if there cannot be); it is complete with the one that comes last. Both
    are known to the program's first thread, with C = 1 to all.

    tau: the threshold less `peak`, or for SOFTMAX the logarithm of the sum of exponentials.
    """
    complete = tl.full([], 0, tl.int32) + i_c == 0
    if CERTIFY == BOUNDED:
        raised = most_rounding(spans[0], spans[1], rounding[0], rounding[1])
        raised += TAU_ROUNDING * (1.0 + tl.abs(tau + peak)) - peak
        # More than the rounding of the weights, whose powers are good to less digits, and of their
        # sum.
        each = P * (1.0 + (16.0 + b) * 2.0**-16)
        mass = tl.sum(weigh_bounds(b_bound, raised, tau, b, ORDER, SOFTMAX), 0) * each
        # Of more than 1 the others change nothing, nor of SOFTMAX of no number.
        going = mass < (float("inf") if SOFTMAX else 1.0)
        if C == 1:
            going &= i_c == 0
        if BU > 0 and going:
            b_more = tl.zeros([BU], tl.float32)
            for i_p in range(C * BC + i_c * BU, ranked, C * BU):
                o_page = i_p + tl.arange(0, BU)
                b_own = load_bounds(p_bound, i_head, o_page, ranked, page_stride)
                b_more += weigh_bounds(b_own, raised, tau, b, ORDER, SOFTMAX)
            mass += tl.sum(b_more, 0) * each
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
