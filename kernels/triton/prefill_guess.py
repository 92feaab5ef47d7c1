"""Guesses of the thresholds of a tile of prefill, from a sample of the keys."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import norm, weights_and_slopes
from .prefill_rough import (
    LEAST,
    SCALE,
    bound_step,
    is_rough,
    rough_moments,
    scaled_rows,
    sum_bounds,
    unscaled,
)
from .prefill_tiles import load_rows, page_offsets, score

# How often the sample is read for a guess at most, and a row's mass from which on it is once more.
GUESS_STEPS = tl.constexpr(3)
FAR_MASS = tl.constexpr(16.0)


@triton.jit
def add_sample(
    rows, b_base, p_key, p_table, b_tau, b_zero, first, space, count, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass and power of `count` tiles of keys that are `space` positions apart, and how far the
    largest of their scores is above b_tau, zero at least, as `rough_moments`, [BM] each."""
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    rows, b_base, b_tau = scaled_rows(rows, b_base, b_tau, ORDER)
    b_mass, b_power, b_top = b_zero, b_zero, b_zero
    # Pages are loaded an iteration ahead: a load that waits for another one in the same iteration
    # would take the stages of the pipeline.
    b_next = tl.load(p_table + (first + o_n * space).to(tl.uint32) // P)
    for i_t in tl.range(0, count, num_stages=STAGES):
        o_key, b_page = first + (i_t * BN + o_n) * space, b_next
        o_next = (o_key + BN * space).to(tl.uint32) // P
        b_next = tl.load(p_table + o_next, mask=i_t + 1 + tl.zeros_like(o_n) < count, other=0)
        b_offset = page_offsets(b_page, s_page) + (o_key.to(tl.uint32) % P) * D
        b_k = load_rows(p_key, b_offset, o_n, o_d, D, MASKED=False)
        b_z = score(rows, b_base, b_k, o_key, ALIBI, WINDOW, MASKED=False)
        b_tile_mass, b_tile_power, _, b_tile_top = rough_moments(rows, b_z, b_tau, ORDER)
        b_mass += b_tile_mass
        b_power += b_tile_power
        b_top = tl.maximum(b_top, b_tile_top)
    b_row_mass, b_row_power = unscaled(rows, tl.sum(b_mass, 1), tl.sum(b_power, 1), ORDER)
    b_row_top = tl.max(b_top, 1)
    if is_rough(rows, ORDER):
        b_row_top *= 1.0 / SCALE
    return b_row_mass, b_row_power, b_row_top


@triton.jit
def guess_step(mass, power, root, exponent, ORDER: tl.constexpr):
    """`newton_step` that goes down too, from where the mass is too small to a lower bound; as far
    as can be where there is no mass at all."""
    length = norm(mass, exponent, ORDER)
    step = (1.0 - root / tl.maximum(length, 1e-30)) * (mass / tl.maximum(power, 1e-30))
    return tl.where((length > 1e-30) & (power > 1e-30), step, LEAST)


@triton.jit
def guess_thresholds(
    rows, b_base, p_key, p_table, b_tau, b_mass, b_power, b_zero, first, recent, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    SAMPLED: tl.constexpr, GUESSED: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A lower bound, and a guess of the threshold that all keys will have; the bound itself where
    they are too few for a tile of the sample.

    b_mass and b_power are those [BM] of the keys from `recent` on, exact at the lower bound b_tau.
    Every key of an evenly spaced sample of those from `first` to `recent` stands for its
    neighbours, but for the one with the largest score of a row, which may be an exception.
    """
    b_exponent, b_bound, b_guess = rows[3], b_tau, b_tau
    tiles = (recent - first) // (BN * SAMPLED)
    space = (recent - first) // tl.maximum(tiles * BN, 1)
    each = (recent - first) / tl.maximum(tiles * BN, 1)
    b_norm = norm(b_mass, b_exponent, ORDER)
    b_fall = b_norm * (b_power / tl.maximum(b_mass, 1e-30))
    root = norm(tl.zeros_like(b_tau) + GUESSED, b_exponent, ORDER)
    left = tl.where(tiles > 0, GUESS_STEPS, 0)
    while left > 0:
        b_sample_mass, b_sample_power, b_top = add_sample(
            rows, b_base, p_key, p_table, b_guess, b_zero, first, space, tiles, s_page,
            D, DP, P, BN, ORDER, ALIBI, WINDOW, STAGES,
        )  # fmt: skip
        if left == GUESS_STEPS:
            b_least, b_most = sum_bounds(
                rows, b_mass + b_sample_mass, b_power + b_sample_power, recent - first, BN, ORDER
            )
            b_bound += bound_step(b_least, b_most, b_exponent, ORDER)
        # The norm is convex: of the recent keys it is at least that of a straight line.
        b_recent = tl.maximum(b_norm - (b_guess - b_tau) * b_fall, 0.0)
        b_all, b_slope = weights_and_slopes(b_recent, b_exponent, ORDER)
        b_top_mass, b_top_slope = weights_and_slopes(b_top, b_exponent, ORDER)
        b_all += b_top_mass + each * tl.maximum(b_sample_mass - b_top_mass, 0.0)
        b_slope = b_slope * b_fall + b_top_slope
        b_slope += each * tl.maximum(b_sample_power - b_top_slope, 0.0)
        b_step = guess_step(b_all, b_slope, root, b_exponent, ORDER)
        b_step = tl.where(b_sample_mass < float("inf"), b_step, 0.0)
        b_guess = tl.maximum(b_guess + b_step, b_bound)
        left = tl.where(tl.max((b_all > FAR_MASS).to(tl.int32), 0) > 0, left - 1, 0)
    return b_bound, b_guess
