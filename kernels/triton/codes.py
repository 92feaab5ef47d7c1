"""Two bits of every channel of every key: how pages get them, bit for bit as in the reference, and
the scores that they give; `reference/codes.py` says what they are.

Channels 4 j + c of a fourth c stand in a tensor of their own, because one byte holds four channels.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..reference.codes import (
    ERROR_STEPS,
    MOST_UNITS,
    SHORTENED,
    SPREADS,
    STEP_OF_MEAN,
    block_size,
    slack,
    span,
)
from .boxes import KEY_MAX, KEY_MIN, WIDENED_RADIUS, power_of_two, rounded_mean
from .pages import INTERPRETED

UNITS = tl.constexpr(MOST_UNITS)
MEAN_STEP = tl.constexpr(STEP_OF_MEAN)
ERRORS = tl.constexpr(ERROR_STEPS)
ERROR_UNIT = tl.constexpr(ERROR_STEPS**-0.5)
SHORTER = tl.constexpr(SHORTENED)
SPREAD_UNITS = tl.constexpr(MOST_UNITS / SPREADS)
# Tokens of a page that are scored together.
TOKENS = tl.constexpr(16)

block_size = triton.constexpr_function(block_size)
span = triton.constexpr_function(span)
slack = triton.constexpr_function(slack)


@triton.jit
def signs_of_fourth(D: tl.constexpr, QP: tl.constexpr):
    """The rotation of one fourth, [QP, QP] fp32, symmetric."""
    FOURTH: tl.constexpr = block_size(D) // 4
    o_q = tl.arange(0, QP)
    b_common = o_q[:, None] & o_q[None, :] & (FOURTH - 1)
    b_common ^= b_common >> 4
    b_common ^= b_common >> 2
    b_common ^= b_common >> 1
    b_sign = (1 - 2 * (b_common & 1)).to(tl.float32)
    return tl.where((o_q // FOURTH)[:, None] == (o_q // FOURTH)[None, :], b_sign, 0.0)


@triton.jit
def rotate_fourths(b_0, b_1, b_2, b_3):
    """Fourths that were rotated by themselves rotated with each other."""
    b_sum, b_difference = b_0 + b_1, b_0 - b_1
    b_other_sum, b_other_difference = b_2 + b_3, b_2 - b_3
    return (
        b_sum + b_other_sum,
        b_difference + b_other_difference,
        b_sum - b_other_sum,
        b_difference - b_other_difference,
    )


@triton.jit
def whole_units(b_largest):
    """What vectors of no channel larger than b_largest are multiplied by to become whole numbers of
    16 bits, and its reciprocal: powers of two."""
    b_exponent = tl.maximum(b_largest, KEY_MIN).to(tl.int32, bitcast=True) >> 23
    return power_of_two(268 - b_exponent), power_of_two(b_exponent - 14)


@triton.jit
def code_keys(p_codes, b_key, m_row, count, D: tl.constexpr):
    """Writes levels and units of the `count` keys of b_key [P, DP] that m_row [P, 1] names to
    p_codes, and returns the center [DP], its scale, that of the units and the radius."""
    P: tl.constexpr = b_key.shape[0]
    QP: tl.constexpr = b_key.shape[1] // 4
    m_finite = (tl.abs(b_key) <= KEY_MAX) | ~m_row
    unbounded = tl.max(tl.max((~m_finite).to(tl.int32), 1))
    m_number = m_row & (b_key == b_key)
    b_key = tl.minimum(tl.maximum(tl.where(m_number, b_key, 0.0), -KEY_MAX), KEY_MAX)
    b_center, center_scale = rounded_mean(b_key, count, tl.max(tl.abs(b_key), 0))
    b_rest = tl.where(m_number, b_key - (b_center * center_scale)[None, :], 0.0)
    more, least = whole_units(tl.max(tl.max(tl.abs(b_rest), 1)))
    b_rest = tl.floor(b_rest * more + 0.5)

    b_even, b_odd = tl.split(tl.reshape(b_rest, [P, QP, 2, 2]))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_sign = signs_of_fourth(D, QP)
    b_0, b_1, b_2, b_3 = rotate_fourths(
        tl.dot(b_0, b_sign, input_precision="ieee"),
        tl.dot(b_1, b_sign, input_precision="ieee"),
        tl.dot(b_2, b_sign, input_precision="ieee"),
        tl.dot(b_3, b_sign, input_precision="ieee"),
    )
    m_0, m_1, m_2, m_3, b_unit, unit = find_steps(b_0, b_1, b_2, b_3, D)
    o_r, o_q = tl.arange(0, P), tl.arange(0, QP)
    m_q = (o_q < D // 4)[None, :]
    b_byte = levels(b_0, m_0) | (levels(b_1, m_1) << 2)
    b_byte |= (levels(b_2, m_2) << 4) | (levels(b_3, m_3) << 6)
    tl.store(p_codes + o_r[:, None] * (D // 4) + o_q[None, :], b_byte.to(tl.int8), mask=m_q)
    tl.store(p_codes + P * (D // 4) + o_r, b_unit.to(tl.int8))

    b_step = b_unit * unit
    b_error = squared_errors(b_0, m_0, b_step, m_q) + squared_errors(b_1, m_1, b_step, m_q)
    b_error += squared_errors(b_2, m_2, b_step, m_q) + squared_errors(b_3, m_3, b_step, m_q)
    radius = tl.max(tl.sqrt_rn(b_error) * ERROR_UNIT * b_step)
    radius = (radius + 2.0 ** slack(D) * (UNITS * unit) + D) * WIDENED_RADIUS
    radius = tl.where(unbounded > 0, float("inf"), tl.div_rn(radius, unit * SPREAD_UNITS))
    return b_center, center_scale, unit * least * (span(D) * block_size(D) ** -0.5), radius


@triton.jit
def find_steps(b_0, b_1, b_2, b_3, D: tl.constexpr):
    """Which numbers of four fourths [P, QP] of rotated keys have a large level, the units of each
    key's step [P], and what one is."""
    b_0, b_1, b_2, b_3 = tl.abs(b_0), tl.abs(b_1), tl.abs(b_2), tl.abs(b_3)
    b_largest = tl.maximum(tl.max(tl.maximum(b_0, b_1), 1), tl.max(tl.maximum(b_2, b_3), 1))
    b_exponent = tl.maximum(b_largest, 1.0).to(tl.int32, bitcast=True) >> 23
    b_more = power_of_two(261 - b_exponent)[:, None]
    b_0, b_1 = tl.floor(b_0 * b_more + 0.5), tl.floor(b_1 * b_more + 0.5)
    b_2, b_3 = tl.floor(b_2 * b_more + 0.5), tl.floor(b_3 * b_more + 0.5)
    b_border = (tl.sum(b_0 + b_1, 1) + tl.sum(b_2 + b_3, 1)) * (MEAN_STEP / D)
    b_border = b_border[:, None]
    m_0, m_1, m_2, m_3 = b_0 >= b_border, b_1 >= b_border, b_2 >= b_border, b_3 >= b_border
    b_square = tl.sum(b_0 * b_0 + b_1 * b_1, 1) + tl.sum(b_2 * b_2 + b_3 * b_3, 1)
    b_product = tl.sum(b_0 * magnitudes(m_0) + b_1 * magnitudes(m_1), 1)
    b_product += tl.sum(b_2 * magnitudes(m_2) + b_3 * magnitudes(m_3), 1)
    b_step = tl.div_rn(b_square, tl.maximum(b_product, 0.5)) * power_of_two(b_exponent - 7)
    most = tl.max(b_step)
    inverse = UNITS * tl.div_rn(1.0, tl.where(most > 0.0, most, 1.0))
    b_unit = tl.floor((b_step + most * 0.00390625) * inverse)
    unit = ((most * (1 / UNITS)).to(tl.int32, bitcast=True) & -0x1000).to(tl.float32, bitcast=True)
    unit = tl.where(most > 0.0, unit, 1.0)
    return m_0, m_1, m_2, m_3, tl.minimum(tl.maximum(b_unit, 1.0), UNITS), unit


@triton.jit
def magnitudes(m_large):
    """Of levels, in steps."""
    return tl.where(m_large, 1.5, 0.5)


@triton.jit
def levels(b_turned, m_large):
    """0 to 3 for numbers [P, QP]."""
    b_large = m_large.to(tl.int32)
    return tl.where(b_turned >= 0.0, 2 + b_large, 1 - b_large)


@triton.jit
def squared_errors(b_turned, m_large, b_step, m_q):
    """Sums [P] of the squares of what levels of [P, QP], shortened, are off, in steps and parts of
    ERRORS."""
    b_error = tl.abs(tl.abs(b_turned) - magnitudes(m_large) * SHORTER * b_step[:, None])
    b_error *= tl.div_rn(1.0, b_step)[:, None]
    return tl.sum(tl.where(m_q, tl.ceil(b_error * b_error * ERRORS), 0.0), 1)


@triton.jit
def firsts(b_pair):
    """Those of neighbours [2 * N] that come first, [N]."""
    b_first, _ = tl.split(tl.reshape(b_pair, [b_pair.shape[0] // 2, 2]))
    return b_first


@triton.jit
def first_columns(b_pair):
    """The columns of [N, 2 * GP] that come first in their pair, [N, GP]."""
    b_first, _ = tl.split(tl.reshape(b_pair, [b_pair.shape[0], b_pair.shape[1] // 2, 2]))
    return b_first


@triton.jit
def limbs(b_whole, o_n):
    """Whole numbers [QP, 2 * GP] of 15 bits as sums of 256 times and once a number of 8 bits: the
    former of those in even columns, the latter in odd ones."""
    b_high = tl.floor((b_whole + 128.0) * 0.00390625)
    b_limb = tl.where((o_n % 2 == 0)[None, :], b_high, b_whole - 256.0 * b_high)
    return b_limb.to(tl.int32).to(tl.int8)


@triton.jit
def turn_queries(
    p_query, i_b, i_h, s_query_b, s_query_h, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
    QP: tl.constexpr,
):  # fmt: skip
    """Four fourths of the rotated queries of a group, in limbs, [QP, 2 * GP] int8; 1.5 times their
    sum, what a whole number is, and the norm of the queries, [GP] each."""
    o_q, o_n = tl.arange(0, QP), tl.arange(0, 2 * GP)
    o_g = o_n // 2
    p_q = p_query + i_b.to(tl.int64) * s_query_b + (i_h * G + o_g)[None, :] * s_query_h
    p_q += 4 * o_q[:, None]
    m_q = (o_g < G)[None, :] & (o_q < D // 4)[:, None]
    b_0 = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32)
    b_1 = tl.load(p_q + 1, mask=m_q, other=0.0).to(tl.float32)
    b_2 = tl.load(p_q + 2, mask=m_q, other=0.0).to(tl.float32)
    b_3 = tl.load(p_q + 3, mask=m_q, other=0.0).to(tl.float32)
    b_norm = tl.sqrt(tl.sum(b_0 * b_0 + b_1 * b_1 + b_2 * b_2 + b_3 * b_3, 0))
    b_more, b_least = whole_units(largest_of(b_0, b_1, b_2, b_3))
    b_sign = signs_of_fourth(D, QP)
    b_0, b_1, b_2, b_3 = rotate_fourths(
        tl.dot(b_sign, tl.floor(b_0 * b_more[None, :] + 0.5), input_precision="ieee"),
        tl.dot(b_sign, tl.floor(b_1 * b_more[None, :] + 0.5), input_precision="ieee"),
        tl.dot(b_sign, tl.floor(b_2 * b_more[None, :] + 0.5), input_precision="ieee"),
        tl.dot(b_sign, tl.floor(b_3 * b_more[None, :] + 0.5), input_precision="ieee"),
    )
    b_largest = tl.maximum(largest_of(b_0, b_1, b_2, b_3), 1.0)
    b_exponent = b_largest.to(tl.int32, bitcast=True) >> 23
    b_more, b_less = power_of_two(267 - b_exponent)[None, :], power_of_two(b_exponent - 13)
    b_0, b_1 = tl.floor(b_0 * b_more + 0.5), tl.floor(b_1 * b_more + 0.5)
    b_2, b_3 = tl.floor(b_2 * b_more + 0.5), tl.floor(b_3 * b_more + 0.5)
    b_sum = tl.sum(b_0 + b_1, 0) + tl.sum(b_2 + b_3, 0)
    b_size = b_least * (b_less * block_size(D) ** -0.5)
    return (
        limbs(b_0, o_n),
        limbs(b_1, o_n),
        limbs(b_2, o_n),
        limbs(b_3, o_n),
        firsts(1.5 * b_sum),
        firsts(b_size),
        firsts(b_norm),
    )


@triton.jit
def largest_of(b_0, b_1, b_2, b_3):
    """The largest magnitude in each column."""
    b_even, b_odd = tl.maximum(tl.abs(b_0), tl.abs(b_2)), tl.maximum(tl.abs(b_1), tl.abs(b_3))
    return tl.max(tl.maximum(b_even, b_odd), 0)


@triton.constexpr_function
def taking(c):
    """Instructions that take two bits of each of four bytes."""
    return f"{{ .reg .b32 t; shr.u32 t, $1, {2 * c}; and.b32 $0, t, 0x03030303; }}"


@triton.jit
def take_levels(b_byte, C: tl.constexpr):
    """Levels of fourth C of bytes, 0 to 3."""
    if INTERPRETED:
        return ((b_byte.to(tl.int32) >> 2 * C) & 3).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            taking(C), "=r,r", [b_byte], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.jit
def score_codes(
    p_stat, b_page, i_t, b_0, b_1, b_2, b_3, b_shift, s_page,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Scores of the rounded rests of keys, of T tokens of each page from i_t on, in units of the
    query and of the page, [BP, T, GP]; exact, but for the product with the key's own units.

    p_stat: where pages have their statistics, s_page apart.
    """
    BP: tl.constexpr = b_page.shape[0]
    QP: tl.constexpr = b_0.shape[0]
    GP: tl.constexpr = b_shift.shape[0]
    o_q, o_t = tl.arange(0, QP), tl.arange(0, T)
    # Neighbours in memory, as which they are loaded ahead.
    p_codes = p_stat + b_page.to(tl.int64) * s_page + D  # [BP]
    b_unit = tl.load(p_codes[:, None] + (P * (D // 4) + i_t) + o_t[None, :])  # [BP, T]
    # Of pages, not of their addresses, whose alignment the compiler would not know.
    b_page = tl.reshape(tl.broadcast_to(b_page[:, None], [BP, T]), [BP * T])
    o_t = i_t + tl.arange(0, BP * T) % T
    p_byte = (p_stat + b_page.to(tl.int64) * s_page + D)[:, None] + (o_t * (D // 4))[:, None]
    p_byte += o_q[None, :]
    if QP * 4 == D:
        b_byte = tl.load(p_byte)
    else:
        b_byte = tl.load(p_byte, mask=(o_q < D // 4)[None, :], other=0)
    b_limbs = tl.dot(take_levels(b_byte, 0), b_0, out_dtype=tl.int32)
    b_limbs = tl.dot(take_levels(b_byte, 1), b_1, b_limbs, out_dtype=tl.int32)
    b_limbs = tl.dot(take_levels(b_byte, 2), b_2, b_limbs, out_dtype=tl.int32)
    b_limbs = tl.dot(take_levels(b_byte, 3), b_3, b_limbs, out_dtype=tl.int32)
    b_high, b_low = tl.split(tl.reshape(b_limbs, [BP * T, GP, 2]))
    # Levels are 1.5 steps below their number.
    b_z = (b_high * 256 + b_low).to(tl.float32) - b_shift[None, :]
    return tl.reshape(b_z, [BP, T, GP]) * b_unit.to(tl.float32)[:, :, None]


@triton.jit
def highest_of_codes(
    p_stat, b_page, o_page, b_0, b_1, b_2, b_3, b_shift, b_unit, b_scale, b_slope, n, s_page,
    D: tl.constexpr, P: tl.constexpr, ALIBI: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """The largest score z of the rounded rests of keys in each page, [BP, GP], ALiBi included, and
    that of the shortened ones; the former is the latter where it is not asked for.

    b_unit: [BP], what the pages' scales say of their units; b_scale: [GP], what makes whole numbers
    of queries scores.
    BOUND: 0 if only the former is wanted, 1 for both, 2 for the latter.
    """
    BP: tl.constexpr = b_page.shape[0]
    GP: tl.constexpr = b_shift.shape[0]
    T: tl.constexpr = min(P, TOKENS)
    b_factor = (b_unit * (1.0 / span(D)))[:, None] * b_scale[None, :]
    if BOUND == 2:
        b_factor *= SHORTER
    b_highest = tl.full([BP, GP], -float("inf"), tl.float32)
    b_shorter = b_highest
    for i_t in tl.static_range(0, P, T):
        b_z = score_codes(p_stat, b_page, i_t, b_0, b_1, b_2, b_3, b_shift, s_page, D, P, T)
        if ALIBI:
            o_key = o_page[:, None] * P + (i_t + tl.arange(0, T))[None, :] - (n - 1)
            b_distance = o_key.to(tl.float32)[:, :, None] * b_slope
            b_z *= b_factor[:, None, :]
            if BOUND == 1:
                b_shorter = tl.maximum(b_shorter, tl.max(b_z * SHORTER + b_distance, 1))
            b_z += b_distance
        b_highest = tl.maximum(b_highest, tl.max(b_z, 1))
    if not ALIBI:
        b_highest *= b_factor
        b_shorter = b_highest * SHORTER
    return b_highest, b_shorter
