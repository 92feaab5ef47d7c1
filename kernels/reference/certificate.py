"""What a sparse step can say of itself without reading the pages that it left out.

Where no unread page can hold a score above tau of what was read, that is tau of all: the output
is the exact one (uniqueness of the threshold). Otherwise each token of such a page is given the
largest score that its page can hold, and the threshold is solved for again. With scores at least as
large as the true ones it lies at least as high, so that what was read has at most its exact weight,
and the rest, which the unread tokens then have, is at least what they have in exact attention.
"""

import torch
from torch import Tensor

from .entmax import exponent

_ITERATIONS = 20

_THRESHOLD_ROUNDING = 8
"""Units of the last place by which a solved threshold may be too high."""


def dropped_mass_bound(
    weights: Tensor, tau: Tensor, bounds: Tensor, page_size: int, alpha: float | Tensor
) -> Tensor:
    """Upper bound [rows, group] of the exact weight on unread tokens, within [0, 1]; 0 says that
    the output is exact.

    weights: [rows, group, n] entmax weights of the tokens that were read.
    tau: [rows, group] their threshold; for alpha = 1 the logarithm of their denominator.
    bounds: [rows, group, P] upper bounds of the scores z in unread pages of page_size tokens; -inf
        for a page that was read.
    alpha: one number, or [rows, group].
    """
    if isinstance(alpha, Tensor):
        result = torch.empty_like(tau)
        for value in alpha.unique().tolist():
            heads = alpha == value
            own = [x[heads][:, None] for x in (weights, tau, bounds)]
            result[heads] = dropped_mass_bound(own[0], own[1], own[2], page_size, value)[:, 0]
        return result
    # Far above tau, differences in fp32 would be coarser than the weights that they stand for.
    reach = bounds.double() - tau.double()[..., None]
    # The threshold was rounded, too.
    slack = _THRESHOLD_ROUNDING * torch.finfo(tau.dtype).eps
    reach = reach + slack * (1 + tau.double().abs())[..., None]
    if alpha == 1:
        mass = page_size * reach.exp().sum(-1)
        return torch.where(mass.isinf(), 1.0, mass / (1 + mass)).to(tau.dtype)
    # Of both, how far they lie above tau.
    read, unread = weights.double() ** (alpha - 1), reach.clamp_min(0)
    raised = torch.zeros_like(tau, dtype=torch.float64)
    b = exponent(alpha)
    # Newton's steps from below stay below the threshold: each iterate gives a bound.
    for _ in range(_ITERATIONS):
        read_total, read_slope = _moments(read, raised, b)
        unread_total, unread_slope = _moments(unread, raised, b)
        total = read_total + page_size * unread_total
        slope = read_slope + page_size * unread_slope
        step = (total - total ** (1 - 1 / b)) / slope
        # Without an unread score above tau, rounding is all that the total lacks of 1.
        raised = raised + torch.where(unread_total > 0, step.clamp_min(0), 0)
    mass = (page_size * _moments(unread, raised, b)[0]).clamp_max(1).to(tau.dtype)
    # Only where nothing unread lies above tau it is 0, whatever rounding leaves of a sum.
    least = torch.finfo(mass.dtype).tiny
    return torch.where((reach > 0).any(-1), mass.clamp_min(least), 0)


def _moments(x: Tensor, raised: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """Sums over max(x - raised, 0) to the powers b and b - 1; x is not above 0 where it counts
    nowhere."""
    rest = (x - raised[..., None]).clamp_min(0)
    lower = torch.where(rest > 0, rest ** (b - 1), 0)
    return (lower * rest).sum(-1), lower.sum(-1)
