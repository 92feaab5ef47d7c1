"""Compiled, the pages that reach a threshold: those of the reference, by estimates or by bounds."""

import pytest
import torch
from reference.scene import make_fp8_scene

from entmaxkv_kernels import Adaptive, Counter, Exact
from entmaxkv_kernels.triton import decode_workspace_size, workspace

from .device import DEVICE, DTYPES, ON_GPU, Step, on_a_gpu
from .test_sparse import RAGGED, check, sparse_scene

PRUNE = Exact(prune=True, first_pages=4)
BY_CODES = Exact(prune=True, first_pages=4, codes=True)


def pruning(selectors):
    ids = [f"by-{selector.statistics[-1]}" for selector in selectors]
    return pytest.mark.parametrize("selector", selectors, ids=ids)


prunes = pruning([PRUNE, BY_CODES])
# The interpreter is slow.
more_on_a_gpu = pruning([PRUNE] + [BY_CODES] * ON_GPU)
SLOPES = torch.tensor([0.5, 0.0, 0.05, 0.004])
MIXED = torch.tensor([1.25, 1.5, 2.0, 4 / 3], dtype=torch.float64)


def check_pruned(scene, **options):
    """The pages, and the output of whoever reads all of them."""
    selector = BY_CODES if scene.cache.layout.coded else PRUNE
    pages = check(selector, scene, **options)
    step = Step(scene, selector, certify=True, **options)
    exact = Step(scene, Exact(), **options).run()
    out = step.run()
    tolerance = {torch.float32: 2e-5}.get(out.dtype, 8 * torch.finfo(out.dtype).eps)
    assert (out.double() - exact.double()).abs().max() <= tolerance
    assert (step.certificate == 0).all()
    return pages


def test_heads_reach_as_far_as_their_first_pages_show():
    wide, narrow = Adaptive(margin=1.5, first_pages=4), Adaptive(margin=0.5, first_pages=4)
    scene = sparse_scene(wide)
    assert check(narrow, scene).sum() < check(wide, scene).sum()


def test_first_pages_are_read_whatever_they_reach():
    selector = Adaptive(reach=0.01, first_pages=3, guard=0)
    pages = check(selector, sparse_scene(selector, [0, 700, 300]))
    # 2 first pages for each of 2 heads, and the last page.
    assert ((pages[1].sum(-1) >= 3) & (pages[1].sum(-1) <= 5)).all()


@pytest.mark.parametrize("tile", [32, 64], ids="tiles of {} pages".format)
def test_pages_with_larger_radii_than_their_neighbours_are_judged_by_their_bounds(
    monkeypatch, tile
):
    monkeypatch.setattr(workspace.Shape, "list_tile", tile)
    blind, guarded = (Adaptive(reach=0.01, first_pages=3, guard=guard) for guard in (0, 1.1))
    scene = sparse_scene(guarded, [0, 700, 300])
    scene.cache.scales[scene.block_table[1, [5, 41]].long(), :, 2] *= 1.5
    few, more = check(blind, scene)[1], check(guarded, scene)[1]
    assert few.sum() < more.sum() < 30
    assert more[:, [5, 41]].all()


def test_long_rows_have_more_first_pages_and_several_tiles(monkeypatch):
    monkeypatch.setattr(workspace.Shape, "list_tile", 256)
    selector = Adaptive(reach=3.0, first_pages=3)
    scene = sparse_scene(selector, [1100 * 16 + 1, 40, 0, 300 * 16], kv_heads=1, group=2)
    step = Step(scene, selector)
    assert step.shape.first_pages == 8 and step.shape.list_tiles == 5
    pages = check(selector, scene)
    assert 50 < pages[0].sum() < 1100


@pytest.mark.parametrize(
    "selector, place, number",
    [
        (PRUNE, 2, torch.inf),
        (Adaptive(reach=0.1, first_pages=4, guard=0), 1, torch.nan),
        (Adaptive(reach=0.1, first_pages=4), 2, torch.inf),
    ],
    ids=["pruned", "adaptive", "adaptive by its guard"],
)
def test_pages_without_numbers_may_hold_anything(selector, place, number):
    scene = sparse_scene(selector, [500], coherence=0.99)
    scene.cache.scales[scene.block_table[0, [3, 7]].long(), :, place] = number
    read = check(selector, scene)
    assert read[0, :, [3, 7]].all() and not read[0].all()


def test_equal_pages_go_to_the_earlier_one():
    selector = Adaptive(reach=1e-6, first_pages=4)
    scene = sparse_scene(selector, [500])
    for part in (scene.cache.key, scene.cache.statistics, scene.cache.scales):
        part[scene.block_table[0, 1:31].long()] = part[scene.block_table[0, 0].long()].clone()
    check(selector, scene)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.2, 1.5, pytest.param(2.0, marks=on_a_gpu)])
def test_pruning_changes_nothing_but_what_is_read(alpha, dtype):
    lengths = [*RAGGED, 15]
    pages = check_pruned(sparse_scene(PRUNE, lengths, coherence=0.99, dtype=dtype), alpha=alpha)
    assert not pages[4].all()


def test_independent_keys_are_read_whole():
    pages = check_pruned(sparse_scene(PRUNE, [500, 300], coherence=0.0, spread=1.0))
    assert pages[0, :, :32].all() and pages[1, :, :19].all()


def test_distance_prunes_independent_keys():
    slopes = torch.tensor([0.5, 0.25, 0.5, 0.25])
    scene = sparse_scene(PRUNE, [1100, 300], coherence=0.0, spread=1.0)
    pages = check_pruned(scene, alibi_slopes=slopes)
    assert pages[0].sum(-1).max() < 35


@prunes
def test_an_isolated_needle_is_never_pruned(selector):
    scene = sparse_scene(selector, [1100], coherence=0.98, spread=2.0)
    query = scene.last_queries[0]
    for head, position in enumerate((37, 480, 801, 1003)):
        key = scene.key[0][position, head // 2]
        key += query[head] * (8.0 / scene.scale / query[head].square().sum())
    scene.append_all()
    pages = check_pruned(scene)
    for head, position in enumerate((37, 480, 801, 1003)):
        assert pages[0, head // 2, position // 16]
    assert not pages.all()


@prunes
def test_heads_have_their_own_alpha_and_slope(selector):
    check_pruned(sparse_scene(selector, coherence=0.99), alpha=MIXED, alibi_slopes=SLOPES)


@more_on_a_gpu
@pytest.mark.parametrize(
    "kv_heads, group, head_size, page_size", [(1, 16, 80, 32), (3, 1, 128, 16), (1, 3, 256, 64)]
)
def test_every_shape_of_heads_and_pages_prunes(selector, kv_heads, group, head_size, page_size):
    lengths = [0, page_size - 1, 9 * page_size, 700]
    shape = {"kv_heads": kv_heads, "group": group, "head_size": head_size, "page_size": page_size}
    check_pruned(sparse_scene(selector, lengths, coherence=0.99, **shape))


@more_on_a_gpu
def test_an_fp8_cache_prunes(selector):
    scales = {"key_scale": 0.25, "value_scale": 2.0}
    options = {"dtype": torch.float16, "coherence": 0.999, "spread": 4.0}
    options["statistics"] = selector.statistics
    scene = make_fp8_scene([17, 500], **scales, **options)
    assert not check_pruned(scene, scale=scene.scale * scales["key_scale"])[1].all()


@more_on_a_gpu
def test_some_sequences_are_read_whole(selector):
    exact_rows = torch.tensor([False, False, True, False, True, False])
    scene = sparse_scene(selector, coherence=0.99)
    pages = check_pruned(scene, exact_rows=exact_rows, exact_below=16)
    assert pages[4, :, :32].all() and not pages[5, :, :19].all()


def test_a_window_is_read_whole():
    step = Step(sparse_scene(PRUNE, [300]), PRUNE, sliding_window=40)
    assert torch.equal(step.run(), Step(step.scene, Exact(), sliding_window=40).run())
    assert step.counters[Counter.PAGES_READ] == step.counters[Counter.PAGES_HELD]


@pytest.mark.parametrize(
    "selector", [PRUNE, Adaptive(first_pages=4)] + [BY_CODES] * ON_GPU, ids=str
)
def test_the_least_workspace_is_enough_and_two_runs_give_the_same_bits(selector):
    scene = sparse_scene(selector, [600, 300], kv_heads=1, group=2, coherence=0.98)
    step = Step(scene, selector)
    first = step.run(step.shape.least_size)
    assert torch.equal(first, step.run(step.shape.least_size))
    expected, _ = step.run_reference()
    assert (first - expected).abs().max() < 2e-5
    size = decode_workspace_size(
        2, 2, 1, 64, 16, torch.float32, scene.block_table.shape[1] * 16,
        selector=selector, device=DEVICE,
    )  # fmt: skip
    assert step.shape.least_size <= step.shape.good_size <= size
