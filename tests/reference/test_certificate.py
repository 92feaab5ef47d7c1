"""What a sparse step says of what it left out, against what it left out."""

import pytest
import torch

from entmaxkv_kernels import Exact, Gaussian, TopK, analyze_decode
from entmaxkv_kernels.pages import BOX
from entmaxkv_kernels.reference.certificate import dropped_mass_bound
from entmaxkv_kernels.reference.entmax import entmax, entmax_threshold

from .scene import make_scene
from .test_decode import analyze

ALPHAS = pytest.mark.parametrize("alpha", [1.0, 1.2, 4 / 3, 1.5, 2.0], ids="alpha {:.3g}".format)


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
            assert (report.dropped_bound <= 1).all()
            certified = report.dropped_bound == 0
            assert (report.support_recall[certified] == 1).all()
            assert (report.dropped_mass[certified] == 0).all()


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
    scene = make_scene([500], statistics=BOX, coherence=0.95, spread=4)
    alphas = [1.0, 1.5, 2.0, 1.3]
    together = analyze(scene, TopK(64), alpha=alphas).dropped_bound[0]
    for head, alpha in enumerate(alphas):
        alone = analyze(scene, TopK(64), alpha=alpha)
        if torch.equal(alone.selected, analyze(scene, TopK(64), alpha=alphas).selected):
            assert together[head].item() == pytest.approx(alone.dropped_bound[0, head].item())


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
