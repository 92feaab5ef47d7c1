"""Sums of fp16 over many scores of a tile of prefill, and steps that allow for their rounding.

Where only a bound is wanted, x = max(z - tau, 0) of alpha 1.5 and queries of two bytes are added up
in fp16, two to an instruction. Every other sum is that of `prefill_tiles.moments`.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import newton_step, norm
from .prefill_tiles import UNIT, flag_units, moments

LEAST = tl.constexpr(-3e38)
# Of every x, so that squares of small ones keep their precision.
SCALE = tl.constexpr(8.0)
# Half of the least step of fp16.
HALF_STEP = tl.constexpr(2.0**-25)
# Of a likely step: a tenth of it and what changes the mass by some 4% may be stepped back.
BACK = tl.constexpr(0.1)
BACK_POWER = tl.constexpr(0.02)
# A sum of 16 terms past a margin that none is above is off by at most 2 ** -16 of the margin's
# square: with that of all keys no more than half of the mass that may be left.
MARGIN_SQUARES = tl.constexpr(2.0**19)


@triton.jit
def is_rough(rows, ORDER: tl.constexpr):
    rough: tl.constexpr = ORDER == 2 and rows[0].dtype != tl.float32
    return rough


@triton.jit
def scaled_rows(rows, b_base, b_tau, ORDER: tl.constexpr):
    """What `score` and `rough_moments` take for scores that are SCALE times as high."""
    if is_rough(rows, ORDER):
        b_q, b_scale, b_slope, b_exponent, b_position, position, count, lowest, window = rows
        b_scale, b_slope = b_scale * SCALE, b_slope * SCALE
        rows = b_q, b_scale, b_slope, b_exponent, b_position, position, count, lowest, window
        return rows, b_base * SCALE, b_tau * SCALE
    else:
        return rows, b_base, b_tau


@triton.jit
def rough_moments(rows, b_z, b_tau, ORDER: tl.constexpr):
    """The sums and flags of `moments`, and the largest x of every eighth column, of scores that are
    SCALE times as high where sums are fp16. Sums past its range are inf."""
    BM: tl.constexpr = b_z.shape[0]
    BN: tl.constexpr = b_z.shape[1]
    if is_rough(rows, ORDER):
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_x = tl.reshape(b_x.to(tl.float16), [BM, BN // 8, 8])
        b_weight, b_power = tl.sum(b_x * b_x, 1).to(tl.float32), tl.sum(b_x, 1).to(tl.float32)
        b_flags, b_top = flag_units(b_power, BN // UNIT), tl.max(b_x, 1).to(tl.float32)
    else:
        b_weight, b_power, _, b_flags = moments(rows, b_z, b_tau, None, ORDER)
        b_top = tl.max(tl.reshape(b_z, [BM, BN // 8, 8]), 1) - b_tau[:, None]
    return b_weight, b_power, b_flags, b_top


@triton.jit
def unscaled(rows, b_mass, b_power, ORDER: tl.constexpr):
    """Mass and power of x from those of SCALE times x."""
    if is_rough(rows, ORDER):
        return b_mass * (1.0 / (SCALE * SCALE)), b_power * (1.0 / SCALE)
    else:
        return b_mass, b_power


@triton.jit
def sum_bounds(rows, b_mass, b_power, keys, BN: tl.constexpr, ORDER: tl.constexpr):
    """The least and the largest mass, and power, that `keys` may have whose rough sums these are.

    An x is rounded once, its square not before it is added, and a sum has BN / 8 terms of one sign;
    all round to 11 bits, or where these end to a multiple of twice HALF_STEP.
    """
    if is_rough(rows, ORDER):
        error: tl.constexpr = (BN // 8 + 2) / 2048
        mass, power = keys * (HALF_STEP / (SCALE * SCALE)), keys * (HALF_STEP / SCALE)
        b_least = b_mass * (1.0 - error) - mass, b_power * (1.0 - error) - power
        b_most = b_mass * (1.0 + 2.0 * error) + mass, b_power * (1.0 + 2.0 * error) + power
        return b_least, b_most
    else:
        return (b_mass, b_power), (b_mass, b_power)


@triton.jit
def bound_step(b_least, b_most, b_exponent, ORDER: tl.constexpr):
    """`newton_step` to a lower bound, whatever the sums are between these; none from such as are
    infinite."""
    b_step = newton_step(tl.maximum(b_least[0], 1e-30), b_most[1], 1.0, b_exponent, ORDER)
    return tl.where(b_most[0] < float("inf"), b_step, 0.0)


@triton.jit
def bound_step_down(b_least, b_most, b_exponent, ORDER: tl.constexpr):
    """`guess_step` to a lower bound from where the mass may be less than one, whatever it is."""
    b_length = norm(tl.maximum(b_least[0], 0.0), b_exponent, ORDER)
    b_step = (1.0 - 1.0 / tl.maximum(b_length, 1e-30)) * (b_most[0] / tl.maximum(b_least[1], 1e-30))
    return tl.where((b_length > 1e-30) & (b_least[1] > 1e-30), b_step, LEAST)


@triton.jit
def likely_step(rows, m_row, b_mass, b_power, keys, left_mass, ORDER: tl.constexpr):
    """Step to where the mass is likely to be one, which may be above the threshold, and how far
    below that the threshold is likely to be, at most; zeros where sums are not rough or infinite,
    or those of `keys` past so wide a margin would be off by what matters beside `left_mass`.

    Masses of the scores of attention fall much as the fourth power of the distance to the largest
    one: a Newton step on the mass's fourth root. It is never longer than the margin's 1 / BACK.
    """
    b_step = tl.zeros_like(b_mass)
    if is_rough(rows, ORDER):
        b_inverse = 1.0 / tl.maximum(b_power, 1e-30)
        b_root = tl.sqrt(tl.sqrt(tl.maximum(b_mass, 1.0)))
        b_step = 2.0 * b_mass * b_inverse * (1.0 - 1.0 / b_root)
        b_margin = BACK * b_step + BACK_POWER * b_inverse
        m_step = m_row & (b_margin * b_margin * keys < MARGIN_SQUARES * left_mass)
        return tl.where(m_step, b_step, 0.0), tl.where(m_step, b_margin, 0.0)
    else:
        return b_step, b_step
