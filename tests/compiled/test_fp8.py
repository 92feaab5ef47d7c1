"""fp8 caches, compiled: stored bit for bit as by the reference, attended to as by it."""

import math
from importlib import import_module

import pytest
import torch
from reference.scene import make_fp8_scene

import entmaxkv_kernels as kernels
from entmaxkv_kernels import Counter, Exact, Gaussian, TopK
from entmaxkv_kernels.triton import decode_workspace_size, prefill_workspace_size
from entmaxkv_kernels.triton.decode import step_shape

from .device import DEVICE, DTYPES, on_device

FP8 = torch.float8_e4m3fn
SCALES = {"key_scale": 0.07, "value_scale": 0.009}
MATCHED = [x for x in Counter if x not in (Counter.SUPPORT, Counter.FALLBACKS)]
MIXED = torch.tensor([1.25, 1.5, 1.0, 4 / 3], dtype=torch.float64)
SLOPES = torch.tensor([0.5, 0.0, 0.05, 0.004])

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_close(actual, expected):
    """Outputs are below 4."""
    tolerance = {torch.float32: 2e-5}.get(actual.dtype, 8 * torch.finfo(actual.dtype).eps)
    difference = (actual.cpu() - expected).double().abs()
    assert not difference.isnan().any()
    assert difference.max() <= tolerance


def on_host(options):
    return {**SCALES, **options, "implementation": "reference"}


def on_chip(options):
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return {**SCALES, **moved, "implementation": "triton"}


def poisoned(size):
    return torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)


def shape_of(scene, selector):
    query, table = scene.last_queries.to(DEVICE), scene.block_table.to(DEVICE)
    return step_shape(query, scene.cache, table, selector, 0)


def check_decode(scene, selector, workspace=None, **options):
    """Output and counters are the reference's; returns the numbers of pages read and held."""
    options = {"scale": scene.scale, "alpha": 1.5, "selector": selector} | options
    query, context = scene.last_queries, (scene.cache, scene.block_table, scene.seq_lens)
    counters = torch.zeros(2, len(Counter), dtype=torch.int64)
    expected = kernels.decode(query, *context, **on_host(options), counters=counters[0])
    cache, context = on_device(scene.cache), [x.to(DEVICE) for x in context[1:]]
    query, compiled = query.to(DEVICE), counters[1].to(DEVICE)
    out = torch.full_like(query, torch.nan)
    if workspace is None:
        workspace = poisoned(shape_of(scene, selector).good_size)
    options = on_chip(options) | {"workspace": workspace, "counters": compiled}
    kernels.decode(query, cache, *context, **options, out=out)
    assert_close(out, expected)
    assert torch.equal(compiled.cpu()[MATCHED], counters[0][MATCHED])
    return counters[0][Counter.PAGES_READ], counters[0][Counter.PAGES_HELD]


def check_prefill(scene, query_lens, **options):
    options = {"scale": scene.scale, "alpha": 1.5} | options
    query = torch.cat([q[len(q) - n :] for q, n in zip(scene.query, query_lens, strict=True)])
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    context = scene.cache, scene.block_table, scene.seq_lens, starts
    expected = kernels.prefill(query, *context, **on_host(options))
    query, cache = query.to(DEVICE), on_device(scene.cache)
    context = [x.to(DEVICE) for x in context[1:]]
    out = torch.full_like(query, torch.nan)
    kernels.prefill(
        query, cache, *context, **on_chip(options), workspace=poisoned(1 << 18), out=out
    )
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "statistics",
    [(), ("mean", "std"), ("center", "half_width")],
    ids=lambda s: " and ".join(s) or "none",
)
def test_pages_are_those_of_the_reference(statistics, dtype):
    # A multiplication by the reciprocal of this scale would be seen.
    scales = SCALES | {"key_scale": 0.77}
    scene = make_fp8_scene([40], statistics=statistics, head_size=80, dtype=torch.float32, **scales)
    cache = on_device(scene.cache)
    random = torch.Generator().manual_seed(0)
    shape = 2, 37, 2, 80
    magnitude = 10 ** (6 * torch.rand(shape, generator=random) - 3)
    key, value = (magnitude * torch.randn(shape, generator=random)).to(dtype)
    value[3, 1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    numbers = torch.arange(81).to(torch.uint8).view(FP8).float()
    key[7] = scales["key_scale"] * (numbers[1:] + numbers[:-1]) / 2  # where rounding has to choose
    slots = scene.slots(0, 0, 37)
    for chunk in (slice(0, 5), slice(5, 6), slice(6, 37)):
        inputs = key[chunk], value[chunk], slots[chunk]
        kernels.append(scene.cache, *inputs, **scales)
        inputs = [x.to(DEVICE) for x in inputs]
        kernels.append(cache, *inputs, **scales, implementation="triton")
    assert (scene.cache.key.float().abs() == 448).any()
    for stored, expected in zip(cache[:2], scene.cache[:2], strict=True):
        # Of a NaN, bf16 inputs may change the sign.
        assert torch.equal(stored.cpu().float().nan_to_num(500), expected.float().nan_to_num(500))
    tolerance = torch.finfo(torch.bfloat16).eps if "mean" in statistics else 0.0
    kept, expected = cache.statistics.cpu().float(), scene.cache.statistics.float()
    torch.testing.assert_close(kept, expected, rtol=tolerance, atol=0.0, equal_nan=True)
    assert torch.equal(cache.scales.cpu().nan_to_num(), scene.cache.scales.nan_to_num())


@pytest.mark.parametrize("alpha", [1.5, 1.0, 1.2], ids="alpha {}".format)
@dtypes
def test_exact_decode_gives_what_the_reference_gives(dtype, alpha):
    check_decode(make_fp8_scene([0, 1, 17, 150], dtype=dtype, **SCALES), Exact(), alpha=alpha)


@pytest.mark.parametrize(
    "kv_heads, group, head_size, page_size", [(1, 3, 80, 32), (1, 6, 96, 64), (2, 1, 256, 16)]
)
@dtypes
def test_every_shape_of_heads_and_pages_is_served(dtype, kv_heads, group, head_size, page_size):
    shape = {"kv_heads": kv_heads, "group": group, "head_size": head_size, "dtype": dtype}
    scene = make_fp8_scene([page_size - 1, 130], page_size=page_size, **shape, **SCALES)
    check_decode(scene, Exact())
    check_prefill(scene, [3, 5])


@pytest.mark.parametrize("alpha", [1.5, 1.0], ids="alpha {}".format)
@pytest.mark.parametrize(
    "selector",
    [TopK(64), Gaussian(), TopK(64, codes=True)],
    ids=lambda selector: f"{selector.name}-by-{selector.statistics[-1]}",
)
@dtypes
def test_sparse_decode_reads_the_pages_of_the_reference(dtype, selector, alpha):
    if alpha == 1 and isinstance(selector, Gaussian):
        pytest.skip("softmax has no threshold to estimate")
    options = {"statistics": selector.statistics, "coherence": 0.8, "spread": 4.0}
    scene = make_fp8_scene([0, 1, 17, 300], dtype=dtype, **options, **SCALES)
    read, held = check_decode(scene, selector, alpha=alpha)
    assert read < held


def test_heads_have_their_own_alpha_and_slope_and_see_a_window():
    scene = make_fp8_scene([5, 150], dtype=torch.float32, **SCALES)
    options = {"alpha": MIXED, "alibi_slopes": SLOPES, "sliding_window": 37}
    check_decode(scene, Exact(), **options)
    check_prefill(scene, [5, 40], **options)


@dtypes
def test_lists_that_overflow_are_made_up_for(dtype, monkeypatch):
    monkeypatch.setattr(
        import_module("entmaxkv_kernels.triton.decode"), "processors", lambda device: 1
    )
    scene = make_fp8_scene([600, 1], kv_heads=1, dtype=dtype, spread=0.05, **SCALES)
    shape = shape_of(scene, Exact())
    workspace = poisoned(shape.least_size)
    check_decode(scene, Exact(), workspace)
    parts = shape.divide(workspace, shape.capacity(shape.least_size))
    assert (parts["state"][:2] == 1).all()


@pytest.mark.parametrize("alpha", [1.5, 1.0, 4 / 3], ids="alpha {:.3g}".format)
@dtypes
def test_prefill_gives_what_the_reference_gives(dtype, alpha):
    scene = make_fp8_scene([1, 17, 150], kv_heads=1, dtype=dtype, **SCALES)
    check_prefill(scene, [1, 17, 90], alpha=alpha)


def test_workspaces_are_as_large_as_the_launches_take_them_to_be():
    heads = {"query_heads": 32, "kv_heads": 8, "head_size": 128}
    options = heads | {"dtype": FP8, "max_tokens": 1 << 17, "device": "cpu"}
    size = decode_workspace_size(1, **options, page_size=16, selector=Exact())
    shape = {"kv_heads": 8, "group": 4, "head_size": 128, "dtype": torch.float16}
    scene = make_fp8_scene([1], **shape, **SCALES)
    scene.block_table = torch.zeros(1, (1 << 17) // 16, dtype=torch.int32)
    assert size == shape_of(scene, Exact()).good_size
    half = prefill_workspace_size(**options | {"dtype": torch.float16})
    assert prefill_workspace_size(**options) == half
