"""alpha-entmax along the last dimension.

Scores enter as z = (alpha - 1) * score. For alpha in (1, 2], with b = 1 / (alpha - 1), the
weights are p_i = max(z_i - tau, 0) ** b, where the threshold tau is the unique root of
f(tau) = sum_i max(z_i - tau, 0) ** b = 1 (Peters et al., arXiv 1905.05702). alpha = 1 is softmax:
there z = score and tau stands for log sum exp z.

Since the largest weight lies between 1/n and 1, tau lies in [max z - 1, max z - n ** (1 - alpha)].
"""

import torch
from torch import Tensor

_MAX_ITERATIONS = 100


def score_factor(alpha: float | Tensor) -> float | Tensor:
    """The factor from attention scores to z: alpha - 1, or 1 for softmax."""
    if isinstance(alpha, Tensor):
        return torch.where(alpha == 1, 1.0, alpha - 1)
    return 1.0 if alpha == 1 else alpha - 1


def exponent(alpha: float) -> float:
    """b = 1 / (alpha - 1), rounded to the integer that 4/3, 3/2 and 2 mean to give."""
    b = 1 / (alpha - 1)
    return float(round(b)) if abs(b - round(b)) < 1e-6 * b else b


def entmax(z: Tensor, alpha: float) -> Tensor:
    """alpha-entmax weights of z along the last dimension, summing to one.

    z: [..., n] floating point, (alpha - 1) * score, or the score itself for alpha = 1; -inf
        excludes an entry, and every row needs one finite entry. alpha: in [1, 2].
    """
    return solve_entmax(z.clone(), alpha)[0]


def entmax_threshold(z: Tensor, alpha: float) -> Tensor:
    """Threshold tau [...] of z [..., n]; for alpha = 1, log sum exp z."""
    return solve_entmax(z.clone(), alpha)[1]


def solve_entmax(z: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """Weights [..., n] and tau [...] of z [..., n], which is used as scratch.

    alpha: one number, or a tensor whose shape is a leading part of z's, an alpha for each.
    """
    if isinstance(alpha, Tensor):
        weights, tau = torch.empty_like(z), torch.empty_like(z[..., 0])
        for value in alpha.unique().tolist():
            rows = alpha == value
            weights[rows], tau[rows] = solve_entmax(z[rows], value)
        return weights, tau
    maximum = z.amax(-1)
    if alpha == 1:
        weights = z.softmax(-1)
        return weights, maximum - weights.amax(-1).log()
    weights, tau = _solve_newton(z.sub_(maximum[..., None]), alpha)
    return weights, tau + maximum


def _solve_newton(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Weights [..., n] and tau [...] of z [..., n] whose maxima are 0.

    Newton's method on G(tau) = ||max(z - tau, 0)||_b - 1, which is convex, decreasing and nearly
    linear: from max z - 1 every step goes up and none passes the root, so each iterate is a
    lower bound of tau. With S_k = sum max(z - tau, 0) ** k the step is
    (S_b - S_b ** (1 - 1/b)) / S_{b-1}. The division by S_b at the end takes out what rounding
    of tau leaves in the sum.
    """
    b = exponent(alpha)
    tolerance = 4 * torch.finfo(z.dtype).eps
    tau = torch.full_like(z[..., :1], -1)
    excess, weights = torch.empty_like(z), torch.empty_like(z)
    for _ in range(_MAX_ITERATIONS):
        torch.sub(z, tau, out=excess).clamp_(min=0)
        if b == 1:
            slope = (excess > 0).sum(-1, keepdim=True)
            weights.copy_(excess)
        elif b == 2:
            slope = excess.sum(-1, keepdim=True)
            torch.mul(excess, excess, out=weights)
        else:
            lower = excess.square() if b == 3 else excess.pow(b - 1)
            slope = lower.sum(-1, keepdim=True)
            torch.mul(lower, excess, out=weights)
        total = weights.sum(-1, keepdim=True)
        step = (total - total ** (1 - 1 / b)) / slope
        raised = torch.where(total > 1 + tolerance, tau + step, tau)
        if not (raised > tau).any():
            break
        tau = raised
    return weights.div_(total), tau.squeeze(-1)


def entmax_threshold_sort(z: Tensor, alpha: float) -> Tensor:
    """Closed-form tau [...] of z [..., n] by sorting, for alpha 1.5 and 2: an oracle for tests.

    With the k largest entries in the support, tau_k solves a linear (alpha 2) or quadratic
    (alpha 1.5) equation; the support is the largest k with tau_k <= z_(k)
    (Martins and Astudillo, arXiv 1602.02068; Peters et al., arXiv 1905.05702).
    """
    if alpha not in (1.5, 2):
        raise ValueError(f"alpha is {alpha}; expected 1.5 or 2, which have a closed form")
    maximum = z.amax(-1, keepdim=True)
    # Entries more than 1 below the maximum are never in the support: -2 stands for all of them.
    ordered = (z - maximum).clamp_min(-2).sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = ordered.cumsum(-1) / count
    if alpha == 2:
        tau = mean - 1 / count
    else:
        spread = ordered.square().cumsum(-1) - count * mean.square()
        tau = mean - ((1 - spread) / count).clamp_min(0).sqrt()
    support = (tau <= ordered).sum(-1, keepdim=True)
    return (tau.gather(-1, support - 1) + maximum).squeeze(-1)


def entmax_threshold_bisect(z: Tensor, alpha: float) -> Tensor:
    """tau [...] of z [..., n] by bisection, for any alpha in (1, 2]: an oracle for tests."""
    b = exponent(alpha)
    maximum = z.amax(-1, keepdim=True)
    z = z - maximum
    low = torch.full_like(maximum, -1)
    high = torch.full_like(maximum, -(z.shape[-1] ** (-1 / b)))
    for _ in range(_MAX_ITERATIONS):
        middle = (low + high) / 2
        above = (z - middle).clamp_min(0).pow(b).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return ((low + high) / 2 + maximum).squeeze(-1)
