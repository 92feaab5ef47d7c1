"""What a tile of prefill knows of its thresholds before it has read all keys, and after a miss.

First a lower bound from a few keys. Then, where there are many keys, a guess from a sample of them,
which is proved later: where the keys above the guess have a mass of at least one above it, it is a
lower bound too.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import newton_step, norm
from .prefill_tiles import load_pages, load_rows, moments, score

# Keys at the start of what a tile sees that the first lower bound is taken from; the others are
# its last ones.
FIRST_KEYS = tl.constexpr(32)
SEED_STEPS = tl.constexpr(4)
LEAST = tl.constexpr(-3e38)
# Mass above the guess that the sample is made to show: more gives longer lists, less failures.
GUESSED_MASS = tl.constexpr(2.0)
GUESS_STEPS = tl.constexpr(2)
# Sampled scores above the third largest maximum of a key tile are taken for exceptions, which do
# not stand for others.
EXCEPTIONS = tl.constexpr(2)


@triton.jit
def seed_threshold(
    rows, p_key, p_table, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A lower bound of the threshold of each row, from BM of the keys, and the base that it and
    all later scores are less than, [BM] each.

    They are the first keys and the last ones that the tile sees; with at most BM queries in a tile,
    every row sees one of them. The base is the largest score of the first BN of them.
    """
    b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, count, lowest, window = rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    recent = tl.maximum(position + count - BM, lowest)
    b_tau = tl.full([BM], -float("inf"), tl.float32)
    # The first tile twice: its scores are to be less the base in one rounding, as all later ones.
    for i in tl.range(-BN, BM, BN, num_stages=1):
        i_s = tl.maximum(i, 0)
        o_key = tl.where(i_s + o_n < FIRST_KEYS, lowest, recent) + i_s + o_n
        m_key = o_key < position + count
        b_page = load_pages(p_table, o_key, m_key, P)
        b_k = load_rows(p_key, b_page, o_key, m_key, o_d, s_page, D, P, MASKED=True)
        b_z = score(
            b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
            ALIBI, WINDOW, MASKED=True,
        )  # fmt: skip
        if i < 0:
            b_peak = tl.max(b_z, 1)
            b_base = tl.where(b_peak > -float("inf"), b_peak, 0.0)
        else:
            b_tau = tl.maximum(b_tau, tl.max(b_z, 1) - 1.0)
            for _ in range(SEED_STEPS):
                # No finite bound and no visible key make NaN of their difference.
                b_mass, b_power = moments(b_z, tl.maximum(b_tau, LEAST), b_exponent, ORDER)
                b_tau += newton_step(b_mass, b_power, 1.0, b_exponent, ORDER)
    return b_tau, b_base


@triton.jit
def guess_threshold(
    rows, p_key, p_table, b_bound, whole, listed, samples, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A guess of the threshold of each row, at least its bound, from the keys of as many sampled
    key tiles, evenly spaced among those that need no masks.

    The scores are made once for their maxima, which tell the exceptions and where to start from,
    and once for each Newton step; no step passes the root of the sample.
    """
    b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, _count, _lowest, window = rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    # Neighbouring keys resemble each other: a sampled tile has keys of the whole range.
    stride = listed // tl.maximum(samples, 1)
    start, spread = whole * BN, samples * stride
    mass = tl.minimum(GUESSED_MASS * samples.to(tl.float32) / listed, 1.0)
    b_mass_root = norm(mass + tl.zeros([BM], tl.float32), b_exponent, ORDER)
    b_first = tl.full([BM], -float("inf"), tl.float32)
    b_second, b_clip, b_guess = b_first, b_first, b_bound
    b_mass, b_power = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    last = samples * (1 + GUESS_STEPS)
    b_next = load_pages(p_table, start + o_n * spread, o_n < last * BN, P)
    for i in tl.range(0, last, num_stages=STAGES):
        o_key, b_page = start + i % samples * stride + o_n * spread, b_next
        # Loaded an iteration ahead: see `add_listed`.
        m_next = o_n < (last - i - 1) * BN
        o_next = start + (i + 1) % samples * stride + o_n * spread
        b_next = load_pages(p_table, o_next, m_next, P)
        b_k = load_rows(p_key, b_page, o_key, m_next, o_d, s_page, D, P, MASKED=False)
        b_z = score(
            b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
            ALIBI, WINDOW, MASKED=False,
        )  # fmt: skip
        if i < samples:
            b_peak = tl.max(b_z, 1)
            b_clip = tl.maximum(b_clip, tl.minimum(b_second, b_peak))
            b_second = tl.maximum(b_second, tl.minimum(b_first, b_peak))
            b_first = tl.maximum(b_first, b_peak)
        else:
            b_tile_mass, b_tile_power = moments(
                tl.minimum(b_z, b_clip[:, None]), b_guess, b_exponent, ORDER
            )
            b_mass += b_tile_mass
            b_power += b_tile_power
        if i % samples == samples - 1:
            if i < samples:
                # The exceptions and the third one, all clipped, have the mass above this alone.
                b_third = norm(mass / (EXCEPTIONS + 1) + b_mass, b_exponent, ORDER)
                b_start = b_clip - b_third
                b_guess = tl.where(b_start > b_guess, b_start, b_guess)
            else:
                b_guess += newton_step(b_mass, b_power, b_mass_root, b_exponent, ORDER)
                b_mass, b_power = b_mass * 0.0, b_power * 0.0
    # Not NaN, whatever the sample has.
    return tl.where(b_guess > b_bound, b_guess, b_bound)


@triton.jit
def step_back(b_tau, b_mass, b_power, b_bound, b_exponent, ORDER: tl.constexpr):
    """A lower bound from a guess that was too high, with the moments of all keys at it.

    The norm is convex: a Newton step that falls falls below the root.
    """
    b_length = norm(b_mass, b_exponent, ORDER)
    b_back = b_tau + (1.0 - 1.0 / b_length) * (b_mass / b_power)
    # Not where there is no mass at all.
    return tl.where(b_back > b_bound, b_back, b_bound)
