"""Brackets of a threshold, narrowed by masses that are as wrong as rounding makes them."""

import pytest
import torch
import triton
import triton.language as tl

from entmaxkv_kernels.triton.bracket import NARROW, PASSES, ROUNDING, TRIALS, narrow_bracket

from .device import DEVICE


@triton.jit
def narrow_kernel(p_mass, p_low, p_high, exponent, TRIALS: tl.constexpr, ORDER: tl.constexpr):
    o_g, o_j = tl.arange(0, 8), tl.arange(0, TRIALS)
    b_mass = tl.load(p_mass + o_g[:, None] * TRIALS + o_j[None, :])
    b_exponent = tl.zeros([8], tl.float32) + exponent
    b_low, b_high = tl.load(p_low + o_g), tl.load(p_high + o_g)
    b_low, b_high = narrow_bracket(b_mass, b_low, b_high, b_exponent, ORDER)
    tl.store(p_low + o_g, b_low)
    tl.store(p_high + o_g, b_high)


def mass_above(score, count, threshold, b):
    """[G, T] of thresholds [G, T]; there are `count` [N] scores each of `score` [N]."""
    above = score - threshold[..., None]
    return (count * above.clamp_min(0).pow(b) * (above > 0)).sum(-1)


def threshold_of(score, count, b):
    low, high = torch.full((1, 1), -1.0).double(), torch.zeros(1, 1).double()
    for _ in range(200):
        middle = (low + high) / 2
        above = mass_above(score, count, middle, b) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low.item()


SCORES = {
    "all equal": [(0.0, 1 << 20)],
    "half of them low": [(0.0, 1 << 19), (-2.0, 1 << 19)],
    "a step in the bracket": [(0.0, 1 << 19), (-1e-6, 1 << 18), (-0.3, 1 << 18)],
    "one that is high": [(0.0, 1), (-0.999, 1 << 19), (-1.5, 1 << 19)],
    "a few": [(0.0, 3), (-0.01, 7), (-0.2, 40), (-0.5, 1000)],
}


@pytest.mark.parametrize("b", [1, 2, 3, 5, 40], ids="b {}".format)
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_threshold_stays_within_its_bracket_until_that_is_narrow(scores, b):
    score, count = torch.tensor(scores, dtype=torch.float64).T
    tau = threshold_of(score, count, b)
    # Trials whose norms are too small, too large, or either in turn.
    sign = (-1.0) ** torch.arange(TRIALS.value)
    wrong = torch.stack([sign, -sign, sign**2, -(sign**2), *[0 * sign] * 4]).double()
    wrong = (1 + wrong * ROUNDING.value / 2) ** b
    low = torch.full((8,), -1.0, device=DEVICE)
    high = torch.full((8,), -(count.sum().item() ** (-1 / b)), device=DEVICE)
    # A trial that seems to be below may be above by as much as rounding can change its norm.
    slack = 2 * ROUNDING.value * abs(tau)
    for _ in range(PASSES.value):
        step = (high - low) / TRIALS.value
        trial = low[:, None] + step[:, None] * torch.arange(TRIALS.value, device=DEVICE)
        mass = mass_above(score, count, trial.cpu().double(), b) * wrong
        mass = mass.float().to(DEVICE).contiguous()
        narrow_kernel[(1,)](mass, low, high, float(b), TRIALS.value, b if b <= 3 else 0)
        assert (low.cpu().double() <= tau + slack).all()
        assert (high.cpu().double() >= tau - slack).all()
    assert (high - low <= -8 * NARROW.value * high).all()
