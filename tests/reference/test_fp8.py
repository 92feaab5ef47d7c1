"""fp8 caches: what they store, and attention over it against naive attention in float64."""

import math
from itertools import pairwise

import pytest
import torch

from entmaxkv_kernels import (
    Exact,
    Gaussian,
    PageLayout,
    TopK,
    allocate_pages,
    analyze_decode,
    append,
    decode,
    prefill,
    split_pages,
)
from entmaxkv_kernels.pages import BOX

from .scene import assert_close, make_fp8_scene, make_scene
from .test_append import assert_box, expected_moments

FP8 = torch.float8_e4m3fn
SCALES = {"key_scale": 0.07, "value_scale": 0.009}
RAGGED = [1, 15, 16, 17, 70]
ALL_PAGES = [Exact(), Gaussian(excess_fraction=1e6, safety=1e6, narrow_safety=1e6), TopK(10**6)]

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
statistics = pytest.mark.parametrize("statistics", [("mean", "std"), BOX], ids=" and ".join)


def tolerance_of(dtype):
    """Rounding of outputs below 4, and fp32 arithmetic."""
    return 2 * torch.finfo(dtype).eps + 1e-5


def one_page(head_size=8, statistics=()):
    layout = PageLayout(16, head_size, statistics, fp8=True)
    return split_pages(allocate_pages(1, 1, layout), layout)


@dtypes
@pytest.mark.parametrize("scale", [1.0, 0.3, 7.0], ids="scale {}".format)
def test_a_number_is_stored_as_the_fp8_number_nearest_to_its_quotient(dtype, scale):
    cache = one_page(head_size=256)
    random = torch.Generator().manual_seed(0)
    shape = 16, 1, 256
    magnitude = 10 ** (6 * torch.rand(shape, generator=random) - 3)
    key = (scale * magnitude * torch.randn(shape, generator=random)).to(dtype)
    append(cache, key, -key, torch.arange(16), key_scale=scale, value_scale=scale)
    numbers = torch.arange(256).to(torch.uint8).view(FP8).double()
    numbers = numbers[~numbers.isnan()]
    quotient = key.double() / scale
    least = (quotient[..., None] - numbers).abs().amin(-1)
    for stored, sign in ((cache.key, 1), (cache.value, -1)):
        error = (stored[0].transpose(0, 1).double() - sign * quotient).abs()
        assert (error <= least + 1e-6 * quotient.abs()).all()
    assert (quotient.abs() > 464).any() and (quotient.abs() < 2**-6).any()


def test_what_is_out_of_range_is_saturated_and_what_is_no_number_stays_none():
    cache = one_page()
    key = torch.tensor([447.0, 449.0, 1e30, -1e30, math.inf, -math.inf, math.nan, 0.0])
    append(cache, key.view(1, 1, 8), key.view(1, 1, 8), torch.tensor([3]))
    expected = torch.tensor([448.0, 448.0, 448.0, -448.0, 448.0, -448.0, math.nan, 0.0])
    for stored in (cache.key, cache.value):
        assert torch.equal(stored[0, 0, 3].float().nan_to_num(7e3), expected.nan_to_num(7e3))


@statistics
@dtypes
def test_statistics_are_those_of_the_stored_numbers_rounded_once(statistics, dtype):
    scene = make_fp8_scene(RAGGED, statistics=statistics, dtype=dtype, **SCALES)
    boxed = scene.cache.layout.bounded
    assert scene.cache.statistics.dtype == (torch.int8 if boxed else torch.bfloat16)
    for b, length in enumerate(RAGGED):
        for page in range(-(-length // 16)):
            own = scene.key[b][page * 16 : min(length, (page + 1) * 16)] / SCALES["key_scale"]
            kept = scene.cache.read_statistics(scene.block_table[b, page], torch.float64)
            if boxed:
                assert_box(kept, own.float())
                continue
            expected = expected_moments(own)
            unit = torch.finfo(torch.bfloat16).eps / 2 * expected.abs() + 1e-5
            assert ((kept - expected).abs() <= unit + 1e-12).all()


@statistics
def test_chunks_give_what_one_append_gives_and_what_is_stored_is_stored_again(statistics):
    scene = make_fp8_scene([45], statistics=statistics, dtype=torch.float32, **SCALES)
    layout, shape = scene.cache.layout, scene.cache.key.shape
    cache = split_pages(allocate_pages(*shape[:2], layout), layout)
    for start, end in pairwise([0, 3, 4, 20, 45]):
        key, value = scene.key[0][start:end].float(), scene.value[0][start:end].float()
        append(cache, key, value, scene.slots(0, start, end), **SCALES)
    pages = scene.block_table[0, :3].long()
    assert torch.equal(cache.statistics[pages], scene.cache.statistics[pages])
    assert torch.equal(cache.scales[pages], scene.cache.scales[pages])
    for stored, expected in ((cache.key, scene.cache.key), (cache.value, scene.cache.value)):
        assert torch.equal(stored[pages].float(), expected[pages].float().nan_to_num())


def test_the_least_deviation_survives_in_bf16():
    cache = one_page(statistics=("mean", "std"))
    append(cache, torch.full((5, 1, 8), 3.7), torch.zeros(5, 1, 8), torch.arange(5))
    expected = torch.tensor(1e-6).bfloat16()
    assert (cache.statistics[0, 0, 1] == expected).all()
    assert (cache.statistics[0, 0, 0] == 3.75).all()


@dtypes
@pytest.mark.parametrize("alpha", [1.0, 1.5, 4 / 3], ids="alpha {:.3g}".format)
@pytest.mark.parametrize("selector", ALL_PAGES, ids=lambda selector: selector.name)
def test_decode_of_all_pages_is_exact_over_what_the_cache_holds(selector, alpha, dtype):
    if alpha == 1 and isinstance(selector, Gaussian):
        pytest.skip("softmax has no threshold to estimate")
    options = {"statistics": selector.statistics, "dtype": dtype}
    scene = make_fp8_scene([0, *RAGGED], **options, **SCALES)
    out = scene.decode(alpha=alpha, selector=selector, **SCALES)
    assert out.dtype == dtype
    assert_close(out, scene.dense_decode(alpha=alpha), tolerance_of(dtype))


@dtypes
@pytest.mark.parametrize("alpha", [1.0, 1.5], ids="alpha {}".format)
def test_prefill_is_exact_over_what_the_cache_holds(alpha, dtype):
    scene = make_fp8_scene(RAGGED, dtype=dtype, **SCALES)
    lengths = [1, 15, 3, 17, 33]
    chunks = scene.prefill(lengths, alpha=alpha, **SCALES)
    for chunk, expected in zip(chunks, scene.dense_prefill(lengths, alpha=alpha), strict=True):
        assert chunk.dtype == dtype
        assert_close(chunk, expected, tolerance_of(dtype))


def test_slopes_are_not_scaled_and_windows_are_seen():
    scene = make_fp8_scene([70, 33], dtype=torch.float32, **SCALES)
    alpha, slopes = [1.25, 1.5, 2.0, 1.0], torch.tensor([0.5, 0.0, 0.05, 0.004])
    exact = {"alpha": alpha, "slopes": slopes, "window": 21}
    options = {"alpha": alpha, "alibi_slopes": slopes, "sliding_window": 21}
    out = scene.decode(selector=Exact(), **options, **SCALES)
    assert_close(out, scene.dense_decode(**exact), 1e-5)
    for chunk, expected in zip(
        scene.prefill(**options, **SCALES), scene.dense_prefill(**exact), strict=True
    ):
        assert_close(chunk, expected, 1e-5)


@pytest.mark.parametrize("selector", [Gaussian(), TopK(64)], ids=lambda selector: selector.name)
def test_the_pages_are_those_of_a_wide_cache_of_the_same_keys(selector):
    options = {"statistics": selector.statistics, "coherence": 0.8, "spread": 4.0}
    fp8 = make_fp8_scene([700, 300], dtype=torch.float32, **options, **SCALES)
    wide = make_scene([700, 300], dtype=torch.float64, filled=False, **options)
    wide.key, wide.value = fp8.key, fp8.value
    wide.append_all()
    reports = [
        analyze_decode(
            fp8.last_queries.to(scene.query[0].dtype),
            scene.cache,
            scene.block_table,
            scene.seq_lens,
            scale=scene.scale,
            alpha=1.5,
            selector=selector,
            **scales,
        )
        for scene, scales in ((fp8, SCALES), (wide, {}))
    ]
    differ = (reports[0].selected != reports[1].selected).float().mean()
    # Means and deviations are bf16 in one and fp64 in the other; extremes are the same numbers.
    assert differ <= (0.02 if isinstance(selector, Gaussian) else 0.0)
    assert not reports[0].selected.all()
    assert_close(reports[0].tau, reports[1].tau, 1e-5)


def test_the_parts_tile_an_fp8_page_and_its_moments_are_bf16():
    layout = PageLayout(32, 80, ("mean", "std"), fp8=True)
    assert layout.elements_per_page == 2 * 32 * 80 + 4 * 80
    assert layout.elements_per_token == 170
    pages = allocate_pages(2, 3, layout).transpose(0, 1)
    cache = split_pages(pages, layout)
    cache.key.fill_(1), cache.value.fill_(2), cache.statistics.fill_(3)
    assert cache.statistics.dtype == torch.bfloat16
    assert cache.statistics.shape == (3, 2, 2, 80)
    key, value, rest = pages.reshape(3, 2, -1).split([32 * 80, 32 * 80, 4 * 80], -1)
    assert (key.float() == 1).all() and (value.float() == 2).all()
    assert (rest.contiguous().view(torch.bfloat16) == 3).all()


def test_a_box_is_of_8_bits_in_an_fp8_page():
    layout = PageLayout(32, 80, BOX, fp8=True)
    # Keys, values, box, scales and radius, padded to a multiple of 128 bytes.
    assert layout.elements_per_page == 2 * 32 * 80 + 2 * 80 + 12 + 84
    cache = split_pages(allocate_pages(2, 3, layout).transpose(0, 1), layout)
    assert cache.statistics.dtype == torch.int8
    assert cache.statistics.shape == (3, 2, 2, 80)
    assert cache.scales.shape == (3, 2, 3)


def test_pages_of_another_dtype_than_the_layout_are_refused():
    plain, fp8 = PageLayout(16, 64), PageLayout(16, 64, fp8=True)
    pages = torch.zeros(3, 2, 16, 128)
    with pytest.raises(TypeError, match=r"pages has dtype torch.float32; expected torch.float8_e4"):
        split_pages(pages, fp8)
    with pytest.raises(TypeError, match=r"pages has dtype torch.float8_e4m3fn; expected a layout "):
        split_pages(pages.to(FP8), plain)
    with pytest.raises(TypeError, match=r"pages has dtype torch.bfloat16; expected torch.float8_e"):
        allocate_pages(3, 2, fp8, torch.bfloat16)


def test_pages_whose_statistics_would_not_be_aligned_are_refused():
    layout = PageLayout(16, 64, ("mean", "std"), fp8=True)
    memory = torch.zeros(layout.elements_per_page + 1, dtype=FP8)[1:]
    with pytest.raises(ValueError, match=r"pages has storage offset 1 .* expected multiples of 2"):
        split_pages(memory.view(1, 1, 16, -1), layout)


def test_a_page_has_to_be_whole_elements_per_token_with_wide_statistics():
    with pytest.raises(ValueError, match=r"expected a divisor of the 4 \* 9 statistics elements"):
        PageLayout(16, 9, ("mean", "std"), fp8=True)


def calls(scene, dtype=None):
    """Every public function on a scene, as functions of changed arguments."""
    dtype = dtype or scene.query[0].dtype
    context = scene.cache, scene.block_table, scene.seq_lens
    query, options = scene.last_queries.to(dtype), {"scale": scene.scale, "alpha": 1.5}
    new = torch.zeros(1, 2, 64, dtype=dtype)
    return {
        "append": lambda **changes: append(
            **{"cache": scene.cache, "key": new, "value": new, "slot_mapping": torch.tensor([0])}
            | changes
        ),
        "prefill": lambda **changes: prefill(
            query, *context, torch.arange(len(query) + 1), **options | changes
        ),
        "decode": lambda **changes: decode(
            query, *context, **options | {"selector": Exact()} | changes
        ),
        "analyze_decode": lambda **changes: analyze_decode(
            query, *context, **options | {"selector": Exact()} | changes
        ),
    }


each_call = pytest.mark.parametrize("call", ["append", "prefill", "decode", "analyze_decode"])


@each_call
@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
def test_a_scale_that_cannot_be_is_refused(call, name):
    function = calls(make_fp8_scene([20], dtype=torch.float32, **SCALES))[call]
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"{name} is {scale}; expected a finite number above"):
            function(**{name: scale})
    with pytest.raises(TypeError, match=rf"{name} is a Tensor; expected a float"):
        function(**{name: torch.tensor(0.5)})


@each_call
@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
def test_a_scale_of_a_cache_that_is_not_fp8_is_refused(call, name):
    function = calls(make_scene([20], dtype=torch.float32))[call]
    function(**{name: 1.0})
    with pytest.raises(ValueError, match=rf"{name} is 0.5; expected 1 with a cache of dtype torch"):
        function(**{name: 0.5})


@each_call
def test_fp8_and_double_precision_do_not_go_into_or_over_an_fp8_cache(call):
    scene = make_fp8_scene([20], dtype=torch.float32, **SCALES)
    for dtype in (FP8, torch.float64):
        with pytest.raises(TypeError, match=rf"has dtype {dtype}; expected torch.float16 or torch"):
            calls(scene, dtype)[call]()


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_an_output_has_the_dtype_of_the_query(call):
    scene = make_fp8_scene([20], dtype=torch.float16, **SCALES)
    with pytest.raises(TypeError, match=r"out has dtype torch.float32; expected torch.float16"):
        calls(scene)[call](out=torch.zeros(1, 4, 64))
