"""Writing tokens into pages, and the statistics that are kept of them."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entmaxkv_kernels import PageLayout, allocate_pages, append, split_pages
from entmaxkv_kernels.pages import BOX

from .scene import assert_close, make_scene

STATISTICS = [("mean", "std"), BOX]
statistics = pytest.mark.parametrize("statistics", STATISTICS, ids=" and ".join)


def expected_moments(key):
    """Of one page's own keys [tokens, kv_heads, head_size]: [kv_heads, 2, head_size]."""
    key = key.double()
    return torch.stack((key.mean(0), key.std(0, correction=0).clamp_min(1e-6)), 1)


def assert_box(kept, key):
    """The box [kv_heads, 2, head_size] holds the keys [tokens, kv_heads, head_size], exactly, lies
    around their mean, and is no wider than 8 bits make it."""
    low, high = key.double().amin(0), key.double().amax(0)
    for center, half, least, most in zip(
        *(x.flatten().tolist() for x in (*kept.unbind(1), low, high)), strict=True
    ):
        assert Fraction(center) - Fraction(half) <= least
        assert Fraction(center) + Fraction(half) >= most
    mean = key.double().mean(0)
    # The mean is of numbers rounded to 16 bits, and rounded to 8 itself.
    rounding = torch.maximum(low.abs(), high.abs()) * 2.0**-15
    step = (mean.abs() + rounding).amax(-1, keepdim=True) / 127
    off = (0.5 + 1e-4) * step + rounding + 1e-35
    assert ((kept[:, 0] - mean).abs() <= off).all()
    reach = torch.maximum(high - mean, mean - low) + off
    widest = reach + reach.amax(-1, keepdim=True) / 127
    assert (kept[:, 1] <= (1 + 1e-4) * widest + 1e-42).all()


def assert_radius(kept, radius, key):
    """Every key [tokens, kv_heads, head_size] lies within radius [kv_heads], less what it was
    widened by for others' rounding, half-widths of the center, and one nearly there."""
    center, half = kept.unbind(1)
    away = torch.where(half > 0, (key.double() - center) / half, 0)
    furthest = away.square().sum(-1).amax(0).sqrt()
    assert (radius.double() * (1 - 2.0**-9) >= furthest).all()
    assert (radius.double() <= (1 + 2.0**-8 + 2.0**-10) * furthest).all()


def assert_page(cache, page, key, tolerance=1e-12):
    """The page's statistics are those of its own keys [tokens, kv_heads, head_size]."""
    kept = cache.read_statistics(page, torch.float64)
    if cache.layout.bounded:
        assert_box(kept, key)
        assert_radius(kept, cache.scales[page, :, 2].reshape(-1), key)
    else:
        assert_close(kept, expected_moments(key), tolerance)


def assert_statistics(scene, lengths):
    size = scene.page_size
    for b, length in enumerate(lengths):
        for page in range(-(-length // size)):
            own = scene.key[b][page * size : min(length, (page + 1) * size)]
            assert_page(scene.cache, scene.block_table[b, page], own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_land_in_their_slots_and_nowhere_else(dtype):
    lengths = [1, 15, 16, 17, 50]
    scene = make_scene(lengths, dtype=dtype)
    for b, length in enumerate(lengths):
        for position in range(length):
            page, offset = scene.block_table[b, position // 16], position % 16
            assert torch.equal(scene.cache.key[page, :, offset], scene.key[b][position])
            assert torch.equal(scene.cache.value[page, :, offset], scene.value[b][position])
    written = ~scene.cache.key.isnan().any(-1)
    assert written.sum() == sum(lengths) * 2


def test_negative_slots_are_skipped():
    scene = make_scene([20], statistics=("mean", "std"), filled=False)
    slots = scene.slots(0, 0, 20)
    slots[7:] = -1
    append(scene.cache, scene.key[0], scene.value[0], slots)
    assert (~scene.cache.key.isnan().any(-1)).sum() == 7 * 2
    assert_statistics(scene, [7])
    append(scene.cache, scene.key[0], scene.value[0], torch.full_like(slots, -1))
    assert_statistics(scene, [7])


@statistics
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    page_size=st.sampled_from([1, 8, 16, 32]),
    seed=st.integers(0, 10**6),
)
def test_any_sequence_of_appends_gives_the_statistics_from_scratch(
    statistics, lengths, page_size, seed
):
    scene = make_scene(
        lengths, page_size=page_size, head_size=32, statistics=statistics, seed=seed, filled=False
    )
    random = torch.Generator().manual_seed(seed)
    filled = [0] * len(lengths)
    while filled != lengths:
        # One batch: every unfinished sequence appends a chunk of its own size, or nothing.
        chunks = []
        for b, length in enumerate(lengths):
            most = int(torch.randint(1, 40, (), generator=random))
            end = min(length, filled[b] + int(torch.randint(0, most + 1, (), generator=random)))
            chunks.append((b, filled[b], end))
            filled[b] = end
        append(
            scene.cache,
            torch.cat([scene.key[b][start:end] for b, start, end in chunks]),
            torch.cat([scene.value[b][start:end] for b, start, end in chunks]),
            torch.cat([scene.slots(*chunk) for chunk in chunks]),
        )
        assert_statistics(scene, filled)


@statistics
def test_pages_of_a_previous_owner_leave_no_trace(statistics):
    scene = make_scene([64, 40], statistics=statistics, filled=False)
    scene.append_all()
    scene.block_table[1, :3] = scene.block_table[0, 1:4].flip(0)  # sequence 0 has gone
    for start, end in [(0, 5), (5, 18), (18, 33), (33, 34), (34, 40)]:
        scene.append(1, start, end)
        size = scene.page_size
        for page in range(-(-end // size)):
            own = scene.key[1][page * size : min(end, (page + 1) * size)]
            assert_page(scene.cache, scene.block_table[1, page], own)


def test_equal_keys_have_the_least_standard_deviation():
    scene = make_scene([21], statistics=("mean", "std"), filled=False)
    scene.key[0][:] = 3.7
    scene.append_all()
    kept = scene.cache.statistics[scene.block_table[0, :2].long()]
    assert_close(kept[:, :, 0], torch.full_like(kept[:, :, 0], 3.7), 1e-14)
    assert_close(kept[:, :, 1], torch.full_like(kept[:, :, 1], 1e-6), 1e-20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_means_and_deviations_are_rounded_once(dtype):
    scene = make_scene([16, 37], statistics=("mean", "std"), dtype=dtype)
    for b, length in enumerate([16, 37]):
        for page in range(-(-length // 16)):
            own = scene.key[b][page * 16 : min(length, (page + 1) * 16)]
            expected = expected_moments(own)
            kept = scene.cache.statistics[scene.block_table[b, page]].double()
            # Half a unit in the last place of the stored value, and the float32 arithmetic.
            unit = torch.finfo(dtype).eps / 2 * expected.abs() + 4e-7
            assert ((kept - expected).abs() <= unit).all()


def keys_to_bound(kind, random):
    """[16 tokens, 4 heads, 32], fp64."""
    key = torch.randn(16, 4, 32, generator=random, dtype=torch.float64)
    uniform = torch.rand(1, 4, 32, generator=random, dtype=torch.float64)
    return {
        "normal": key,
        "outlier channels": key * torch.where(uniform < 0.1, 1e3, 1.0),
        "far from zero": key + 1e3,
        "equal": key[:1].expand_as(key),
        "zero": 0 * key,
        "one channel": key * (torch.arange(32) == 5),
        "of all magnitudes": key * 10 ** (70 * uniform - 36),
        "tiny": 1e-43 * key,
        "huge": (1e37 * key).clamp(-8e37, 8e37),
        "the largest of fp8": (100 * key).sign() * 448,
    }[kind]


KINDS = ["normal", "outlier channels", "far from zero", "equal", "zero", "one channel"]
KINDS += ["of all magnitudes", "tiny", "huge", "the largest of fp8"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_box_holds_the_keys_whatever_they_are(kind, dtype):
    layout = PageLayout(16, 32, BOX)
    random = torch.Generator().manual_seed(0)
    cache = split_pages(allocate_pages(20, 4, layout, dtype), layout)
    for page in range(20):
        key = keys_to_bound(kind, random).to(dtype)
        key = key.nan_to_num(posinf=6e4, neginf=-6e4)
        append(cache, key, key, 16 * page + torch.arange(16))
        kept, radius = cache.read_statistics(page, torch.float64), cache.scales[page, :, 2]
        assert_box(kept, key)
        if kind == "tiny" and dtype != torch.float64:
            # The reciprocals of such half-widths are not finite, which bounds nothing.
            assert ((radius == 0) | (radius == torch.inf)).all()
        else:
            assert_radius(kept, radius, key)


def test_a_box_counts_infinite_keys_as_large_and_leaves_out_what_is_no_number():
    layout = PageLayout(16, 32, BOX)
    cache = split_pages(allocate_pages(1, 4, layout, torch.float32), layout)
    key = keys_to_bound("normal", torch.Generator().manual_seed(0)).float()
    key[3, 0, 7], key[4, 1, 8], key[:, 2, 9] = math.inf, -math.inf, math.nan
    append(cache, key, key, torch.arange(16))
    key[3, 0, 7], key[4, 1, 8], key[:, 2, 9] = 2.0**126, -(2.0**126), 0
    assert_box(cache.read_statistics(0, torch.float64), key)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan], ids=str)
def test_no_radius_holds_a_key_that_is_not_finite(number):
    layout = PageLayout(16, 32, BOX)
    cache = split_pages(allocate_pages(1, 4, layout, torch.float32), layout)
    key = keys_to_bound("normal", torch.Generator().manual_seed(0)).float()
    key[3, 0, 7] = key[2:, 1, 8] = key[:, 2, 9] = number
    append(cache, key, key, torch.arange(16))
    assert cache.scales[0, :, 2].isfinite().tolist() == [False, False, False, True]
    # Rows after the last token belong to nobody.
    append(cache, key[:2], key[:2], torch.arange(2))
    assert cache.scales[0, :, 2].isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_boxes_are_the_same_bytes_however_the_keys_came(dtype):
    whole = make_scene([45], statistics=BOX, dtype=dtype)
    parts = make_scene([45], statistics=BOX, dtype=dtype, filled=False)
    for start, end in [(0, 1), (1, 9), (9, 30), (30, 31), (31, 45)]:
        parts.append(0, start, end)
    pages = whole.block_table[0, :3].long()
    for name in ("statistics", "scales"):
        assert torch.equal(*(getattr(x.cache, name)[pages] for x in (whole, parts)))
