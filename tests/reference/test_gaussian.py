"""The Gaussian page rule of EntmaxKV: golden values, limits, and what its knobs do."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entmaxkv_kernels import Gaussian
from entmaxkv_kernels.reference.candidates import Candidates
from entmaxkv_kernels.reference.entmax import exponent
from entmaxkv_kernels.reference.gaussian import (
    cut_pages,
    expected_threshold,
    gaussian_pages,
    log_partial_moment,
    model_pages,
    score_threshold,
)

from .golden import golden_candidates
from .scene import assert_close, make_scene

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Tolerances for golden values: their printed digits, or what float32 input leaves of them."""

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def threshold(mean, deviation, count, alpha, dtype=torch.float64):
    """Expected tau of normal components given in units of the score."""
    mean, deviation, count = (
        torch.tensor(x, dtype=dtype).view(1, -1) for x in (mean, deviation, count)
    )
    tau = expected_threshold((alpha - 1) * mean, (alpha - 1) * deviation, count, alpha)
    assert tau.isfinite().all()
    return tau.item()


@both_dtypes
@pytest.mark.parametrize(
    "alpha, count, deviation, tau",
    [
        (2, 1024, 1, 2.725016),
        (2, 32768, 1, 3.660578),
        (2, 32768, 2, 7.651387),
        (2, 1048576, 1, 4.434715),
        (1.5, 1024, 1, 1.065097),
        (1.5, 32768, 1, 1.566963),
        (1.5, 32768, 2, 3.478920),
        (1.5, 1048576, 1, 1.977127),
        (4 / 3, 1024, 1, 0.490510),
        (4 / 3, 32768, 1, 0.852259),
        (4 / 3, 32768, 2, 2.066979),
        (4 / 3, 1048576, 1, 1.143977),
        (1.5, 131072, 4, 8.20663),
        (1.5, 1048576, 4, 9.05431),
        (1.5, 1048576, 8, 19.17143),
        (1.5, 1048576, 16, 40.37613),
    ],
)
def test_the_expected_threshold_has_its_known_value(alpha, count, deviation, tau, dtype):
    digits = 6 if tau < 8 else 5
    tolerance = max(DTYPES[dtype], 0.51 * 10**-digits)
    assert threshold(0, deviation, count, alpha, dtype) == pytest.approx(tau, abs=tolerance)


@both_dtypes
@pytest.mark.parametrize("alpha, tau", [(2, 2.110936), (1.5, 0.800519), (4 / 3, 0.308145)])
def test_a_mixture_of_pages_has_its_known_threshold(alpha, tau, dtype):
    actual = threshold([0, 1, 2], [1, 0.5, 0.25], [16, 16, 16], alpha, dtype)
    assert actual == pytest.approx(tau, abs=DTYPES[dtype])


@pytest.mark.parametrize("alpha", [1.1, 1.25, 4 / 3, 1.5, 1.7, 2])
def test_a_mixture_of_equal_pages_is_one_normal(alpha):
    whole = threshold(0.7, 1.3, 160, alpha)
    assert threshold([0.7] * 10, [1.3] * 10, [16] * 10, alpha) == pytest.approx(whole, abs=1e-11)
    assert threshold([0.7, 5], [1.3, 2], [160, 0], alpha) == pytest.approx(whole, abs=1e-11)


@pytest.mark.parametrize("alpha", [1.1, 1.25, 4 / 3, 1.5, 1.7, 2])
@pytest.mark.parametrize("count", [16, 1024, 32768])
def test_constant_scores_have_the_threshold_of_equal_scores(alpha, count):
    expected = (alpha - 1) * 3 - count ** (1 - alpha)
    assert threshold(3, 1e-6, count, alpha) == pytest.approx(expected, abs=2e-6)


def test_constant_scores_have_their_known_thresholds():
    for count, tau in [(16, -0.25), (1024, -0.03125), (32768, -0.005524)]:
        assert threshold(0, 1e-7, count, 1.5) == pytest.approx(tau, abs=1e-6)


def test_the_third_moment_has_its_known_value():
    t = torch.tensor(-0.7 / 1.3, dtype=torch.float64)
    assert 1.3**3 * log_partial_moment(t, 3).exp().item() == pytest.approx(0.587576, abs=5e-7)
    t = torch.tensor(-4.0, dtype=torch.float64)
    assert log_partial_moment(t, 3).exp().item() == pytest.approx(1.9e-6, rel=0.03)


@pytest.mark.parametrize("order", [0, 0.25, 1, 4 / 3, 2, 2.5, 3, 4, 10, 99])
@pytest.mark.parametrize("t", [-20, -8, -4, -1, -1e-9, 0, 1e-9, 0.5, 3, 20])
def test_partial_moments_match_the_parabolic_cylinder_function(order, t):
    with mpmath.workdps(40):
        expected = (
            mpmath.log(mpmath.gamma(order + 1) * mpmath.pcfu(order + mpmath.mpf(1) / 2, -t))
            - mpmath.mpf(t) ** 2 / 4
            - mpmath.log(2 * mpmath.pi) / 2
        )
    actual = log_partial_moment(torch.tensor(t, dtype=torch.float64), order)
    assert actual.item() == pytest.approx(float(expected), abs=2e-9 if order >= 1 else 2e-6)


@pytest.mark.parametrize("order", [1, 4 / 3, 2, 3, 7.5])
def test_partial_moments_far_above_zero_are_plain_powers(order):
    t = torch.tensor([1e4, 1e6], dtype=torch.float64)
    assert_close(log_partial_moment(t, order), order * t.log(), 1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    alpha=st.sampled_from([1.02, 1.25, 4 / 3, 1.5, 1.8, 2.0]),
    log_count=st.floats(0, 7),
    log_deviation=st.floats(-6, 3),
    mean=st.floats(-1000, 1000),
)
def test_the_expected_threshold_is_a_root_and_finite_everywhere(
    alpha, log_count, log_deviation, mean
):
    values = torch.tensor([mean, 10**log_deviation, 10**log_count], dtype=torch.float64)
    mean, deviation, count = values[:, None]
    tau = expected_threshold(mean, deviation, count, alpha)
    b, t = exponent(alpha), (mean - tau) / deviation
    log_mass = count.log() + b * deviation.log() + log_partial_moment(t, b)
    # tau can be no better than its last bit, which the exponent and 1 / deviation multiply.
    rounding = b * 1e-15 * (1 + mean.abs()) * (1 + t.abs()) / deviation + 1e-9
    assert log_mass.abs().item() <= rounding.item()


def test_the_pipeline_of_the_paper_takes_its_known_course():
    candidates = golden_candidates()
    model = model_pages(candidates)
    means = [0.4358, 0.7740, 1.6290, 2.8300, 4.1319, 5.2605, 5.9634, 6.0567, 5.4599, 4.2110]
    deviations = [1.0133, 1.0007, 0.9842, 0.9721, 0.9707, 0.9808, 0.9970, 1.0111, 1.0162, 1.0098]
    assert model.mean[0, 0, :10].tolist() == pytest.approx(means, abs=6e-5)
    assert model.deviation[0, 0, :10].tolist() == pytest.approx(deviations, abs=6e-5)
    assert model.global_mean.item() == pytest.approx(3.675217, abs=6e-7)
    assert model.global_deviation.item() == pytest.approx(2.254501, abs=6e-7)

    tau = score_threshold(candidates, model)
    assert tau.item() / 2 == pytest.approx(4.152731, abs=6e-7)
    sparsemax = score_threshold(candidates._replace(alpha=2.0), model)
    assert sparsemax.item() == pytest.approx(9.071899, abs=6e-7)

    cut = cut_pages(candidates, model, tau, Gaussian())
    assert cut.floor.item() / 2 == pytest.approx(3.839045, abs=6e-7)
    reach = [1.9505, 2.0982, 2.4975, 3.0772, 3.7258, 4.3073, 4.6865, 4.7573, 4.4676, 3.8322]
    assert (cut.reach[0, 0, :10] / 2).tolist() == pytest.approx(reach, abs=6e-5)
    for selector in (Gaussian(), Gaussian(shared_spread=True)):
        chosen = gaussian_pages(candidates, selector)
        assert chosen[0, 0].nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_alibi_takes_the_known_page_mixture():
    candidates = golden_candidates(alibi_slopes=torch.tensor([0.05]))
    model = model_pages(candidates)
    means = [-7.1892, -6.051, -4.396, -2.395, -0.2931, 1.6355, 3.1384, 4.0317, 4.2349, 3.786]
    # The slope is a float32, 7e-10 off 0.05 at distances up to 160.
    assert model.mean[0, 0, :10].tolist() == pytest.approx(means, abs=6e-5)
    tau = score_threshold(candidates, model)
    assert tau.item() / 2 == pytest.approx(2.520481, abs=1e-6)
    sparsemax = score_threshold(candidates._replace(alpha=2.0), model)
    assert sparsemax.item() == pytest.approx(5.734255, abs=1e-6)


def test_the_global_mean_is_the_mean_score_of_the_full_pages():
    scene = make_scene([90], kv_heads=1, group=3, statistics=("mean", "std"))
    candidates = candidates_of(scene, alpha=1.5)
    model = model_pages(candidates)
    scores = torch.einsum("hd,nd->hn", scene.query[0][-1], scene.key[0][:80, 0]) * scene.scale
    assert_close(model.global_mean[0], scores.mean(-1), 1e-12)
    within = (model.deviation**2)[0, :, :5].mean(-1)
    between = scores.unflatten(-1, (5, 16)).mean(-1).var(-1, correction=0)
    assert_close(model.global_deviation[0], (within + between).sqrt(), 1e-12)


def candidates_of(scene, alpha, alibi_slopes=None):
    size = scene.page_size
    pages = -(-scene.seq_lens.long() // size)
    ranked = torch.arange(int(pages.max())) < pages[:, None] - 1
    ids = scene.block_table[:, : ranked.shape[1]].long().masked_fill(~ranked, 0)
    return Candidates(
        query=scene.last_queries.unflatten(1, (scene.cache.key.shape[1], -1)),
        statistics=scene.cache.read_statistics(ids, torch.float64).permute(3, 0, 2, 1, 4),
        ranked=ranked,
        seq_lens=scene.seq_lens,
        page_size=size,
        scale=scene.scale,
        alpha=alpha,
        alibi_slopes=alibi_slopes,
        query_dtype=torch.float64,
    )


@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
def test_each_query_head_is_judged_by_its_own_alpha(alibi):
    scene = make_scene([700, 300], kv_heads=2, group=2, statistics=("mean", "std"))
    slopes = torch.tensor([0.02, 0.0, 0.1, 0.005]) if alibi else None
    alphas = [1.25, 1.5, 2.0, 1.5]
    mixed = candidates_of(scene, torch.tensor(alphas, dtype=torch.float64), slopes)
    model = model_pages(mixed)
    tau = score_threshold(mixed, model)
    for head, alpha in enumerate(alphas):
        one = score_threshold(mixed._replace(alpha=alpha), model)
        assert_close(tau[:, head], one[:, head], 1e-12)


@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
def test_a_group_reads_what_any_of_its_heads_wants(alibi):
    scene = make_scene([2000], kv_heads=2, group=4, spread=4, statistics=("mean", "std"))
    slopes = 2.0 ** -torch.arange(1, 9) if alibi else None
    together = candidates_of(scene, 1.5, slopes)
    union = gaussian_pages(together, Gaussian())
    alone = torch.stack(
        [
            gaussian_pages(
                together._replace(
                    query=together.query[:, :, head : head + 1],
                    alibi_slopes=None if slopes is None else slopes.view(2, 4)[:, head],
                ),
                Gaussian(),
            )
            for head in range(4)
        ]
    )
    assert torch.equal(union, alone.any(0))
    assert not torch.equal(union, alone[0])


@pytest.mark.parametrize(
    "knob", ["quantile", "narrow_quantile", "safety", "narrow_safety", "excess_fraction"]
)
def test_a_larger_knob_reads_a_superset_of_pages(knob):
    spread = 0.8 if knob.startswith("narrow") else 4
    statistics = ("mean", "std")
    scene = make_scene([3000], page_size=8, head_size=32, spread=spread, statistics=statistics)
    candidates = candidates_of(scene, 2.0)
    small, large = (0.3, 0.9999) if "quantile" in knob else (0.0, 0.9)
    # The excess margin is off, so that it does not hide the safety margin.
    others = {} if knob == "excess_fraction" else {"excess_fraction": 0.0}
    few = gaussian_pages(candidates, Gaussian(**others | {knob: small}))
    many = gaussian_pages(candidates, Gaussian(**others | {knob: large}))
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_a_full_excess_fraction_lowers_the_threshold_to_the_average_reach():
    candidates = golden_candidates()
    model = model_pages(candidates)
    cut = cut_pages(
        candidates, model, score_threshold(candidates, model), Gaussian(excess_fraction=1.0)
    )
    assert cut.floor.item() == pytest.approx(5.168596, abs=6e-7)


@pytest.mark.parametrize(
    "page_size, narrow, wide",
    [(8, 3.0220, 3.2266), (16, 3.2259, 3.4199), (32, 3.4192, 3.6041), (64, 3.6034, 3.7803)],
)
def test_the_quantiles_of_a_page_maximum_have_their_known_values(page_size, narrow, wide):
    spread = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    model = model_pages(golden_candidates())._replace(
        mean=torch.zeros(1, 2, 11).double(),
        deviation=torch.ones(1, 2, 11).double(),
        global_deviation=spread,
    )
    candidates = golden_candidates()._replace(page_size=page_size)
    cut = cut_pages(candidates, model, torch.zeros(1, 2).double(), Gaussian())
    assert cut.reach[0, :, 0].tolist() == pytest.approx([narrow, wide], abs=6e-5)


def test_the_mean_spread_of_all_heads_may_choose_the_setting_of_each():
    """Of two sequences, one of which is narrow on average although one head is wide."""
    spread = torch.tensor([[0.5, 2.0], [1.0, 8.0]], dtype=torch.float64)
    model = model_pages(golden_candidates())._replace(
        mean=torch.zeros(2, 2, 11).double(),
        deviation=torch.ones(2, 2, 11).double(),
        global_deviation=spread,
    )
    tau = torch.full((2, 2), 3.0).double()
    paper = Gaussian(shared_spread=True, excess_fraction=0.0)
    cut = cut_pages(golden_candidates(), model, tau, paper)
    assert cut.reach[:, :, 0].flatten().tolist() == pytest.approx([3.2259] * 2 + [3.4199] * 2, 1e-5)
    margins = [0.01 * 1.25 * 0.5, 0.01 * 1.25 * 2, 0.05 * 4.5 * 1, 0.05 * 4.5 * 8]
    assert (3 - cut.floor).flatten().tolist() == pytest.approx(margins)
    own = cut_pages(golden_candidates(), model, tau, Gaussian(excess_fraction=0.0))
    assert (3 - own.floor).flatten().tolist() == pytest.approx([0.0025, 0.2, 0.01, 3.2])


def test_a_sequence_is_judged_without_its_neighbours_however_the_spread_is_taken():
    scene = make_scene([700, 300], kv_heads=2, group=2, statistics=("mean", "std"), spread=3)
    both = candidates_of(scene, 1.5)
    alone = both._replace(
        query=both.query[:1],
        statistics=both.statistics[:, :1],
        ranked=both.ranked[:1],
        seq_lens=both.seq_lens[:1],
    )
    for selector in (Gaussian(), Gaussian(shared_spread=True)):
        chosen = gaussian_pages(both, selector)
        assert torch.equal(chosen[:1], gaussian_pages(alone, selector))
        assert 0 < chosen[0].sum() < chosen[0].numel()


def test_pages_of_equal_statistics_are_read_all_or_none():
    scene = make_scene([160], kv_heads=1, group=1, statistics=("mean", "std"))
    scene.cache.statistics[:] = scene.cache.statistics[scene.block_table[0, 0]].clone()
    chosen = gaussian_pages(candidates_of(scene, 1.5), Gaussian())[0, 0, :9]
    assert chosen.all() or not chosen.any()


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"quantile": 1.0}, r"quantile is 1.0; expected between 0 and 1"),
        ({"narrow_quantile": 0.0}, r"narrow_quantile is 0.0; expected between 0 and 1"),
        ({"safety": -0.1}, r"safety is -0.1; expected at least 0"),
        ({"excess_fraction": math.nan}, r"excess_fraction is nan; expected at least 0"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(**knobs)
