"""The exact entmax threshold, from listed candidates or, where the lists failed, from the keys."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import (
    EXCESS_MASS,
    NEWTON_STEPS,
    head_parameters,
    newton_step,
    norm,
    sum_moments,
    sum_pairs,
    weigh,
    weights_and_slopes,
)
from .scores import load_pages, load_queries, load_rows, load_scales, page_source, score_rows

# Candidates of one head that its program keeps in registers.
RESIDENT = 16384
# Thresholds that a pass over the keys of a failed row tries, and the number of passes.
TRIALS = tl.constexpr(32)
PASSES = tl.constexpr(3)


@triton.jit
def load_candidates(p_z, p_count, o_s, o_j, capacity, G: tl.constexpr, S: tl.constexpr):
    """Scores of one head at places o_j in the lists of splits o_s, -inf where there are none."""
    b_count = tl.load(p_count + o_s, mask=o_s < S, other=0)
    p_list = p_z + o_s.to(tl.int64) * G * capacity
    return tl.load(p_list + o_j, mask=o_j < b_count, other=-float("inf"))


@triton.jit
def threshold_kernel(
    p_seq_lens, p_alpha, p_guess, p_score, p_count, p_maximum, p_tau, p_failed,
    capacity, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, J: tl.constexpr,
    J2: tl.constexpr, LONG: tl.constexpr, GUESSED: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """Solves tau of one query head from its candidates, and says whether that is proved.

    It is when no list overflowed and the candidates have a mass of at least one above the
    guess, or when the guess lies below the largest score less one, which is below tau.
    """
    i_hq, i_b = tl.program_id(0), tl.program_id(1)
    i_row = i_b * HKV + i_hq // G
    i_head = i_b * HKV * G + i_hq
    _, b = head_parameters(p_alpha, factor, exponent, i_hq, i_hq >= 0, ALPHA_PER_HEAD)
    o_s, o_z = tl.arange(0, SP), tl.arange(0, SP * J)
    o_own = (i_row * S + o_s).to(tl.int64)
    b_count = tl.load(p_count + o_own, mask=o_s < S, other=0)
    b_peak = tl.load(p_maximum + o_own * G + i_hq % G, mask=o_s < S, other=-float("inf"))
    peak = tl.max(b_peak, 0)
    longest = tl.max(b_count, 0)
    failed = longest > capacity
    tau = 0.0
    if (peak > -float("inf")) & (longest <= capacity):
        lower = peak - 1.0
        if GUESSED:
            guess = tl.load(p_guess + i_head)
            lower = tl.maximum(lower, guess)
        # Flat, so that a sum takes the block one exchange; elements of a split are neighbours.
        p_z = p_score + (i_row * S * G + i_hq % G).to(tl.int64) * capacity
        b_z = load_candidates(
            p_z, p_count + i_row * S, o_z // J, o_z % J, capacity, G, S
        )  # [SP * J]
        tau = lower
        mass, slope = sum_moments(b_z, tau, b, ORDER)
        if GUESSED:
            failed = (longest <= J) & (lower == guess) & (mass < 1.0)
        # Where the lists are longer, this is the threshold of a part: a lower bound of the whole
        # one, and near it.
        steps = 0
        while (mass > 1.0 + EXCESS_MASS) & (steps < NEWTON_STEPS):
            tau += newton_step(mass, slope, 1.0, b, ORDER)
            mass, slope = sum_moments(b_z, tau, b, ORDER)
            steps += 1
        tau += newton_step(mass, slope, 1.0, b, ORDER)
        if LONG:
            o_z2 = tl.arange(0, SP * J2)
            steps = 0
            going = longest > J
            while going & (steps < NEWTON_STEPS):
                b_mass = tl.zeros([SP * J2], tl.float32)
                b_slope = tl.zeros([SP * J2], tl.float32)
                for i_j in tl.range(0, longest, J2, num_stages=1, loop_unroll_factor=2):
                    b_x = load_candidates(
                        p_z, p_count + i_row * S, o_z2 // J2, i_j + o_z2 % J2, capacity, G, S
                    )
                    b_x = tl.maximum(b_x - tau, 0.0)
                    b_w, b_d = weights_and_slopes(b_x, b, ORDER)
                    b_mass += b_w
                    b_slope += b_d
                mass, slope = sum_pairs((b_mass, b_slope))
                if GUESSED:
                    # A threshold of a part shows at least a mass of one in the whole: only a
                    # guess that it did not raise can fail.
                    failed |= (tau == guess) & (mass < 1.0)
                tau += newton_step(mass, slope, 1.0, b, ORDER)
                going = mass > 1.0 + EXCESS_MASS
                steps += 1
    tl.store(p_tau + i_head, tau)
    tl.store(p_failed + i_head, failed.to(tl.int32))


@triton.jit
def group_failed(p_failed, i_row, G: tl.constexpr, GP: tl.constexpr):
    """Whether any query head of a row is without a proved threshold."""
    o_g = tl.arange(0, GP)
    b_failed = tl.load(p_failed + i_row * G + o_g, mask=o_g < G, other=0)
    return tl.max(b_failed, 0) > 0


@triton.jit
def load_peaks(p_maximum, i_row, G: tl.constexpr, GP: tl.constexpr, S: tl.constexpr,
               SP: tl.constexpr):  # fmt: skip
    """Largest score of each head of a row, [GP]; 0 past the group."""
    o_s, o_g = tl.arange(0, SP), tl.arange(0, GP)
    p_m = p_maximum + ((i_row * S + o_s) * G).to(tl.int64)[:, None] + o_g[None, :]
    m_m = (o_s < S)[:, None] & (o_g < G)[None, :]
    b_m = tl.load(p_m, mask=m_m, other=-float("inf"))
    return tl.where(o_g < G, tl.max(b_m, 0), 0.0)


@triton.jit
def narrow_bracket(
    p_bracket, p_mass, i_pass, rows, i_row, b_exponent,
    GP: tl.constexpr, S: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """The bracket of tau after a pass: lower and upper bounds [GP].

    The norm of the weights is convex and decreasing in the threshold. Between the last trial
    above one and the first below it the chord is above the norm, so its root is an upper bound;
    the chord before it, prolonged, is below the norm, so its root is a lower bound.
    """
    o_g, o_j = tl.arange(0, GP), tl.arange(0, TRIALS)
    i_row += i_pass * rows
    p_b = p_bracket + i_row * 2 * GP + o_g
    b_low, b_high = tl.load(p_b), tl.load(p_b + GP)
    b_mass = tl.zeros([GP, TRIALS], tl.float32)
    p_m = p_mass + (i_row * S).to(tl.int64) * GP * TRIALS
    for i_s in range(S):
        b_mass += tl.load(p_m + (i_s * GP + o_g[:, None]) * TRIALS + o_j[None, :])
    b_norm = norm(b_mass, b_exponent[:, None], ORDER) - 1.0
    b_width = (b_high - b_low) / TRIALS
    index = tl.max(tl.where(b_norm >= 0.0, o_j[None, :], 0), 1)  # [GP]
    at = o_j[None, :] == index[:, None]
    before = o_j[None, :] == index[:, None] - 1
    after = o_j[None, :] == index[:, None] + 1
    n_at = tl.sum(tl.where(at, b_norm, 0.0), 1)
    n_before = tl.sum(tl.where(before, b_norm, 0.0), 1)
    n_after = tl.sum(tl.where(after, b_norm, 0.0), 1)
    b_at = b_low + index.to(tl.float32) * b_width
    fall = tl.maximum(n_at - n_after, 1e-30)
    b_chord = b_at + tl.minimum(tl.maximum(n_at / fall, 0.0), 1.0) * b_width
    b_high = tl.where(index + 1 < TRIALS, b_chord, b_high)
    fall = tl.maximum(n_before - n_at, 1e-30)
    b_rise = tl.where(index > 0, tl.maximum(n_at / fall, 0.0), 0.0) * b_width
    b_low = tl.minimum(b_at + b_rise, b_high)
    return b_low, b_high


@triton.jit
def bracket_kernel(
    p_query, p_key, p_block_table, p_listed, p_listed_count, p_seq_lens, p_alpha, p_slopes,
    p_maximum, p_failed, p_bracket, p_mass,
    s_query_b, s_query_h, s_page, s_head, s_block_table, list_stride, window,
    scale, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, PASS: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """One pass over the keys of a failed row: the mass above TRIALS thresholds of its bracket."""
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    if group_failed(p_failed, i_row, G, GP) == 0:
        return
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    p_pages, first, entries = page_source(
        p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table, list_stride,
        P, WINDOW, LISTED,
    )  # fmt: skip
    o_n, o_d, o_g = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, GP)
    o_j = tl.arange(0, TRIALS)
    b_scale, b_slope, b_exponent = load_scales(
        p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
    )
    rows = tl.num_programs(2) * HKV
    if PASS == 0:
        b_high = load_peaks(p_maximum, i_row, G, GP, S, SP)
        b_low = b_high - 1.0
    else:
        b_low, b_high = narrow_bracket(
            p_bracket, p_mass, PASS - 1, rows, i_row, b_exponent, GP, S, ORDER
        )
    if i_s == 0:
        p_b = p_bracket + (PASS * rows + i_row) * 2 * GP + o_g
        tl.store(p_b, b_low)
        tl.store(p_b + GP, b_high)
    b_trial = b_low[:, None] + ((b_high - b_low) / TRIALS)[:, None] * o_j[None, :]  # [GP, TRIALS]

    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    p_k = p_key + i_h.to(tl.int64) * s_head
    b_mass = tl.zeros([BN, GP, TRIALS], tl.float32)
    PAGES: tl.constexpr = BN // P
    for i_t in tl.range(i_s, (entries + PAGES - 1) // PAGES, S, num_stages=1):
        o_entry = i_t * PAGES + o_n // P
        b_page, b_logical = load_pages(p_pages, o_entry, first, entries, list_stride, LISTED)
        b_k = load_rows(p_k, b_page, o_n, o_d, s_page, D, P)  # [BN, DP]
        b_z = score_rows(
            b_k, b_q, b_logical, o_n, n, window, b_scale, b_slope, P, WINDOW, ALIBI
        )  # [BN, GP]
        b_x = tl.maximum(b_z[:, :, None] - b_trial[None, :, :], 0.0)
        b_mass += weigh(b_x, b_exponent[None, :, None], ORDER)
    p_m = p_mass + ((PASS * rows + i_row) * S + i_s).to(tl.int64) * GP * TRIALS
    tl.store(p_m + o_g[:, None] * TRIALS + o_j[None, :], tl.sum(b_mass, 0))
