"""Device functions of the entmax threshold that the kernels share.

With z = (alpha - 1) * score and b = 1 / (alpha - 1), the weights are max(z - tau, 0) ** b, and the
threshold tau is the root of sum max(z - tau, 0) ** b = 1 (Peters et al., arXiv 1905.05702). The
norm (sum max(z - tau, 0) ** b) ** (1 / b) is convex, decreasing and nearly linear in tau: Newton
steps on it from a lower bound rise to the root and never pass it, and its chords give bounds.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

NEWTON_STEPS = tl.constexpr(40)
# A Newton step squares the excess mass up to a constant, so the step taken from here is exact to
# fp32.
EXCESS_MASS = tl.constexpr(1e-4)
# Scales weights that fp16 values are multiplied by: small ones would lose their precision in fp16.
FP16_WEIGHT = tl.constexpr(1 << 14)


@triton.jit
def head_parameters(p_alpha, factor, exponent, o_head, m_head, ALPHA_PER_HEAD: tl.constexpr):
    """alpha - 1 and b of heads, fp32, shaped as o_head; 1 and 1 for softmax heads."""
    if ALPHA_PER_HEAD:
        b_alpha = tl.load(p_alpha + o_head, mask=m_head, other=2.0)
        b_factor = tl.where(b_alpha == 1.0, 1.0, b_alpha - 1.0)
        b_exponent = 1.0 / b_factor
        nearest = tl.floor(b_exponent + 0.5)
        close = tl.abs(b_exponent - nearest) < 1e-6 * b_exponent
        b_exponent = tl.where(close, nearest, b_exponent)
        return b_factor.to(tl.float32), b_exponent.to(tl.float32)
    else:
        like = tl.where(m_head, 1.0, 1.0)
        return like * factor, like * exponent


@triton.jit
def power(b_x, b_exponent):
    """b_x ** b_exponent for b_x >= 0, with 0 ** 0 = 0."""
    b_log = tl.log2(tl.where(b_x > 0.0, b_x, 1.0))
    return tl.where(b_x > 0.0, tl.exp2(b_exponent * b_log), 0.0)


def order_of(exponent: float) -> int:
    """ORDER of an exponent b that no head has another one of."""
    return int(exponent) if exponent in (1, 2, 3) else 0


@triton.jit
def weights_and_slopes(b_x, b_exponent, ORDER: tl.constexpr):
    """b_x ** b and b_x ** (b - 1) for b_x >= 0, 0 ** 0 being 0. ORDER is b, or 0 for any b."""
    if ORDER == 1:
        return b_x, tl.where(b_x > 0.0, 1.0, 0.0)
    elif ORDER == 2:
        return b_x * b_x, b_x
    elif ORDER == 3:
        return b_x * b_x * b_x, b_x * b_x
    else:
        b_slope = power(b_x, b_exponent - 1.0)
        return b_slope * b_x, b_slope


@triton.jit
def weigh(b_x, b_exponent, ORDER: tl.constexpr):
    """b_x ** b for b_x >= 0."""
    b_weight, _ = weights_and_slopes(b_x, b_exponent, ORDER)
    return b_weight


@triton.jit
def weigh_scores(b_z, b_tau, b_exponent, ORDER: tl.constexpr):
    """Weights of scores; that of a NaN is NaN."""
    b_x = tl.maximum(b_z - b_tau, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_weight = weigh(b_x, b_exponent, ORDER)
    # Products of a NaN are NaN themselves.
    return b_weight if ORDER > 0 else tl.where(b_x == b_x, b_weight, b_x)


@triton.jit
def norm(mass, exponent, ORDER: tl.constexpr):
    """mass ** (1 / b)."""
    if ORDER == 1:
        return mass
    elif ORDER == 2:
        return tl.sqrt(mass)
    else:
        return power(mass, 1.0 / exponent)


@triton.jit
def newton_step(mass, slope, root, exponent, ORDER: tl.constexpr):
    """Step from a lower bound towards sum max(z - tau, 0) ** b = root ** b.

    mass = sum x ** b and slope = sum x ** (b - 1) at the bound.
    """
    length = norm(mass, exponent, ORDER)
    # Quotients of what grows together: products of the sums could leave the range of fp32.
    step = (1.0 - root / length) * (mass / tl.maximum(slope, 1e-30))
    return tl.where(length > root, step, 0.0)


@triton.jit
def longest_step(mass, slope, count):
    """Step for b = 2 from a lower bound to an upper bound: to where the parabola
    mass - 2 * step * slope + step ** 2 * count is one, which the mass is not above.

    count = how many x are not below zero at the bound. The parabola is the mass as long as no x
    becomes negative.
    """
    root = tl.sqrt(tl.maximum(slope * slope - count * (mass - 1.0), 0.0))
    return (mass - 1.0) / tl.maximum(slope + root, 1e-30)


@triton.jit
def sum_moments(b_z, lower, exponent, ORDER: tl.constexpr):
    """sum x ** b and sum x ** (b - 1) with x = max(z - lower, 0), over all elements."""
    return sum_pairs(weights_and_slopes(tl.maximum(b_z - lower, 0.0), exponent, ORDER))


@triton.jit
def sum_pairs(pair):
    """Sums of two tensors [N]; both go through the block's one exchange of partial sums."""
    first, second = pair
    return tl.split(tl.sum(tl.join(first, second), 0))
