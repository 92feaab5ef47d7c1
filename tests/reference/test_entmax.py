"""alpha-entmax itself: golden values, its defining properties, and independent oracles."""

import entmax as published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entmaxkv_kernels.reference.entmax import (
    entmax,
    entmax_threshold,
    entmax_threshold_bisect,
    entmax_threshold_sort,
    exponent,
    solve_entmax,
)

from .scene import assert_close

ALPHAS = [1.01, 1.1, 1.25, 4 / 3, 1.5, 1.8, 1.99, 2.0]
alphas = pytest.mark.parametrize("alpha", ALPHAS, ids=[f"alpha {a:.4g}" for a in ALPHAS])
fast = settings(max_examples=60, deadline=None, derandomize=True)


def tensors(low=1, high=200):
    """Rows of z of odd sizes, spreads from nearly constant to one-hot, with repeated values."""

    def build(arguments):
        size, log_spread, seed, rounded = arguments
        random = torch.Generator().manual_seed(seed)
        z = torch.randn(3, size, generator=random, dtype=torch.float64) * 10**log_spread
        return z.mul(4).round().div(4) if rounded else z

    sizes = st.integers(low, high)
    return st.tuples(sizes, st.floats(-6, 2), st.integers(0, 10**6), st.booleans()).map(build)


@alphas
@pytest.mark.parametrize("size", [1, 2, 16, 1000])
def test_equal_scores_share_the_weight(alpha, size):
    z = torch.full((size,), 7.25, dtype=torch.float64)
    assert_close(
        entmax_threshold(z, alpha), torch.full((), 7.25 - size ** (1 - alpha), dtype=z.dtype), 1e-12
    )
    assert_close(entmax(z, alpha), torch.full_like(z, 1 / size), 1e-14)


@pytest.mark.parametrize(
    "alpha, z, tau",
    [
        (1.5, [0, 0], -0.707107),
        (4 / 3, [0, 0], -0.793701),
        (2, [0, 0], -0.5),
        (2, [0.3, 0], -0.35),
    ],
)
def test_tau_of_two_tokens_has_its_known_value(alpha, z, tau):
    z = torch.tensor(z, dtype=torch.float64)
    assert entmax_threshold(z, alpha).item() == pytest.approx(tau, abs=5e-7)


def test_sparsemax_of_two_tokens_has_its_known_weights():
    z = torch.tensor([0.3, 0], dtype=torch.float64)
    assert_close(entmax(z, 2), torch.tensor([0.65, 0.35], dtype=torch.float64), 1e-15)


@alphas
def test_a_token_exactly_on_the_threshold_has_no_weight(alpha):
    assert entmax(torch.tensor([0.0, -1.0]), alpha).tolist() == [1, 0]


@alphas
@fast
@given(z=tensors())
def test_tau_lies_within_its_bracket(alpha, z):
    tau, maximum = entmax_threshold(z, alpha), z.amax(-1)
    slack = 1e-12 * (1 + maximum.abs())
    assert (tau >= maximum - 1 - slack).all()
    assert (tau <= maximum - z.shape[-1] ** (1 - alpha) + slack).all()


@alphas
@fast
@given(z=tensors())
def test_weights_sum_to_one_and_vanish_exactly_outside_the_support(alpha, z):
    weights, tau = solve_entmax(z.clone(), alpha)
    assert_close(weights.sum(-1), torch.ones(3), 1e-12)
    assert (weights >= 0).all()
    assert (weights[z <= tau[..., None] - 1e-12] == 0).all()


@alphas
@fast
@given(z=tensors(low=2), cut=st.floats(0.01, 0.99))
def test_tau_never_falls_when_keys_are_added(alpha, z, cut):
    part = z[:, : max(1, int(cut * z.shape[-1]))]
    assert (entmax_threshold(part, alpha) <= entmax_threshold(z, alpha) + 1e-12).all()


@alphas
@fast
@given(z=tensors(), shift=st.floats(-100, 100))
def test_a_shift_moves_tau_and_leaves_the_weights(alpha, z, shift):
    weights, tau = solve_entmax(z.clone(), alpha)
    moved, moved_tau = solve_entmax(z + shift, alpha)
    # A rounded shift changes z by up to one part in 2^53; the exponent multiplies that.
    rounding = 1e-13 * (z.abs().max().item() + abs(shift) + 1)
    assert_close(moved_tau, tau + shift, 4 * rounding)
    assert_close(moved, weights, 8 * exponent(alpha) * rounding)


@alphas
@fast
@given(z=tensors())
def test_an_order_of_keys_is_no_matter(alpha, z):
    order = torch.randperm(z.shape[-1], generator=torch.Generator().manual_seed(0))
    assert_close(entmax(z[:, order], alpha), entmax(z, alpha)[:, order], 1e-12)


@alphas
@fast
@given(z=tensors(low=16), seed=st.integers(0, 10**6), size=st.integers(1, 16))
def test_pages_bounded_by_tau_of_the_others_can_be_left_out(alpha, z, seed, size):
    """The theorem of exactness: no score above tau of what is read means nothing was lost."""
    random = torch.Generator().manual_seed(seed)
    for row in z:
        pages = row.split(size)
        seeds = [page for page in pages if torch.rand((), generator=random) < 0.3] or [pages[0]]
        # tau of any subset is a lower bound of tau: pages that do not reach it are not needed.
        bound = entmax_threshold(torch.cat(seeds), alpha)
        read = torch.cat([page for page in pages if page.max() > bound])
        left_out = [page.max() for page in pages if page.max() <= bound]
        tau = entmax_threshold(read, alpha)
        assert all(upper <= tau for upper in left_out)
        assert_close(tau, entmax_threshold(row, alpha), 1e-12)
        mass = entmax(row, alpha)[row <= bound].sum()
        assert mass.item() <= 1e-12


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@fast
@given(z=tensors())
def test_the_solver_finds_the_closed_form(alpha, z):
    assert_close(entmax_threshold(z, alpha), entmax_threshold_sort(z, alpha), 1e-11)


@alphas
@fast
@given(z=tensors())
def test_the_solver_finds_the_root_of_bisection(alpha, z):
    rounding = 1e-14 * (1 + z.abs().max().item())
    assert_close(entmax_threshold(z, alpha), entmax_threshold_bisect(z, alpha), 1e-12 + rounding)


@fast
@given(z=tensors())
def test_the_published_package_agrees(z):
    # The package takes scores, not z = (alpha - 1) * score.
    assert_close(entmax(z, 1.5), published.entmax15(2 * z, dim=-1), 1e-11)
    assert_close(entmax(z, 2), published.sparsemax(z, dim=-1), 1e-11)
    assert_close(entmax(z, 1), z.softmax(-1), 1e-14)
    for alpha in (1.1, 1.25, 4 / 3, 1.8):
        expected = published.entmax_bisect(z / (alpha - 1), alpha, dim=-1, n_iter=100)
        assert_close(entmax(z, alpha), expected, 1e-11)


def test_for_softmax_tau_is_the_log_of_the_denominator():
    z = torch.randn(5, 77, dtype=torch.float64)
    assert_close(entmax_threshold(z, 1), z.logsumexp(-1), 1e-13)


def test_excluded_entries_have_no_weight_and_change_nothing():
    z = torch.randn(4, 50)
    padded = torch.cat((z, torch.full((4, 13), -torch.inf)), -1)
    for alpha in (1, 1.25, 4 / 3, 1.5, 2):
        weights, tau = solve_entmax(padded.clone(), alpha)
        assert_close(weights[:, :50], entmax(z, alpha), 1e-6)
        assert (weights[:, 50:] == 0).all()
        assert_close(tau, entmax_threshold(z, alpha), 1e-6)


def test_each_row_can_have_its_own_alpha():
    z = torch.randn(5, 3, 40, dtype=torch.float64)
    alpha = torch.tensor([1, 1.5, 2, 4 / 3, 1.5], dtype=torch.float64)
    weights, tau = solve_entmax(z.clone(), alpha)
    for row, value in enumerate(alpha.tolist()):
        assert torch.equal(weights[row], entmax(z[row], value))
        assert torch.equal(tau[row], entmax_threshold(z[row], value))


@alphas
@pytest.mark.parametrize("spread", [1e-4, 0.1, 1, 10])
def test_float32_converges_to_rounding_over_long_rows(alpha, spread):
    random = torch.Generator().manual_seed(1)
    z = (alpha - 1) * spread * torch.randn(4, 50_000, generator=random)
    weights, tau = solve_entmax(z.clone(), alpha)
    expected, expected_tau = solve_entmax(z.double(), alpha)
    assert_close(weights.sum(-1), torch.ones(4), 1e-6)
    assert_close(tau, expected_tau, 1e-6 * (1 + z.abs().max().item()))
    # Bisection in float32 is as good as that precision allows; the solver may not be worse.
    straightforward = torch.where(
        z > entmax_threshold_bisect(z, alpha)[:, None],
        (z - entmax_threshold_bisect(z, alpha)[:, None]).clamp_min(0) ** exponent(alpha),
        0,
    )
    allowed = 2 * (straightforward - expected).abs().sum(-1) + 1e-6
    assert ((weights - expected).abs().sum(-1) <= allowed).all()


def test_a_nan_among_the_scores_is_not_hidden():
    z = torch.randn(2, 30)
    z[0, 3] = torch.nan
    weights = entmax(z, 1.5)
    assert weights[0].isnan().any()
    assert not weights[1].isnan().any()


def test_the_closed_form_refuses_other_alphas():
    with pytest.raises(ValueError, match=r"alpha is 1.25; expected 1.5 or 2"):
        entmax_threshold_sort(torch.zeros(3), 1.25)
