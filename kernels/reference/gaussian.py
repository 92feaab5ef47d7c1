"""The Gaussian page rule of EntmaxKV (arXiv 2605.21649).

The scores of a page are modelled as normal: their mean is q.mean, their variance
sum_d q_d^2 std_d^2 (covariances between channels are left out). The threshold tau expected of a
whole context is the root of n E[max(Y - tau, 0) ** b] = 1, with Y the modelled scores in
threshold units, (alpha - 1) * score. A page is read when a high quantile of its largest modelled
score reaches that threshold, less a margin.

Everything past the dot products is computed in fp64 and, where tails matter, in logarithms: the
support of a long context lies 4 to 5 standard deviations out, where differences of normal
moments cancel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..selectors import Gaussian
from .candidates import Candidates
from .entmax import exponent

_MIN_DEVIATION = 1e-6
_MAX_ITERATIONS = 100
_TOLERANCE = 1e-12
_LOG_SQRT_TAU = 0.5 * math.log(2 * math.pi)

# Nodes of the trapezoidal rule, in units of the peak's width. The left tail of the integrand
# falls off exponentially, the right one faster than a normal density.
_QUADRATURE_STEP = 0.4
_QUADRATURE_NODES = range(-80, 21)


def log_partial_moment(t: Tensor, order: float) -> Tensor:
    """log E[max(t + X, 0) ** order] for X standard normal, elementwise; order >= 0, t fp64.

    E[max(Y, 0) ** order] of Y ~ N(m, s^2) is s ** order times this moment at t = m / s. Orders 0
    to 3 have a closed form A Phi(t) + B phi(t); any other order is integrated numerically.
    """
    if order == 0:
        return torch.special.log_ndtr(t)
    if order not in (1, 2, 3):
        return _integrate_partial_moment(t, order)
    # Below zero A Phi + B phi cancels less when phi is factored out: Phi / phi is Mills' ratio.
    tail, bulk = t.clamp(max=0), t.clamp(min=0)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(-tail / math.sqrt(2))
    a, b = _moment_polynomials(tail, int(order))
    in_tail = (a * mills + b).clamp_min(torch.finfo(t.dtype).tiny).log() - tail.square() / 2
    a, b = _moment_polynomials(bulk, int(order))
    density = torch.exp(-bulk.square() / 2 - _LOG_SQRT_TAU)
    in_bulk = (a * torch.special.ndtr(bulk) + b * density).log()
    return torch.where(t < 0, in_tail - _LOG_SQRT_TAU, in_bulk)


def _moment_polynomials(t: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """A and B of the closed form, by the recursion I_r = t I_{r-1} + (r - 1) I_{r-2}."""
    previous = torch.ones_like(t), torch.zeros_like(t)
    current = t, torch.ones_like(t)
    for r in range(2, order + 1):
        a, b = (t * c + (r - 1) * p for c, p in zip(current, previous, strict=True))
        previous, current = current, (a, b)
    return current


def _integrate_partial_moment(t: Tensor, order: float) -> Tensor:
    """log of the integral of y ** order phi(y - t) over y > 0, by the trapezoidal rule in log y.

    With y = exp(u) the integrand is smooth and decays at both ends, where that rule converges
    exponentially; the nodes are centred on its peak and spaced by its width. The error is below
    1e-9 for order >= 1, and below 2e-6 for lower orders, which only serve as slopes.
    """
    root = (t.square() + 4 * (order + 1)).sqrt()
    # The peak (t + root) / 2, written without the cancellation of negative t.
    peak = torch.where(t > 0, (t + root) / 2, 2 * (order + 1) / (root - t.clamp(max=0)))
    step = _QUADRATURE_STEP * (peak * root).rsqrt()
    nodes = torch.tensor(_QUADRATURE_NODES, dtype=t.dtype, device=t.device)
    u = nodes * step[..., None]
    y = peak[..., None] * u.exp()
    integrand = (order + 1) * u - (y - t[..., None]).square() / 2
    constant = (order + 1) * peak.log() + step.log() - _LOG_SQRT_TAU
    return integrand.logsumexp(-1) + constant


def expected_threshold(mean: Tensor, deviation: Tensor, count: Tensor, alpha: float) -> Tensor:
    """Threshold tau [...] expected of a mixture of normal scores, for alpha in (1, 2].

    The root of sum_c count_c E[max(Y_c - tau, 0) ** b] = 1 with Y_c ~ N(mean_c, deviation_c^2).

    mean, deviation, count: [..., components], mean and deviation in threshold units, deviation
        above 0; a count of 0 leaves a component out.

    Newton's method on the b-norm, as in `entmax`: from below it rises to the root and never
    passes it. The start is Jensen's lower bound for the best single component,
    mean - count ** (-1 / b).
    """
    b = exponent(alpha)
    mean, deviation, count = mean.double(), deviation.double(), count.double()
    log_count, log_deviation = count.log(), deviation.log()
    tau = (mean - count ** (-1 / b)).amax(-1)
    for _ in range(_MAX_ITERATIONS):
        t = (mean - tau[..., None]) / deviation
        # The logarithms of sum E[Y^b] and of sum E[Y^(b-1)].
        total = (log_count + b * log_deviation + log_partial_moment(t, b)).logsumexp(-1)
        slope = (log_count + (b - 1) * log_deviation + log_partial_moment(t, b - 1)).logsumexp(-1)
        step = (total / b).expm1() * (total * (1 - 1 / b) - slope).exp()
        raised = torch.where(total > _TOLERANCE, tau + step, tau)
        if not (raised > tau).any():
            break
        tau = raised
    return tau


class PageModel(NamedTuple):
    """The normal model of the scores of one context, in units of the attention score.

    mean, deviation: [B, query_heads, P] fp64, of each page, the mean with its ALiBi bias.
    global_mean, global_deviation: [B, query_heads] fp64, of all pages together, without ALiBi.
    """

    mean: Tensor
    deviation: Tensor
    global_mean: Tensor
    global_deviation: Tensor


def model_pages(candidates: Candidates) -> PageModel:
    """The model of the candidates. All of them hold page_size tokens, so the global variance is
    the mean of the page variances plus the variance of the page means."""
    query, ranked, scale = candidates.query, candidates.ranked, candidates.scale
    assert candidates.statistics is not None
    mean, std = candidates.statistics  # each [B, kv_heads, P, head_size]
    page_mean = (query @ mean.mT).flatten(1, 2).double() * scale
    variance = (query.square() @ std.square().mT).flatten(1, 2).double() * scale**2
    hidden = ~ranked[:, None]
    page_mean, variance = page_mean.masked_fill(hidden, 0), variance.masked_fill(hidden, 0)
    count = ranked.sum(-1)[:, None]
    global_mean = page_mean.sum(-1) / count
    centred = (page_mean - global_mean[..., None]).masked_fill(hidden, 0)
    global_variance = (variance + centred.square()).sum(-1) / count
    if candidates.alibi_slopes is not None:
        size = candidates.page_size
        middle = torch.arange(ranked.shape[1], device=ranked.device) * size + (size - 1) / 2
        relative = middle - (candidates.seq_lens[:, None] - 1)  # [B, P]
        page_mean = page_mean + candidates.alibi_slopes.double()[:, None] * relative[:, None]
    return PageModel(
        mean=page_mean,
        deviation=variance.sqrt().clamp_min(_MIN_DEVIATION),
        global_mean=global_mean,
        global_deviation=global_variance.sqrt().clamp_min(_MIN_DEVIATION),
    )


def score_threshold(candidates: Candidates, model: PageModel) -> Tensor:
    """Threshold [B, query_heads] expected of the candidates, in units of the attention score.

    Under ALiBi, where the mean falls with distance, every page is a component of its own;
    without it one normal stands for all pages.
    """
    tokens = candidates.ranked.double() * candidates.page_size  # [B, P]
    if candidates.alibi_slopes is None:
        mean, deviation = model.global_mean[..., None], model.global_deviation[..., None]
        count = tokens.sum(-1)[:, None, None].expand_as(mean)
    else:
        mean, deviation = model.mean, model.deviation
        count = tokens[:, None].expand_as(mean)
    alpha = torch.as_tensor(candidates.alpha, dtype=torch.float64, device=mean.device)
    alpha = alpha.expand(mean.shape[1])
    threshold = torch.empty_like(model.global_mean)
    for value in alpha.unique().tolist():
        heads, factor = alpha == value, value - 1
        threshold[:, heads] = (
            expected_threshold(
                mean[:, heads] * factor, deviation[:, heads] * factor, count[:, heads], value
            )
            / factor
        )
    return threshold


class PageCut(NamedTuple):
    """What decides about each page, in units of the attention score.

    reach: [B, query_heads, P] the quantile of the page's largest modelled score.
    floor: [B, query_heads] the expected threshold less the margin; read where reach > floor.
    """

    reach: Tensor
    floor: Tensor


def cut_pages(
    candidates: Candidates, model: PageModel, threshold: Tensor, selector: Gaussian
) -> PageCut:
    """Compare the candidates with the expected threshold [B, query_heads]."""
    ranked, spread = candidates.ranked, model.global_deviation
    typical = spread
    if selector.shared_spread:
        typical = spread.mean(-1, keepdim=True).expand_as(spread)
    narrow = typical < selector.narrow_spread

    def setting(of_narrow: float, of_wide: float) -> Tensor:
        return torch.where(narrow, spread.new_tensor(of_narrow), spread.new_tensor(of_wide))

    quantile = setting(selector.narrow_quantile, selector.quantile)
    safety = setting(selector.narrow_safety, selector.safety)
    upper = model.mean + selector.excess_deviations * model.deviation
    upper = upper.masked_fill(~ranked[:, None], 0).sum(-1) / ranked.sum(-1)[:, None]
    excess = selector.excess_fraction * (threshold - upper).clamp_min(0)
    margin = torch.maximum(safety * typical * spread, excess)
    # The largest of page_size independent normals stays below its quantile with the page_size-th
    # root of the probability for one.
    z = torch.special.ndtri(quantile ** (1 / candidates.page_size))[..., None]
    return PageCut(reach=model.mean + z * model.deviation, floor=threshold - margin)


def gaussian_pages(candidates: Candidates, selector: Gaussian) -> Tensor:
    """Pages [B, kv_heads, P] bool to read: those that any query head of the group wants."""
    model = model_pages(candidates)
    cut = cut_pages(candidates, model, score_threshold(candidates, model), selector)
    chosen = (cut.reach > cut.floor[..., None]) & candidates.ranked[:, None]
    return chosen.unflatten(1, candidates.query.shape[1:3]).any(2)
