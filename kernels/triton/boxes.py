"""Boxes of 8-bit numbers around the keys of a page, bit for bit those of the reference."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..reference.boxes import (
    LARGEST,
    MOST_STEPS,
    RADIUS_WIDENED,
    SMALLEST,
    SQUARE_STEPS,
    WIDENED,
)

KEY_MAX = tl.constexpr(LARGEST)
KEY_MIN = tl.constexpr(SMALLEST)
WIDER = tl.constexpr(WIDENED)
STEPS = tl.constexpr(SQUARE_STEPS)
STEPS_MAX = tl.constexpr(MOST_STEPS)
WIDENED_RADIUS = tl.constexpr(RADIUS_WIDENED)
RADIUS_UNIT = tl.constexpr(RADIUS_WIDENED * SQUARE_STEPS**-0.5)


@triton.jit
def scale_of(b_x):
    """What all of b_x is to be divided by; see `reference/boxes.py`."""
    least = tl.max(tl.abs(b_x), 0) * (1 / 127)
    return ((least.to(tl.int32, bitcast=True) + 0x100) & -0x80).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(b_exponent):
    """The power of two of an exponent as fp32 holds it."""
    return (b_exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def mean_of(b_key, count, b_largest):
    """Means of `count` keys, the others of b_key [P, DP] being 0; see `reference/boxes.py`."""
    b_largest = tl.minimum(tl.maximum(b_largest, KEY_MIN), KEY_MAX)
    b_exponent = b_largest.to(tl.int32, bitcast=True) >> 23
    b_more, b_less = power_of_two(269 - b_exponent), power_of_two(b_exponent - 15)
    b_whole = tl.floor(b_key * b_more[None, :] + 0.5)
    return tl.sum(b_whole, 0) * tl.div_rn(1.0, count) * b_less


@triton.jit
def rounded_mean(b_key, count, b_largest):
    """The mean as 8-bit whole numbers [DP], and what they are multiplied by."""
    b_mean = mean_of(b_key, count, b_largest)
    scale = scale_of(b_mean)
    return tl.floor(tl.div_rn(b_mean, scale) + 0.5), scale


@triton.jit
def box_around(b_key, m_key, count):
    """Centers and half-widths [DP] of a box around the means of the `count` keys of b_key [P, DP]
    that m_key [P, 1] names, which holds them, their scales and the radius; bit for bit those of the
    reference."""
    b_given, m_given = b_key, m_key
    m_key &= b_key == b_key
    b_key = tl.minimum(tl.maximum(b_key, -KEY_MAX), KEY_MAX)
    b_low = tl.min(tl.where(m_key, b_key, float("inf")), 0)
    b_high = tl.max(tl.where(m_key, b_key, -float("inf")), 0)
    b_largest = tl.maximum(tl.abs(b_low), tl.abs(b_high))
    b_center, center_scale = rounded_mean(tl.where(m_key, b_key, 0.0), count, b_largest)
    b_middle = b_center * center_scale
    b_reach = tl.maximum(tl.maximum(b_high - b_middle, b_middle - b_low), 0.0) * WIDER
    half_scale = scale_of(b_reach)
    b_half = tl.ceil(tl.div_rn(b_reach, half_scale))
    b_half = tl.maximum(b_half, (b_reach > 0.0).to(tl.float32))
    radius = radius_of(b_given, m_given, b_middle, b_half * half_scale)
    return b_center, b_half, center_scale, half_scale, radius


@triton.jit
def radius_of(b_key, m_key, b_center, b_half):
    """How far the keys of b_key [P, DP] that m_key [P, 1] names lie off the center at most, in
    half-widths; see `reference/boxes.py`."""
    b_narrow = tl.div_rn(1.0, tl.where(b_half > 0.0, b_half, 1.0))
    b_away = (b_key - b_center[None, :]) * b_narrow[None, :]
    b_square = b_away * b_away * STEPS
    # The device's ceil takes the smallest numbers for 0.
    b_steps = tl.where(b_square > 0.0, tl.maximum(tl.ceil(b_square), 1.0), b_square)
    b_steps = tl.sum(b_steps, 1, keep_dims=True)  # [P, 1]
    b_steps = tl.where(b_steps <= STEPS_MAX, b_steps, float("inf"))
    furthest = tl.max(tl.where(m_key, b_steps, 0.0))
    return tl.sqrt_rn(furthest) * RADIUS_UNIT
