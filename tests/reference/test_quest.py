"""The page bound of Quest, how high a page reaches, and the ranking of a group's pages by it."""

import math

import pytest
import torch

from entmaxkv_kernels import PageLayout, TopK, allocate_pages, append, split_pages
from entmaxkv_kernels.pages import BOX
from entmaxkv_kernels.reference.candidates import Candidates
from entmaxkv_kernels.reference.quest import (
    page_reaches,
    quest_bounds,
    quest_pages,
    radius_bounds,
    sound_bounds,
)

from .golden import KEY, QUERY, SCALE, golden_cache, golden_candidates
from .scene import make_scene
from .test_append import KINDS, keys_to_bound
from .test_gaussian import candidates_of

KNOWN = [1.5225, 1.6691, 2.0792, 2.6696, 3.3192, 3.8909, 4.2575, 4.3252, 4.0510, 3.4473]
ORDER = [7, 6, 8, 5, 9, 4, 3, 2, 1, 0]


def exact_boxes(*, around_mean):
    """The golden context with boxes by the exact extremes of its keys, around their middle or their
    mean."""
    pages = KEY[:160, 0].view(10, 16, 8)
    low, high = pages.amin(1), pages.amax(1)
    center = pages.mean(1) if around_mean else (low + high) / 2
    statistics = torch.stack((center, torch.maximum(high - center, center - low)))[:, None, None]
    ranked = torch.ones(1, 10, dtype=torch.bool)
    return golden_candidates()._replace(statistics=statistics, ranked=ranked)


def test_the_bounds_of_the_paper_have_their_known_values():
    bounds = quest_bounds(exact_boxes(around_mean=False))[0, 0, 0]
    assert bounds.tolist() == pytest.approx(KNOWN, abs=6e-5)
    assert bounds.argsort(descending=True).tolist() == ORDER


def test_boxes_of_8_bits_loosen_the_bounds_of_exact_ones_by_their_steps_at_most():
    bounds = quest_bounds(golden_candidates(BOX))[0, 0, 0, :10]
    scales = golden_cache(BOX)[0].scales[:10, 0].double()
    # A center is off by half a step, for which the half-width makes room, and is rounded up.
    steps = scales[:, 0] + scales[:, 1] * (1 + 1e-4)
    looser = bounds - quest_bounds(exact_boxes(around_mean=True))[0, 0, 0]
    assert (looser <= QUERY.abs().sum() * SCALE * 0.5 * steps).all()
    # An edge that was the farther one from the mean may be so by less from the rounded center.
    assert (looser >= -QUERY.abs().sum() * SCALE * 0.5 * scales[:, 0]).all()
    assert bounds.argsort(descending=True).tolist() == ORDER


def test_a_page_reaches_above_its_center_by_the_norm_of_its_half_widths_times_the_query():
    candidates = exact_boxes(around_mean=True)
    query = 0.5 * SCALE * QUERY[0, 0]
    reaches = page_reaches(candidates)[0, 0, 0]
    for page, (center, half_width) in enumerate(zip(*candidates.statistics[:, 0, 0], strict=True)):
        spread = math.sqrt(sum((q * h) ** 2 for q, h in zip(query, half_width, strict=True)))
        assert reaches[page].item() == pytest.approx(float(query @ center) + spread, abs=1e-12)


def test_no_page_reaches_higher_than_its_bound():
    scene = make_scene([330], group=3, statistics=BOX, spread=3)
    candidates = candidates_of(scene, 1.5, torch.tensor([1.0, 0.1, 0.0, -0.2, -1.0, 0.01]))
    lower = quest_bounds(candidates) - page_reaches(candidates)
    assert (lower[..., :20] > 0).all()


@pytest.mark.parametrize("budget, pages", [(0, 0), (15, 0), (16, 1), (64, 4), (79, 4), (160, 10)])
def test_a_budget_buys_whole_pages_best_first(budget, pages):
    chosen = quest_pages(golden_candidates(BOX), TopK(budget))[0, 0]
    assert chosen.nonzero().flatten().tolist() == sorted(ORDER[:pages])


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha {}".format)
@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
@pytest.mark.parametrize("seed", range(4))
def test_no_score_of_a_page_exceeds_its_bound(alpha, alibi, seed):
    scene = make_scene([150, 40], group=3, statistics=BOX, spread=3, seed=seed)
    slopes = torch.tensor([1.0, 0.1, 0.0, -0.2, -1.0, 0.01]) if alibi else None
    bounds = quest_bounds(candidates_of(scene, alpha, slopes)).flatten(1, 2)
    factor = 1 if alpha == 1 else alpha - 1
    for b, length in enumerate([150, 40]):
        key = scene.key[b].repeat_interleave(3, 1)
        scores = torch.einsum("hd,nhd->hn", scene.query[b][-1], key) * scene.scale
        if alibi:
            scores = scores + slopes[:, None] * (torch.arange(length) - (length - 1))
        for page in range((length - 1) // 16):
            largest = factor * scores[:, page * 16 : (page + 1) * 16].amax(-1)
            assert (largest <= bounds[b, :, page] + 1e-12).all()


PAGES = 12


def boxed_pages(key, query, dtype):
    """The pages of keys [12 * 16, 4 heads, 32] and queries [4, group, 32], both of a dtype of
    caches, as they are to be judged in `dtype`."""
    layout = PageLayout(16, 32, BOX)
    cache = split_pages(allocate_pages(PAGES, 4, layout, key.dtype), layout)
    append(cache, key, key, torch.arange(len(key)))
    scales = cache.scales.permute(2, 1, 0)[:, None, ..., None].to(dtype)  # [3, 1, 4, 12, 1]
    return Candidates(
        query=query[None].to(dtype),
        statistics=cache.read_statistics(torch.arange(PAGES)[None], dtype).permute(3, 0, 2, 1, 4),
        ranked=torch.arange(PAGES)[None] < PAGES - 1,
        seq_lens=torch.tensor([len(key)]),
        page_size=16,
        scale=1.0,
        alpha=1.0,
        alibi_slopes=None,
        half_scales=scales[1],
        radius=scales[2],
        query_dtype=key.dtype if key.dtype.itemsize == 2 else dtype,
    )


def queries_against(key, candidates):
    """Queries [4, 12 * 16, 32], one for each key, which score it as high as its distance from the
    center allows: of all with the same norm of query times half-widths those that suit it."""
    center, half = candidates.statistics[:, 0].repeat_interleave(16, 2)
    away = (key.transpose(0, 1).double() - center) / torch.where(half > 0, half, 1) ** 2
    largest = away.abs().amax(-1, keepdim=True)
    return away / torch.where(largest > 0, largest, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"tiny"}))
def test_no_key_scores_above_what_its_radius_allows(kind, dtype):
    """In fp64, but for squares of 16 bits; for the rounding of fp32 there is room besides."""
    random = torch.Generator().manual_seed(3)
    key = torch.cat([keys_to_bound(kind, random) for _ in range(PAGES)]).to(dtype)
    key = key.nan_to_num(posinf=6e4, neginf=-6e4)
    judged = boxed_pages(key, torch.zeros(4, 1, 32, dtype=dtype), torch.float64)
    query = queries_against(key, judged).to(dtype)
    query = torch.cat((query, torch.randn(4, 9, 32, generator=random).to(dtype)), 1)
    candidates = boxed_pages(key, query, torch.float64)
    scores = query.double() @ key.double().permute(1, 2, 0)  # [4, queries, 12 * 16]
    highest = scores.unflatten(-1, (PAGES, 16)).amax(-1)
    bounds = radius_bounds(candidates)[0]
    size = query.double().abs() @ key.double().abs().amax(0)[..., None]
    assert (highest <= bounds + 1e-13 * size).all()
    if kind == "normal":
        # The furthest key of a page reaches it, but for the widening.
        middle = query.double() @ candidates.statistics[0, 0].mT
        spread, reached = bounds - middle, highest - middle
        lacking = (spread / reached)[:, : len(key)].unflatten(1, (PAGES, 16))
        lacking = lacking.diagonal(dim1=1, dim2=3).amin(1)  # [4, PAGES]
        assert ((lacking > 1) & (lacking < 1 + 2.0**-7)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15], ids="queries of {}".format)
def test_no_rounded_score_exceeds_its_sound_bound(kind, dtype, size):
    """All in fp32, as steps compute it."""
    random = torch.Generator().manual_seed(4)
    key = torch.cat([keys_to_bound(kind, random) for _ in range(PAGES)]).to(dtype)
    key = key.nan_to_num(posinf=6e4, neginf=-6e4)
    judged = boxed_pages(key, torch.zeros(4, 1, 32, dtype=dtype), torch.float64)
    query = (size * queries_against(key, judged)).to(dtype)
    scores = query.float() @ key.float().permute(1, 2, 0)
    highest = scores.unflatten(-1, (PAGES, 16)).amax(-1)[..., :-1]
    bounds = sound_bounds(boxed_pages(key, query, torch.float32))[0, ..., :-1]
    assert not (highest > bounds).any()
    if kind == "normal" and size == 1:
        assert (bounds.isfinite() & (bounds < 40)).all()


@pytest.mark.parametrize("measure", [page_reaches, quest_bounds])
def test_alibi_counts_at_the_most_favourable_position_of_a_page(measure):
    slopes = torch.tensor([0.05])
    without = measure(golden_candidates(BOX))
    first = torch.arange(11) * 16.0 - 160
    rising = measure(golden_candidates(BOX, alibi_slopes=slopes))
    assert (rising - without)[0, 0, 0, :10].tolist() == pytest.approx(
        (0.5 * 0.05 * (first + 15))[:10].tolist(), abs=1e-6
    )
    falling = measure(golden_candidates(BOX, alibi_slopes=-slopes))
    assert (falling - without)[0, 0, 0, :10].tolist() == pytest.approx(
        (-0.5 * 0.05 * first)[:10].tolist(), abs=1e-6
    )


def test_a_group_ranks_a_page_by_the_head_it_matters_most_to():
    scene = make_scene([330], group=3, statistics=BOX, spread=3)
    # One head with scores far above the others', which it must not silence.
    scene.query[0][-1, 0] *= 20
    candidates = candidates_of(scene, 1.5)
    reaches = page_reaches(candidates)[0, :, :, :20]
    rank = (reaches - reaches.amax(-1, keepdim=True)).amax(1)
    chosen = quest_pages(candidates, TopK(5 * 16))[0, :, :20]
    for head in range(2):
        assert set(chosen[head].nonzero().flatten().tolist()) == set(
            rank[head].topk(5).indices.tolist()
        )
    best = reaches.argmax(-1)  # [kv_heads, group]: each head's own best page is among them
    assert chosen.gather(1, best).all()


def test_equal_pages_are_taken_from_the_first():
    scene = make_scene([200], kv_heads=1, group=2, statistics=BOX)
    for part in (scene.cache.statistics, scene.cache.scales):
        part[:] = part[scene.block_table[0, 0]].clone()
    chosen = quest_pages(candidates_of(scene, 1.5), TopK(48))[0, 0]
    assert chosen.nonzero().flatten().tolist() == [0, 1, 2]


def test_each_sequence_spends_its_own_budget():
    scene = make_scene([200, 33, 17, 64], statistics=BOX)
    chosen = quest_pages(candidates_of(scene, 1.5), TopK(48)).sum(-1)
    assert chosen.tolist() == [[3, 3], [2, 2], [1, 1], [3, 3]]


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match=r"token_budget is -1; expected at least 0"):
        TopK(-1)
