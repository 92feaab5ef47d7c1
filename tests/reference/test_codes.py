"""Two bits of every channel of every key: what they say of keys, and what bounds they give."""

import math

import pytest
import torch

from entmaxkv_kernels import (
    Adaptive,
    Exact,
    PageLayout,
    TopK,
    allocate_pages,
    analyze_decode,
    append,
    split_pages,
)
from entmaxkv_kernels.pages import BOX, CODES
from entmaxkv_kernels.reference.boxes import LARGEST
from entmaxkv_kernels.reference.candidates import Candidates
from entmaxkv_kernels.reference.codes import (
    ERROR_STEPS,
    MOST_UNITS,
    SHORTENED,
    SPREADS,
    block_size,
    rotation,
    span,
    unpack,
)
from entmaxkv_kernels.reference.quest import page_reaches, page_spreads, radius_bounds, sound_bounds

from .scene import make_scene

HEADS = 4
HEAD_SIZES = [64, 80, 112, 128, 240, 256]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def keys_to_code(kind, head_size, random, page_size=16):
    """[page_size tokens, 4 heads, head_size], fp64."""
    shape = page_size, HEADS, head_size
    key = torch.randn(shape, generator=random, dtype=torch.float64)
    channel = torch.arange(head_size)
    return {
        "normal": key,
        "one long": key * torch.where(torch.arange(page_size) == 5, 300.0, 1.0)[:, None, None],
        "far from zero": key + 1e3,
        "equal": key[:1].expand_as(key),
        "zero": 0 * key,
        "one channel": key * (channel == 5),
        "one sign": key[..., :1].expand_as(key),
        "a row of the rotation": key[..., :1] * rotation(head_size, key)[7],
        "all lengths": key * 10 ** (6 * torch.rand(shape[0], 1, 1, generator=random).double() - 3),
        "tiny": 1e-43 * key,
        "huge": (1e37 * key).clamp(-8e37, 8e37),
        "past what has a bound": (1e38 * key).clamp(-3e38, 3e38),
        "the largest of fp8": (100 * key).sign() * 448,
    }[kind]


KINDS = ["normal", "one long", "far from zero", "equal", "zero", "one channel", "one sign"]
KINDS += ["a row of the rotation", "all lengths", "tiny", "huge", "the largest of fp8"]
KINDS += ["past what has a bound"]


def coded_pages(key, dtype):
    """A cache with one page of the keys, rounded to a dtype, and these."""
    layout = PageLayout(len(key), key.shape[-1], CODES)
    cache = split_pages(allocate_pages(1, HEADS, layout, dtype), layout)
    key = key.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    append(cache, key, key, torch.arange(len(key)))
    return cache, key.double()


def rounded_keys(cache, times=1.0):
    """[tokens, 4 heads, head_size] of the first page, fp64."""
    size, head_size = cache.layout.page_size, cache.layout.head_size
    codes = unpack(cache.statistics[0], cache.scales[0], size, torch.float64)
    step = times * codes.units * codes.scales[:, 1:2] / span(head_size)
    turned = (codes.levels - 1.5) * step[..., None]
    rest = turned @ rotation(head_size, turned) * block_size(head_size) ** -0.5
    return (rest + (codes.center * codes.scales[:, :1])[:, None]).transpose(0, 1)


def largest_steps(cache):
    return cache.scales[0, :, 1].double() * (MOST_UNITS / span(cache.layout.head_size))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_rotation_is_one_and_its_own_inverse(head_size):
    matrix = rotation(head_size, torch.zeros((), dtype=torch.float64))
    assert torch.equal(matrix, matrix.mT)
    assert torch.equal(matrix @ matrix, block_size(head_size) * torch.eye(head_size).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_key_lies_further_off_its_rounded_one_than_the_radius(kind, head_size, dtype):
    random = torch.Generator().manual_seed(1)
    for page_size in (16, 32):
        cache, key = coded_pages(keys_to_code(kind, head_size, random, page_size), dtype)
        error = (key - rounded_keys(cache, SHORTENED)).norm(dim=-1).amax(0)
        radius = cache.scales[0, :, 2].double() * largest_steps(cache) / SPREADS
        assert (error < radius).all()
        bounded = key.abs().amax((0, 2)) <= LARGEST
        assert torch.equal(radius.isfinite(), bounded)
        # Little more, but for what queries of 16 bits lose and squares are rounded up by.
        lost = (2.01 * 2.0**-7 + ERROR_STEPS**-0.5) * head_size**0.5 * largest_steps(cache)
        assert (radius <= 1.02 * error + lost + 1e-28)[bounded].all()


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_scales_bound_all_channels(kind, head_size):
    random = torch.Generator().manual_seed(2)
    cache, key = coded_pages(keys_to_code(kind, head_size, random), torch.float32)
    scales = cache.scales[0].double()
    # Beyond LARGEST, keys count as that.
    rest = key.clamp(-LARGEST, LARGEST)
    rest = rest - (cache.statistics[0, :, 0, :head_size].double() * scales[:, :1])
    assert (rest.abs().amax((0, 2)) <= MOST_UNITS * scales[:, 1]).all()


@pytest.mark.parametrize("head_size", [64, 128])
def test_normal_keys_keep_their_length_and_seven_eighths_of_their_variance(head_size):
    random = torch.Generator().manual_seed(3)
    cache, key = coded_pages(keys_to_code("normal", head_size, random, 128), torch.float32)
    # Four levels that are equally far apart leave 0.1175 at best. Here they are as much further off
    # as leaves no key shortened: 1 / (1 - 0.1175) of it.
    rounded = rounded_keys(cache)
    share = (key - rounded).square().mean() / key.var()
    assert 0.127 < share < 0.139
    center = key.mean(0)
    along = ((key - center) * (rounded - center)).sum() / (key - center).square().sum()
    assert 0.995 < along < 1.005


def test_a_long_key_leaves_the_others_as_they_are():
    random = torch.Generator().manual_seed(4)
    cache, key = coded_pages(keys_to_code("one long", 128, random), torch.float32)
    error = (key - rounded_keys(cache)).norm(dim=-1) / (key - key.mean(0)).norm(dim=-1)
    assert (error[5] < 0.4).all()
    # One of 300 times the length moves the mean, which the others' steps are about then.
    assert (error < 0.8).all()


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan], ids=str)
def test_no_radius_holds_a_key_that_is_not_finite(number):
    layout = PageLayout(16, 64, CODES)
    cache = split_pages(allocate_pages(1, HEADS, layout, torch.float32), layout)
    key = keys_to_code("normal", 64, torch.Generator().manual_seed(0)).float()
    key[3, 0, 7] = key[2:, 1, 8] = key[:, 2, 9] = number
    append(cache, key, key, torch.arange(16))
    assert cache.scales[0, :, 2].isfinite().tolist() == [False, False, False, True]
    assert cache.scales[0, :, :2].isfinite().all()
    # Rows after the last token belong to nobody.
    append(cache, key[:2], key[:2], torch.arange(2))
    assert cache.scales[0, :, 2].isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_codes_are_the_same_bytes_however_the_keys_came(dtype):
    options = {"statistics": CODES, "dtype": dtype, "head_size": 80}
    whole = make_scene([45], **options)
    parts = make_scene([45], **options, filled=False)
    for start, end in [(0, 1), (1, 9), (9, 30), (30, 31), (31, 45)]:
        parts.append(0, start, end)
    pages = whole.block_table[0, :3].long()
    for name in ("statistics", "scales"):
        assert torch.equal(*(getattr(x.cache, name)[pages] for x in (whole, parts)))


def candidates_of(scene, alpha=1.5, slopes=None, dtype=torch.float64):
    size = scene.page_size
    pages = -(-scene.seq_lens.long() // size)
    ranked = torch.arange(int(pages.max())) < pages[:, None] - 1
    ids = scene.block_table[:, : ranked.shape[1]].long().masked_fill(~ranked, 0)
    statistics, scales = (
        x[ids].transpose(1, 2) for x in (scene.cache.statistics, scene.cache.scales)
    )
    query = scene.last_queries.unflatten(1, (scene.cache.key.shape[1], -1))
    return Candidates(
        query=query.to(dtype),
        statistics=None,
        ranked=ranked,
        seq_lens=scene.seq_lens,
        page_size=size,
        scale=scene.scale,
        alpha=alpha,
        alibi_slopes=slopes,
        query_dtype=query.dtype,
        radius=scales[..., 2:].to(dtype),
        codes=unpack(statistics, scales, size, dtype),
    )


@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.1, 3, 100])
def test_bounds_hold_all_scores_of_a_page(dtype, alibi, spread):
    lengths = [150, 40]
    scene = make_scene(
        lengths, group=3, head_size=112, statistics=CODES, spread=spread, dtype=dtype
    )
    slopes = torch.linspace(-2, 1, 6, dtype=torch.float64) if alibi else None
    exact = candidates_of(scene, slopes=slopes)
    rounded = candidates_of(scene, slopes=slopes.float() if alibi else None, dtype=torch.float32)
    for bounds in (radius_bounds(exact).flatten(1, 2), sound_bounds(rounded).flatten(1, 2)):
        for b, length in enumerate(lengths):
            key = scene.key[b].double().repeat_interleave(3, 1)
            scores = torch.einsum("hd,nhd->hn", scene.query[b][-1].double(), key) * scene.scale
            if alibi:
                scores = scores + slopes[:, None] * (torch.arange(length) - (length - 1))
            for page in range((length - 1) // 16):
                largest = 0.5 * scores[:, page * 16 : (page + 1) * 16].amax(-1)
                assert (largest <= bounds[b, :, page]).all()


def test_reaches_lie_a_spread_above_the_largest_rounded_score():
    scene = make_scene([330], group=3, head_size=64, statistics=CODES, spread=3)
    candidates = candidates_of(scene)
    cache = scene.cache
    for page in range(20):
        own = split_pages(allocate_pages(1, cache.key.shape[1], cache.layout), cache.layout)
        for name in ("statistics", "scales"):
            getattr(own, name)[0] = getattr(cache, name)[scene.block_table[0, page]]
        key = rounded_keys(own).repeat_interleave(3, 1)
        scores = torch.einsum("hd,nhd->nh", scene.last_queries[0], key) * scene.scale / 2
        norm = scene.last_queries[0].norm(dim=-1) * scene.scale / 2
        spread = norm * largest_steps(own).repeat_interleave(3) / SPREADS
        torch.testing.assert_close(page_spreads(candidates)[0, ..., page].flatten(), spread)
        reach = scores.amax(0) + spread
        # Queries are rounded to 16 bits before they are rotated.
        torch.testing.assert_close(
            page_reaches(candidates)[0, ..., page].flatten(), reach, rtol=2.0**-14, atol=1e-3
        )


def analyze(scene, selector):
    return analyze_decode(
        scene.last_queries,
        scene.cache,
        scene.block_table,
        scene.seq_lens,
        scale=scene.scale,
        alpha=1.5,
        selector=selector,
    )


def test_codes_find_more_of_the_weight_than_boxes_do():
    dropped = {}
    for statistics in (BOX, CODES):
        scene = make_scene([3000, 2000], group=2, head_size=64, statistics=statistics, spread=4)
        selector = TopK(320, codes=statistics == CODES)
        dropped[statistics] = analyze(scene, selector).dropped_mass.mean()
    assert dropped[CODES] < 0.01 * dropped[BOX]


SELECTORS = [
    TopK(10**6, codes=True),
    Adaptive(codes=True, margin=1e3),
    Exact(prune=True, codes=True),
]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda x: x.name)
def test_selectors_that_leave_out_no_support_give_the_exact_output(selector):
    options = {"group": 2, "head_size": 80, "statistics": CODES, "spread": 6, "coherence": 0.5}
    scene = make_scene([700, 333, 16, 1], **options)
    expected = scene.decode(selector=Exact())
    torch.testing.assert_close(scene.decode(selector=selector), expected)


def test_pruning_by_codes_leaves_out_what_boxes_cannot():
    read = {}
    for statistics in (BOX, CODES):
        options = {"group": 2, "head_size": 64, "spread": 4, "coherence": 0.8}
        scene = make_scene([3000], statistics=statistics, **options)
        selector = Exact(prune=True, codes=statistics == CODES)
        report = analyze(scene, selector)
        assert (report.dropped_mass == 0).all()
        read[statistics] = report.selected.double().mean()
    assert read[CODES] < 0.5 * read[BOX]


def test_pages_of_keys_that_are_no_numbers_are_read():
    scene = make_scene([700], kv_heads=1, group=1, head_size=64, statistics=CODES, spread=4)
    # Without its NaN the page is one that nobody wants.
    scene.key[0][80:96] = -2 * scene.query[0][-1]
    scene.key[0][83, 0, 5] = math.nan
    scene.append_all()
    read = analyze(scene, Adaptive(codes=True, first_pages=4)).selected[0, 0]
    assert read[5] and not read.all()


def test_a_key_past_what_has_a_bound_leaves_no_proof():
    scene = make_scene(
        [640], kv_heads=1, group=1, head_size=64, statistics=CODES, dtype=torch.float32
    )
    random = torch.Generator().manual_seed(0)
    scene.key[0] = 1e30 * torch.randn(640, 1, 64, generator=random)
    scene.key[0][100, 0, 5], scene.key[0][339, 0, 6:8] = 3.3e38, 8e37
    scene.query[0][-1] = 1e-6 * ((torch.arange(64) >= 5) & (torch.arange(64) < 8))
    scene.append_all()
    scene.scale = 1.0
    report = analyze(scene, Exact(prune=True, codes=True))
    assert report.dropped_mass.item() == 0
    assert report.selected[0, 0, 6]


@pytest.mark.parametrize("head_size", [32, 66, 260])
def test_head_sizes_that_have_no_codes_are_refused(head_size):
    with pytest.raises(ValueError, match=f"head_size is {head_size}; expected a multiple of 4"):
        PageLayout(16, head_size, CODES)
