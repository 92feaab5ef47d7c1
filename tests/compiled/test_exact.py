"""Exact decode, compiled: as accurate as straightforward PyTorch, whatever its guesses."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from reference.scene import make_scene
from reference.test_precision import assert_no_worse, straightforward_attention

from entmaxkv_kernels import Counter, Exact
from entmaxkv_kernels.triton import workspace
from entmaxkv_kernels.triton.workspace import Shape, decode_workspace_size

from .device import DEVICE, DTYPES, Step

RAGGED = [0, 1, 15, 16, 17, 150]
LAST_BITS = 2e-5
"""An error of fp32 that needs no yardstick; with high scores straightforward PyTorch has more."""

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_accurate(step, out):
    """The error against float64 is no worse than the yardstick's, except for fp32's last bits."""
    scene, options = step.scene, step.options
    slopes, alpha = options["alibi_slopes"], options["alpha"]
    assert not out.isnan().any()
    alphas = alpha.tolist() if isinstance(alpha, torch.Tensor) else alpha
    exact = scene.dense_decode(alpha=alphas, slopes=slopes, window=options["sliding_window"])
    filled = scene.seq_lens > 0
    assert (out[~filled] == 0).all()
    worst = (out.double() - exact).abs().max()
    if out.dtype == torch.float32 and worst <= LAST_BITS:
        return
    if not isinstance(alpha, float) or options["sliding_window"] is not None:
        assert out.dtype != torch.float32 and worst <= 4 * torch.finfo(out.dtype).eps
        return
    # By the same machine, whose sums have an order of their own.
    slopes = None if slopes is None else slopes.to(DEVICE)
    rows = [
        straightforward_attention(
            *(x.to(DEVICE) for x in (q[-1:], k, v)), scene.scale, alpha, slopes
        )[0].cpu()
        for q, k, v in zip(scene.query, scene.key, scene.value, strict=True)
        if len(q)
    ]
    assert_no_worse([out[filled]], [torch.stack(rows)], [exact[filled]])


def check(scene, workspace_size=None, **options):
    step = Step(scene, Exact(), **options)
    out = step.run(workspace_size)
    assert_accurate(step, out)
    assert torch.equal(step.counters[:4], step.run_reference()[1][:4])
    assert step.counters[5] == step.run_reference()[1][5]
    return step


@pytest.mark.parametrize(
    "dtype, alpha",
    [(torch.float32, alpha) for alpha in (4 / 3, 2.0, 1.2, 1.0)]
    + [(dtype, 1.5) for dtype in DTYPES],
    ids="{}".format,
)
def test_ragged_batches_are_exact(dtype, alpha):
    check(make_scene(RAGGED, dtype=dtype), alpha=alpha)


@pytest.mark.parametrize(
    "kv_heads, group, head_size, page_size",
    [(1, 1, 64, 64), (2, 3, 80, 16), (1, 16, 96, 32), (3, 5, 128, 16), (1, 2, 256, 64)],
)
@dtypes
def test_every_shape_of_heads_and_pages_is_exact(kv_heads, group, head_size, page_size, dtype):
    scene = make_scene(
        [130, 0, page_size, page_size + 1, page_size - 1],
        kv_heads=kv_heads,
        group=group,
        head_size=head_size,
        page_size=page_size,
        dtype=dtype,
    )
    check(scene)


@dtypes
def test_heads_have_their_own_alpha_and_slope_and_see_a_window(dtype):
    scene = make_scene(RAGGED, dtype=dtype)
    alpha = torch.tensor([1.25, 1.5, 2.0, 4 / 3], dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.0, 0.05, 0.004])
    check(scene, alpha=alpha, alibi_slopes=slopes)
    check(scene, sliding_window=37)
    check(scene, alpha=alpha, alibi_slopes=slopes, sliding_window=16)


def test_lengths_and_tables_may_be_64_bit():
    scene = make_scene(RAGGED, dtype=torch.float32)
    scene.block_table, scene.seq_lens = scene.block_table.long(), scene.seq_lens.long()
    check(scene)


@pytest.fixture
def few_splits(monkeypatch):
    """A chip of one multiprocessor, so that the programs of a test go through several tiles."""
    launches = import_module("entmaxkv_kernels.triton.decode")
    monkeypatch.setattr(launches, "processors", lambda device: 1)
    return 1


def small_chip(scene, alpha=1.5, **options):
    step = Step(scene, Exact(), alpha=alpha, **options)
    step.shape = replace(step.shape, processors=1)
    return step


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.2], ids="alpha {:.3g}".format)
def test_a_good_guess_leaves_few_candidates(few_splits, alpha):
    scene = make_scene([3000, 700], kv_heads=1, dtype=torch.float32, spread=6.0)
    step = small_chip(scene, alpha)
    size = step.shape.size(step.shape.tile * 2)
    assert_accurate(step, step.run(size))
    assert not step.scratch("state").any()
    assert step.counters[Counter.FALLBACKS] == 0
    assert step.scratch("count").sum() < 3700 / 4


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4 / 3, 1.2], ids="alpha {:.3g}".format)
def test_lists_that_overflow_are_made_up_for(few_splits, alpha):
    scene = make_scene([900, 0, 1], kv_heads=1, dtype=torch.float32, spread=0.05)
    step = small_chip(scene, alpha)
    out = step.run(step.shape.least_size)
    assert (step.scratch("state")[:2] == 1).all()
    states = step.scratch("state").view(len(scene.seq_lens), -1)
    assert step.counters[Counter.FALLBACKS] == states[scene.seq_lens > 0].sum() > 0
    assert_accurate(step, out)
    assert step.counters[4] == step.run_reference()[1][4]
    assert torch.equal(out, step.run(step.shape.least_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_all_have_weight(few_splits, dtype):
    scene = make_scene([1000, 1], kv_heads=1, dtype=dtype, filled=False)
    scene.key[0][:] = scene.key[0][0]
    scene.append_all()
    step = small_chip(scene)
    assert_accurate(step, step.run(step.shape.least_size))
    assert step.counters[4] == 2 * 1001
    step = small_chip(scene)
    assert_accurate(step, step.run())


def test_a_guess_that_is_too_high_is_found_out_and_made_up_for(few_splits):
    """The keys that the sample hits score high, and no others do."""
    scene = make_scene([16 * 800], kv_heads=1, group=1, dtype=torch.float32, filled=False)
    rows = torch.arange(2048) * (16 * 798 - 1) // 2047  # of all pages but the last two
    rows[-1] = 16 * 800 - 1
    query, key = scene.query[0][-1, 0], scene.key[0]
    score = 0.9 + 0.1 * torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(1))
    key[:] = 0
    key[rows, 0] = score * query / (query.square().sum() * scene.scale)
    scene.append_all()
    step = small_chip(scene)
    out = step.run(step.shape.size(2048))
    assert (step.scratch("state") == 1).all()
    assert step.counters[Counter.FALLBACKS] == 1
    assert (step.scratch("count") < 2048).all()
    assert_accurate(step, out)


@pytest.mark.parametrize("place", [-1, 1001], ids=["that is sampled", "that is not"])
@pytest.mark.parametrize("alpha", [1.5, 1.05], ids="alpha {:.3g}".format)
def test_one_key_far_above_all_others_leaves_the_output_exact(few_splits, alpha, place):
    """With an exponent of 20 its weight above the guess may be past fp32."""
    scene = make_scene([2700], kv_heads=1, group=1, dtype=torch.float32, spread=6.0, filled=False)
    query, key = scene.query[0][-1, 0], scene.key[0]
    key[place, 0] = 95 / (alpha - 1) * query / (query.square().sum() * scene.scale)
    scene.append_all()
    step = small_chip(scene, alpha)
    assert_accurate(step, step.run(step.shape.size(4 * step.shape.tile)))
    assert step.counters[Counter.FALLBACKS] == 0


def test_a_flat_row_is_not_listed_where_the_newest_key_is_above_it(few_splits):
    scene = make_scene([2700], kv_heads=1, group=1, dtype=torch.float32, spread=0.05, filled=False)
    query, key = scene.query[0][-1, 0], scene.key[0]
    key[-1, 0] = 3.0 * query / (query.square().sum() * scene.scale)
    scene.append_all()
    step = small_chip(scene)
    assert_accurate(step, step.run(step.shape.size(4 * step.shape.tile)))
    assert step.counters[Counter.FALLBACKS] == 0
    assert step.scratch("count").sum() == 1


@pytest.mark.parametrize("size", ["good", "least"])
def test_a_key_that_is_no_number_shows_in_its_own_output_alone(few_splits, size):
    scene = make_scene([700, 90], kv_heads=2, group=1, dtype=torch.float32)
    scene.cache.key[scene.block_table[0, 3], 1, 5] = torch.nan
    step = small_chip(scene)
    out = step.run(getattr(step.shape, f"{size}_size"))
    assert out[0, 1].isnan().all()
    assert not out[0, 0].isnan().any()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("alpha", [1.5, 2.0], ids="alpha {:.3g}".format)
@pytest.mark.parametrize("gap", [0.3, 0.01, 1e-3], ids="apart {}".format)
def test_many_equal_scores_beside_the_threshold_are_told_apart(few_splits, gap, alpha):
    """Two clusters of equal scores, the threshold just below the upper one or between them."""
    scene = make_scene([800], kv_heads=1, group=1, dtype=torch.float32, filled=False)
    query, key = scene.query[0][-1, 0], scene.key[0]
    score = torch.zeros(800, 1)
    score[::2] = gap / (alpha - 1)
    score[7] = (0.9 + gap) / (alpha - 1)
    key[:, 0] = score * query / (query.square().sum() * scene.scale)
    scene.append_all()
    step = small_chip(scene, alpha)
    out = step.run(step.shape.least_size)
    assert (step.scratch("state") == 1).all()
    assert_accurate(step, out)


@pytest.mark.parametrize("spread, alpha", [(0.0, 1.5), (0.3, 1.7), (4.0, 1.5), (40.0, 2.0)])
@pytest.mark.parametrize("held", [8192, 0], ids=["in registers", "in lists"])
def test_some_thousand_scores_are_exact_wherever_they_are_held(held, spread, alpha, monkeypatch):
    """From equal ones, of which more have weight than are solved apart, to a few that have any."""
    monkeypatch.setattr(workspace, "HELD", held)
    scene = make_scene([4100, 0, 17], kv_heads=1, dtype=torch.float32, spread=spread, filled=False)
    # Scores without rounding: it would be most of the error where two keys share all the weight.
    for x in (*scene.query, *scene.key):
        x.mul_(32).round_().div_(32)
    scene.append_all()
    assert (Step(scene, Exact()).shape.held > 4096) == (held > 0)
    check(scene, alpha=alpha)


def test_what_is_left_is_made_up_for_in_several_shares_with_the_same_bits(monkeypatch):
    launches = import_module("entmaxkv_kernels.triton.decode")
    monkeypatch.setattr(launches, "processors", lambda device: 7)
    scene = make_scene([1100, 0, 77], kv_heads=1, dtype=torch.float32, spread=0.05)
    step = Step(scene, Exact())
    step.shape = replace(step.shape, processors=7)
    out = step.run(step.shape.least_size)
    assert step.counters[Counter.FALLBACKS] == step.scratch("state").sum() > 0
    assert_accurate(step, out)
    assert torch.equal(out, step.run(step.shape.least_size))


def test_two_runs_give_the_same_bits():
    step = Step(make_scene([150, 50], dtype=torch.float16), Exact())
    assert torch.equal(step.run(), step.run())


def test_a_workspace_that_is_too_small_is_refused():
    step = Step(make_scene([33], dtype=torch.float32), Exact())
    with pytest.raises(ValueError, match=r"workspace has 64 bytes; expected at least \d+"):
        step.run(64)


def test_a_workspace_for_many_sequences_serves_fewer():
    heads = {"query_heads": 32, "kv_heads": 8, "head_size": 128, "page_size": 16}
    options = heads | {"dtype": torch.bfloat16, "max_tokens": 1 << 17}
    size = decode_workspace_size(64, **options, selector=Exact(), device="cpu")
    for batch in range(1, 65):
        shape = Shape(batch, **options, processors=132)
        assert shape.size(shape.capacity(size)) <= size
        assert shape.capacity(size) >= shape.capacity(shape.good_size)


@pytest.mark.parametrize(
    "batch, query_heads, max_tokens, stored",
    [
        *[(1, 32, 1 << 17, 1), (1, 8, 1 << 17, 1), (8, 32, 1 << 15, 1)],
        *[(1, 32, 1 << 18, 0), (1, 8, 1 << 19, 0), (8, 32, 1 << 17, 0)],
    ],
)
def test_all_scores_are_stored_where_they_are_few(batch, query_heads, max_tokens, stored):
    shape = Shape(batch, query_heads, 8, 128, 16, torch.bfloat16, max_tokens, 132)
    assert (shape.store_below >= max_tokens) == stored


def test_what_a_step_is_divided_by_is_found_out_once(monkeypatch):
    launches = import_module("entmaxkv_kernels.triton.decode")
    monkeypatch.setattr(launches, "shape_of", workspace.shape_of)
    scene = make_scene([33, 5], dtype=torch.float32)
    shape = Step(scene, Exact()).shape
    assert Step(scene, Exact()).shape is shape and shape == replace(shape)
    assert Step(make_scene([33], dtype=torch.float32), Exact()).shape != shape


def test_the_parts_of_a_workspace_do_not_overlap():
    shape = Shape(2, 4, 2, 64, 16, torch.float32, 512, 132)
    scratch = torch.zeros(shape.good_size, dtype=torch.uint8)
    parts = shape.divide(scratch, shape.capacity(len(scratch)))
    for value, part in enumerate(parts.values(), 1):
        part.fill_(value)
    assert all((part == value).all() for value, part in enumerate(parts.values(), 1))
