"""What a sparse step says of what it left out, against what it left out."""

import itertools

import pytest
import torch

from entmaxkv_kernels import Counter, Exact, Gaussian, TopK, analyze_decode
from entmaxkv_kernels.pages import BOX
from entmaxkv_kernels.reference.certificate import certificate, dropped_mass_bound, round_up
from entmaxkv_kernels.reference.entmax import entmax, entmax_threshold

from .scene import make_scene
from .test_decode import analyze

ALPHAS = pytest.mark.parametrize("alpha", [1.0, 1.2, 4 / 3, 1.5, 2.0], ids="alpha {:.3g}".format)


def certify(scene, selector, **options):
    """Certificate [B, query_heads] of a step, and the counters."""
    found = torch.full((len(scene.seq_lens), scene.query[0].shape[1]), torch.nan)
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    scene.decode(selector=selector, certificate=found, counters=counters, **options)
    return found, counters


@ALPHAS
@pytest.mark.parametrize("coherence", [0.0, 0.9, 0.999], ids="coherence {}".format)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
def test_no_step_drops_more_than_its_bound(alpha, coherence, dtype, alibi):
    slopes = torch.tensor([0.5, 0.0, -0.01, 0.02]) if alibi else None
    for seed in range(6):
        scene = make_scene(
            [700, 33, 210], statistics=BOX, coherence=coherence, spread=4, dtype=dtype, seed=seed
        )
        for budget in (0, 16, 96, 320):
            report = analyze(scene, TopK(budget), alpha=alpha, alibi_slopes=slopes)
            rounding = 1e-5 if dtype == torch.float32 else 1e-12
            assert (report.dropped_bound >= report.dropped_mass - rounding).all()
            assert (report.dropped_mass <= 1).all() and (report.dropped_bound <= 1).all()
            certified = report.dropped_bound == 0
            assert (report.support_recall[certified] == 1).all()
            assert (report.dropped_mass[certified] == 0).all()
            found, _ = certify(scene, TopK(budget), alpha=alpha, alibi_slopes=slopes)
            assert torch.equal(found == 0, certified)
            assert (found >= report.dropped_bound * (1 - 1e-5)).all() and (found <= 1).all()


def test_pages_that_differ_are_certified_though_most_are_unread():
    scene = make_scene([4000], statistics=BOX, coherence=0.999, spread=8, kv_heads=2)
    report = analyze(scene, TopK(160))
    assert report.selected.double().mean() < 0.05
    assert (report.dropped_bound == 0).all()


def test_iid_keys_certify_nothing_and_the_bound_says_so():
    scene = make_scene([4000], statistics=BOX, spread=2)
    report = analyze(scene, TopK(160))
    assert (report.dropped_mass > 0.1).all()
    assert (report.dropped_bound > report.dropped_mass).all()


def test_each_head_has_the_bound_of_its_own_alpha():
    generator = torch.Generator().manual_seed(4)
    values = [1.0, 1.3, 1.5, 2.0]
    alpha = torch.tensor([values, values[::-1]], dtype=torch.float64)
    read = torch.randn(2, 4, 30, generator=generator, dtype=torch.float64)
    pairs = [*zip(read.flatten(0, 1), alpha.flatten().tolist(), strict=True)]
    weights = torch.stack([entmax(z, a) for z, a in pairs]).view_as(read)
    tau = torch.stack([entmax_threshold(z, a) for z, a in pairs]).view(2, 4)
    bounds = tau[..., None] + torch.tensor([0.02, -0.5, 0.05])
    found = dropped_mass_bound(weights, tau, bounds, 16, alpha)
    for row, head in itertools.product(range(2), range(4)):
        own = (x[row : row + 1, head : head + 1] for x in (weights, tau, bounds))
        alone = dropped_mass_bound(*own, 16, float(alpha[row, head]))
        assert found[row, head] == alone
        assert 0 < alone < 1
    assert len({round(x, 3) for x in found[0].tolist()}) == 4


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0], ids="alpha {}".format)
@pytest.mark.parametrize("above", [1e-9, 1e-7, 1e-5], ids="{} above tau".format)
def test_what_rounding_hides_is_not_called_exact(alpha, above):
    read = 3 * torch.randn(200, 1, 50, generator=torch.Generator().manual_seed(2))
    tau = entmax_threshold(read, alpha)
    bounds = (tau.double() + above)[..., None]
    found = dropped_mass_bound(entmax(read, alpha), tau, bounds, 16, alpha)
    assert (found > 0).all()


def test_a_step_that_reads_all_is_certified_and_means_bound_nothing():
    scene = make_scene([300, 5], statistics=BOX)
    assert (analyze(scene, Exact()).dropped_bound == 0).all()
    assert (analyze(scene, TopK(16), exact_below=300).dropped_bound == 0).all()
    assert (analyze(scene, TopK(16), sliding_window=40).dropped_bound == 0).all()
    scene = make_scene([300, 5], statistics=("mean", "std"))
    assert analyze(scene, Gaussian()).dropped_bound is None


@ALPHAS
def test_the_bound_is_what_is_dropped_where_pages_hold_what_bounds_say(alpha):
    """Pages of equal scores that their bounds give exactly: then nothing is lost by bounding."""
    generator = torch.Generator().manual_seed(1)
    read = torch.randn(3, 2, 40, generator=generator, dtype=torch.float64)
    bounds = read.amax(-1, keepdim=True) + torch.tensor([-0.6, -0.1, -3.0, 0.2])
    scores = torch.cat((read, bounds.repeat_interleave(16, -1)), -1)
    dropped = entmax(scores, alpha)[..., 40:].sum(-1)
    found = dropped_mass_bound(
        entmax(read, alpha), entmax_threshold(read, alpha), bounds, 16, alpha
    )
    torch.testing.assert_close(found, dropped, rtol=1e-9, atol=1e-12)


def test_the_report_of_an_empty_batch_has_bounds():
    scene = make_scene([40], statistics=BOX)
    context = scene.last_queries[:0], scene.cache, scene.block_table[:0], scene.seq_lens[:0]
    report = analyze_decode(*context, scale=scene.scale, alpha=1.5, selector=TopK(16))
    assert report.dropped_bound.shape == (0, 4)


def test_a_step_counts_its_heads_by_their_certificates():
    scene = make_scene([0, 700, 33, 210], statistics=BOX, coherence=0.999, spread=1.5)
    found, counters = certify(scene, TopK(32))
    assert (found[0] == 0).all()
    edges = [-1.0, 0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1 - 1e-9, 1.0]
    counts = [
        ((found[1:].double() > low) & (found[1:].double() <= high)).sum().item()
        for low, high in itertools.pairwise(edges)
    ]
    assert counters[Counter.CERTIFIED :].tolist() == counts
    assert counts[0] and counts[-1] and sum(counts) == 3 * 4
    _, without = certify(scene, TopK(32), exact_below=700)
    assert without[Counter.CERTIFIED :].tolist() == [12, 0, 0, 0, 0, 0, 0]


def test_what_no_selector_bounds_is_certified_where_it_was_read():
    scene = make_scene([300, 5], statistics=("mean", "std"), coherence=0.9, spread=5)
    assert certify(scene, Gaussian())[0].tolist() == [[1.0] * 4, [0.0] * 4]
    assert (certify(scene, Exact())[0] == 0).all()
    assert (certify(scene, Gaussian(), sliding_window=40)[0] == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha {}".format)
def test_a_certificate_is_what_unread_tokens_weigh_above_the_threshold(alpha):
    tau = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    above = torch.tensor([[[0.01, -0.4, 0.02], [-1.0, -0.2, 0.05]]], dtype=torch.float64)
    found = certificate(tau, tau[..., None] + above, 16, alpha)
    if alpha == 1:
        mass = 16 * above.exp().sum(-1)
        expected = mass / (1 + mass)
    else:
        expected = 16 * (above.clamp_min(0) ** (1 / (alpha - 1))).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("bound", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.25, 2.0], ids="alpha {}".format)
def test_a_bound_that_is_no_number_proves_nothing(alpha, bound):
    bounds = torch.tensor([[[-5.0, bound], [-5.0, -9.0]]])
    found = certificate(torch.zeros(1, 2), bounds, 16, alpha)
    assert found[0, 0] == 1 and found[0, 1] < 1


def test_certificates_are_rounded_up():
    exact = torch.tensor([0.0, 1e-300, 0.1, 1 / 3, 0.5, 1.0], dtype=torch.float64)
    rounded = round_up(exact)
    assert rounded.dtype == torch.float32
    assert (rounded.double() >= exact).all() and (rounded.double() <= exact + 3e-8).all()
    assert rounded[1] > 0 and rounded[0] == 0
