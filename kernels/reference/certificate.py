"""What a sparse step can say of itself without reading the pages that it left out.

Where no unread page can hold a score above tau of what was read, that is tau of all: the output
is the exact one (uniqueness of the threshold). Otherwise each token of such a page is given the
largest score that its page can hold. tau of all lies at least as high as that of what was read, so
what these scores weigh above the latter is at least what the tokens have in exact attention:
`certificate`, which a step computes. `dropped_mass_bound` solves for the threshold once more: with
scores at least as large as the true ones it lies at least as high as tau of all, so that what was
read has at most its exact weight, and the rest is a closer bound.
"""

import torch
from torch import Tensor

from ..report import BOUND_LIMITS
from .entmax import exponent

_ITERATIONS = 20

LEAST_BOUND = 2.0**-100
"""Of what may hold any weight: more than weights of 2 ** 21 tokens that all became zero in fp32."""

THRESHOLD_ROUNDING = 64
"""Units of the last place by which a solved threshold may be too high."""


def certificate(tau: Tensor, bounds: Tensor, page_size: int, alpha: float | Tensor) -> Tensor:
    """Upper bound [rows, group] of the exact weight on unread tokens, within [0, 1]; 0 says that
    the output is exact. Arguments as in `dropped_mass_bound`."""
    if isinstance(alpha, Tensor):
        result = torch.empty_like(tau)
        for value in alpha.unique().tolist():
            heads = alpha == value
            own = [x[heads][:, None] for x in (tau, bounds)]
            result[heads] = certificate(own[0], own[1], page_size, value)[:, 0]
        return result
    reach = _reach(bounds, tau)
    if alpha == 1:
        return _at_least_tiny(_softmax_mass(reach, page_size), reach != -torch.inf, tau.dtype)
    mass = page_size * (reach.clamp_min(0) ** exponent(alpha)).sum(-1)
    return _at_least_tiny(mass.nan_to_num(1.0, 1.0).clamp_max(1), ~(reach <= 0), tau.dtype)


def _reach(bounds: Tensor, tau: Tensor) -> Tensor:
    """How far bounds [rows, group, P] lie above tau [rows, group], which is rounded, at most."""
    # Far above tau, differences in fp32 would be coarser than the weights that they stand for.
    slack = THRESHOLD_ROUNDING * torch.finfo(tau.dtype).eps * (1 + tau.double().abs())
    return bounds.double() - (tau.double() - slack)[..., None]


def _softmax_mass(reach: Tensor, page_size: int) -> Tensor:
    mass = page_size * reach.exp().sum(-1)
    return torch.where(mass < torch.inf, mass / (1 + mass), 1.0)


def _at_least_tiny(mass: Tensor, possible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mass, 0 only where no page [..., P] can hold any, whatever rounding leaves of a sum."""
    mass = mass.to(dtype).clamp_min(LEAST_BOUND)
    return torch.where(possible.any(-1), mass, 0)


def round_up(x: Tensor) -> Tensor:
    """x in fp32, not below what it is."""
    rounded = x.float()
    return torch.where(rounded < x, rounded.nextafter(torch.full_like(rounded, 2)), rounded)


def count_by_size(certificate: Tensor) -> Tensor:
    """How many there are of each size, in the order of the counters from CERTIFIED on."""
    limits = certificate.new_tensor((0.0, *BOUND_LIMITS))
    size = torch.bucketize(certificate.flatten(), limits) + (certificate.flatten() >= 1)
    return size.bincount(minlength=len(limits) + 2)


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
    reach = _reach(bounds, tau)
    if alpha == 1:
        return _at_least_tiny(_softmax_mass(reach, page_size), reach != -torch.inf, tau.dtype)
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
    mass = (page_size * _moments(unread, raised, b)[0]).clamp_max(1)
    # A bound that is no number allows anything.
    return _at_least_tiny(mass, ~(reach <= 0), tau.dtype)


def _moments(x: Tensor, raised: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """Sums over max(x - raised, 0) to the powers b and b - 1; x is not above 0 where it counts
    nowhere."""
    rest = (x - raised[..., None]).clamp_min(0)
    lower = torch.where(rest > 0, rest ** (b - 1), 0)
    return (lower * rest).sum(-1), lower.sum(-1)
