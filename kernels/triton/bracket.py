"""Narrowing a bracket of a threshold by the masses above trials within it."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import norm

# Thresholds that a pass over the keys tries, and the most passes: a bracket of width one shrinks
# by that factor in each.
TRIALS = tl.constexpr(16)
PASSES = tl.constexpr(11)
# The width of a bracket, as a share of the distance from the largest score, at which it ends.
NARROW = tl.constexpr(2e-7)
# By how much rounding can change a norm, as a share of it.
ROUNDING = tl.constexpr(2.0**-20)


@triton.jit
def narrow_bracket(b_mass, b_low, b_high, b_exponent, ORDER: tl.constexpr):
    """The bracket [b_low, b_high] of tau, each [GP], given the mass [GP, TRIALS] above its trials.

    The norm of the weights is convex and decreasing in the threshold. Between the last trial
    above one and the first below it the chord is above the norm, so its root is an upper bound;
    the chord before it, prolonged, is below the norm, so its root is a lower bound. Both allow for
    rounding, which is most of the difference between trials that are close.
    """
    o_j = tl.arange(0, TRIALS)[None, :]
    b_norm = norm(b_mass, b_exponent[:, None], ORDER) - 1.0
    b_width = (b_high - b_low) / TRIALS
    b_index = tl.max(tl.where(b_norm >= 0.0, o_j, 0), 1)  # [GP]
    b_at = tl.sum(tl.where(o_j == b_index[:, None], b_norm, 0.0), 1)
    b_before = tl.sum(tl.where(o_j == b_index[:, None] - 1, b_norm, 0.0), 1)
    b_after = tl.sum(tl.where(o_j == b_index[:, None] + 1, b_norm, 0.0), 1)
    b_trial = b_low + b_index.to(tl.float32) * b_width
    b_slack = ROUNDING * (b_at + 1.0)
    b_least, b_most = tl.maximum(b_at - b_slack, 0.0), tl.maximum(b_at, 0.0) + b_slack
    b_fall = tl.maximum(b_at - b_after - b_slack - ROUNDING * (b_after + 1.0), 1e-30)
    b_chord = b_trial + tl.minimum(b_most / b_fall, 1.0) * b_width
    b_high = tl.where(b_index + 1 < TRIALS, b_chord, b_high)
    b_fall = tl.maximum(b_before - b_at, 0.0) + b_slack + ROUNDING * (b_before + 1.0)
    b_rise = tl.where(b_index > 0, b_least / b_fall, 0.0) * b_width
    # Their sum may not be rounded up: the root may be nearer than that to the bound.
    b_sum = b_trial + b_rise + b_trial * 2.0**-23
    return tl.minimum(tl.maximum(b_trial, b_sum), b_high), b_high
