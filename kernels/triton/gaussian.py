"""The Gaussian page rule of EntmaxKV on the device; `reference/gaussian.py` states it.

Everything past the dot products is in fp32. Partial moments of a normal variable are integrated
numerically, which keeps their relative precision in the tails, where their closed forms cancel.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import math

import triton
import triton.language as tl

from .entmax import head_parameters
from .pages import NEVER, load_statistics, ranked_pages
from .scores import allow_next, load_queries

LEAST_DEVIATION = tl.constexpr(1e-6)
LOG_SQRT_TAU = tl.constexpr(0.5 * math.log(2 * math.pi))
# Nodes of the trapezoidal rule, in units of the width of the integrand's peak.
NODES = tl.constexpr(32)
FIRST_NODE = tl.constexpr(-24)
NODE_STEP = tl.constexpr(0.6)
THRESHOLD_STEPS = tl.constexpr(40)
# A step squares the excess, so the step taken from here leaves what fp32 cannot tell.
LAST_STEP = tl.constexpr(2e-3)


@triton.jit
def model_kernel(
    p_query, p_statistics, p_block_table, p_seq_lens, p_exact_rows, p_slopes,
    p_reach, p_deviation, p_model,
    s_query_b, s_query_h, s_head, s_block_table, page_stride, exact_below, scale,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BP: tl.constexpr, PS: tl.constexpr, ALIBI: tl.constexpr,
    EXACT_ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and deviation of the scores of each page, and the moments of a split's pages.

    The moments of the means, without ALiBi, are about a pivot, the mean of the split's first
    pages: pivot, sum, sum of squares and of variances, sum of deviations.
    """
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    o_p, o_d, o_g = tl.arange(0, BP), tl.arange(0, DP), tl.arange(0, GP)
    m_g = o_g < G
    b_slope = tl.zeros([GP], tl.float32)
    if ALIBI:
        b_slope = tl.load(p_slopes + i_h * G + o_g, mask=m_g, other=0.0)
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    b_q32 = b_q.to(tl.float32) * scale
    b_square = b_q32 * b_q32
    p_stat = p_statistics + i_h.to(tl.int64) * s_head
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    o_out = (i_row * G + o_g).to(tl.int64)[None, :] * page_stride
    b_pivot = tl.zeros([GP], tl.float32)
    b_first = tl.zeros([BP, GP], tl.float32)
    b_second = tl.zeros([BP, GP], tl.float32)
    b_total = tl.zeros([BP, GP], tl.float32)
    b_next = tl.load(p_table + i_s * BP + o_p, mask=i_s * BP + o_p < ranked, other=0)
    for i_p in tl.range(i_s * BP, ranked, PS * BP, num_stages=STAGES):
        o_page = i_p + o_p
        b_page = b_next
        b_next = tl.load(p_table + o_page + PS * BP, mask=o_page + PS * BP < ranked, other=0)
        b_mean, b_std = load_statistics(p_stat, b_page, o_d, s_page, D)  # [BP, DP]
        b_m = tl.dot(b_mean.to(b_q.dtype), b_q, input_precision="ieee") * scale  # [BP, GP]
        b_std = b_std.to(tl.float32)
        b_v = tl.dot(b_std * b_std, b_square, input_precision=PRECISION)
        b_dev = tl.maximum(tl.sqrt(tl.maximum(b_v, 0.0)), LEAST_DEVIATION)
        m_page = (o_page < ranked)[:, None]
        if i_p == i_s * BP:
            inside = tl.minimum(ranked - i_p, BP).to(tl.float32)
            b_pivot = tl.sum(tl.where(m_page, b_m, 0.0), 0) / inside
        b_centred = tl.where(m_page, b_m - b_pivot[None, :], 0.0)
        b_first += b_centred
        b_second += b_centred * b_centred + tl.where(m_page, b_v, 0.0)
        b_total += tl.where(m_page, b_dev, 0.0)
        if ALIBI:
            middle = (o_page * P - (n - 1)).to(tl.float32) + 0.5 * (P - 1)
            b_m += b_slope[None, :] * middle[:, None]
        m_out = m_g[None, :] & m_page
        tl.store(p_reach + o_out + o_page[:, None], b_m, mask=m_out)
        tl.store(p_deviation + o_out + o_page[:, None], b_dev, mask=m_out)
    p_m = p_model + ((i_row * PS + i_s) * G + o_g) * 4
    tl.store(p_m, b_pivot, mask=m_g)
    tl.store(p_m + 1, tl.sum(b_first, 0), mask=m_g)
    tl.store(p_m + 2, tl.sum(b_second, 0), mask=m_g)
    tl.store(p_m + 3, tl.sum(b_total, 0), mask=m_g)


@triton.jit
def log_partial_moment(b_t, order):
    """log E[max(t + X, 0) ** order] of X standard normal, for each t of b_t [N]; order >= 0.

    With y = exp(u) the integrand is smooth and decays at both ends, where the trapezoidal rule
    converges exponentially; the nodes are spaced by the width of its peak.
    """
    b_root = tl.sqrt(b_t * b_t + 4.0 * (order + 1.0))
    b_low = 2.0 * (order + 1.0) / (b_root - tl.minimum(b_t, 0.0))
    b_peak = tl.where(b_t > 0.0, 0.5 * (b_t + b_root), b_low)
    b_step = NODE_STEP / tl.sqrt(b_peak * b_root)
    b_u = (tl.arange(0, NODES) + FIRST_NODE).to(tl.float32)[None, :] * b_step[:, None]
    b_above = b_peak - b_t
    b_gain = b_peak[:, None] * (tl.exp(b_u) - 1.0)
    b_exponent = (order + 1.0) * b_u - 0.5 * b_gain * (b_gain + 2.0 * b_above[:, None])
    b_log = tl.log(tl.sum(tl.exp(b_exponent), 1)) + (order + 1.0) * tl.log(b_peak)
    b_log += tl.log(b_step) - 0.5 * b_above * b_above - LOG_SQRT_TAU
    # Far above zero the moment is that of a narrow distribution.
    b_far = tl.maximum(b_t, 30.0 + 5.0 * order)
    b_wide = 1.0 + 0.5 * order * (order - 1.0) / (b_far * b_far)
    return tl.where(b_t < b_far, b_log, order * tl.log(b_far) + tl.log(b_wide))


@triton.jit
def add_logarithms(b_log, maximum, total):
    """Adds exp(b_log) to total * exp(maximum)."""
    raised = tl.maximum(maximum, tl.max(b_log, 0))
    return raised, total * tl.exp(maximum - raised) + tl.sum(tl.exp(b_log - raised), 0)


@triton.jit
def threshold_step(total, slope, b):
    """Newton step of tau from the logarithms of sum E[Y ** b] and sum E[Y ** (b - 1)]."""
    return (tl.exp(total / b) - 1.0) * tl.exp(total * (1.0 - 1.0 / b) - slope)


@triton.jit
def tail_start(log_mass, b):
    """About how many deviations above its mean a normal variable has its threshold.

    Far out, E[max(X - x, 0) ** b] is Gamma(b + 1) phi(x) / x ** (b + 1). From either side of the
    threshold the first step leads below it, and the others rise to it.
    """
    log_gamma = b * tl.log(b) - b + 0.5 * tl.log(b) + LOG_SQRT_TAU + 1.0 / (12.0 * b)
    height = log_mass + log_gamma - LOG_SQRT_TAU
    x = tl.sqrt(tl.maximum(2.0 * height, 0.25))
    for _ in tl.static_range(3):
        x = tl.sqrt(tl.maximum(2.0 * (height - (b + 1.0) * tl.log(x)), 0.25))
    return tl.where(height > 3.0, x, -1e30)


@triton.jit
def score_moments(
    p_model, ranked, i_row, i_g, G: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Mean and deviation of all scores of one query head, and the mean deviation of its pages."""
    o_s = tl.arange(0, PSP)
    p_m = p_model + ((i_row * PS + o_s) * G + i_g) * 4
    # Pages of a split: whole tiles, and what the last tile has.
    b_tiles = tl.maximum(ranked // BP - o_s + PS - 1, 0) // PS
    b_count = b_tiles * BP + tl.where(o_s == ranked // BP % PS, ranked % BP, 0)
    m_s = (o_s < PS) & (b_count > 0)
    b_count = tl.where(m_s, b_count, 0).to(tl.float32)
    b_pivot = tl.load(p_m, mask=m_s, other=0.0)
    b_first = tl.load(p_m + 1, mask=m_s, other=0.0)
    b_second = tl.load(p_m + 2, mask=m_s, other=0.0)
    pages = ranked.to(tl.float32)
    mean = tl.sum(b_pivot * b_count + b_first, 0) / pages
    b_shift = b_pivot - mean
    moment = b_second + b_shift * (2.0 * b_first + b_count * b_shift)
    variance = tl.sum(tl.where(m_s, moment, 0.0), 0) / pages
    spread = tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)), LEAST_DEVIATION)
    deviation = tl.sum(tl.load(p_m + 3, mask=m_s, other=0.0), 0) / pages
    return mean, spread, deviation


@triton.jit
def cut_kernel(
    p_seq_lens, p_exact_rows, p_alpha, p_slopes, p_reach, p_deviation, p_model, p_cut,
    page_stride, exact_below, factor, exponent,
    narrow_spread, safety, narrow_safety, quantile, narrow_quantile,
    excess_fraction, excess_deviations,
    HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    BP: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    EXACT_ROWS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """What decides about the pages of one query head: the floor that a page's reach has to
    exceed, and the number of deviations that the reach lies above the page's mean.

    quantile, narrow_quantile: as numbers of deviations of a page's score.
    SHARED: the mean spread of the sequence's heads chooses between the settings.
    """
    i_hq, i_b = tl.program_id(0), tl.program_id(1)
    i_row = i_b * HKV + i_hq // G
    i_head = i_b * HKV * G + i_hq
    n, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    if ranked == 0:
        return
    head_factor, b = head_parameters(p_alpha, factor, exponent, i_hq, i_hq >= 0, ALPHA_PER_HEAD)
    mean, spread, deviation = score_moments(p_model, ranked, i_row, i_hq % G, G, PS, PSP, BP)
    typical = spread
    if SHARED:
        typical = 0.0 * spread
        for i_other in range(0, HKV * G):
            i_other_row = i_b * HKV + i_other // G
            _, other, _ = score_moments(p_model, ranked, i_other_row, i_other % G, G, PS, PSP, BP)
            typical += other / (HKV * G)

    pages = ranked.to(tl.float32)
    biased = mean
    if ALIBI:
        middle = 0.5 * (pages * P - 1.0) - (n - 1).to(tl.float32)
        biased += tl.load(p_slopes + i_hq) * middle
        o_p = tl.arange(0, BP)
        p_r = p_reach + i_head.to(tl.int64) * page_stride
        p_d = p_deviation + i_head.to(tl.int64) * page_stride
        b_best = tl.full([BP], -float("inf"), tl.float32)
        for i_p in range(0, ranked, BP):
            b_m = tl.load(p_r + i_p + o_p, mask=i_p + o_p < ranked, other=-float("inf"))
            b_best = tl.maximum(b_best, b_m)
        tau = tl.max(b_best, 0) * head_factor - tl.exp(-tl.log(P * 1.0) / b)
        going, steps = tl.full([], 1, tl.int32), tl.full([], 0, tl.int32)
        while (going > 0) & (steps < THRESHOLD_STEPS):
            top, mass = -1e30, 0.0
            slope_top, slope_mass = -1e30, 0.0
            for i_p in range(0, ranked, BP):
                m_p = i_p + o_p < ranked
                b_m = tl.load(p_r + i_p + o_p, mask=m_p, other=0.0) * head_factor
                b_d = tl.load(p_d + i_p + o_p, mask=m_p, other=1.0) * head_factor
                b_t, b_log = (b_m - tau) / b_d, tl.log(b_d)
                b_w = tl.where(m_p, b * b_log + log_partial_moment(b_t, b), -1e30)
                b_v = tl.where(m_p, (b - 1.0) * b_log + log_partial_moment(b_t, b - 1.0), -1e30)
                top, mass = add_logarithms(b_w, top, mass)
                slope_top, slope_mass = add_logarithms(b_v, slope_top, slope_mass)
            total = top + tl.log(mass * P)
            tau += threshold_step(total, slope_top + tl.log(slope_mass * P), b)
            going = (tl.abs(total) > LAST_STEP).to(tl.int32)
            steps += 1
    else:
        o_one = tl.arange(0, 1)
        log_count = tl.log(pages * P)
        centre, width = mean * head_factor, spread * head_factor
        log_mass, log_slope = log_count + b * tl.log(width), log_count + (b - 1.0) * tl.log(width)
        tau = centre + width * tail_start(log_mass, b)
        tau = tl.maximum(tau, centre - tl.exp(-log_count / b))
        going, steps = tl.full([], 1, tl.int32), tl.full([], 0, tl.int32)
        while (going > 0) & (steps < THRESHOLD_STEPS):
            b_t = (centre - tau) / width + o_one.to(tl.float32)
            total = log_mass + tl.sum(log_partial_moment(b_t, b), 0)
            slope = log_slope + tl.sum(log_partial_moment(b_t, b - 1.0), 0)
            tau += threshold_step(total, slope, b)
            going = (tl.abs(total) > LAST_STEP).to(tl.int32)
            steps += 1
    threshold = tau / head_factor
    narrow = typical < narrow_spread
    upper = biased + excess_deviations * deviation
    excess = excess_fraction * tl.maximum(threshold - upper, 0.0)
    least = tl.where(narrow, narrow_safety, safety) * typical * spread
    tl.store(p_cut + 2 * i_head, threshold - tl.maximum(least, excess))
    tl.store(p_cut + 2 * i_head + 1, tl.where(narrow, narrow_quantile, quantile))


@triton.jit
def reach_kernel(
    p_seq_lens, p_exact_rows, p_reach, p_deviation, p_cut, p_distance, p_tile_count,
    page_stride, exact_below,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, P: tl.constexpr, BR: tl.constexpr,
    BL: tl.constexpr, NT: tl.constexpr, EXACT_ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Distance 0 for pages that any head of the group wants, infinity for the others, and how many
    it wants of one tile of BL pages."""
    allow_next(CHAINED)
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
    if i_t * BL >= ranked:
        return
    o_g, o_r = tl.arange(0, GP), tl.arange(0, BR)
    m_g = o_g < G
    p_c = p_cut + 2 * (i_row * G + o_g)
    b_floor = tl.load(p_c, mask=m_g, other=float("inf"))[:, None]
    b_quantile = tl.load(p_c + 1, mask=m_g, other=0.0)[:, None]
    o_head = (i_row * G + o_g).to(tl.int64)[:, None] * page_stride
    p_d = p_distance + i_row.to(tl.int64) * page_stride
    b_count = tl.zeros([BR], tl.int32)
    for i_p in range(i_t * BL, tl.minimum(i_t * BL + BL, ranked), BR):
        o_page = i_p + o_r
        m_r = m_g[:, None] & (o_page < ranked)[None, :]
        b_m = tl.load(p_reach + o_head + o_page[None, :], mask=m_r, other=-float("inf"))
        b_d = tl.load(p_deviation + o_head + o_page[None, :], mask=m_r, other=0.0)
        b_wanted = tl.max((b_m + b_quantile * b_d > b_floor).to(tl.int32), 0)
        tl.store(p_d + o_page, tl.where(b_wanted > 0, 0, NEVER), mask=o_page < ranked)
        b_count += b_wanted
    tl.store(p_tile_count + i_row * NT + i_t, tl.sum(b_count, 0))
