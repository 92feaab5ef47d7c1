"""The compiled append against the reference, bit for bit where nothing is summed."""

import pytest
import torch
from reference.scene import make_scene
from reference.test_append import KINDS, keys_to_bound
from reference.test_codes import KINDS as CODED_KINDS
from reference.test_codes import keys_to_code

from entmaxkv_kernels import Counter, PageLayout, allocate_pages, reference, split_pages
from entmaxkv_kernels.pages import BOX, CODES
from entmaxkv_kernels.triton.append import append

from .device import DEVICE, DTYPES, on_device

STATISTICS = [(), ("mean", "std"), BOX, CODES]


def append_to_both(scene, cache, key, value, slots):
    """And see that both count the pages that were written to."""
    pages = {slot // scene.page_size for slot in slots.tolist() if slot >= 0}
    counted = torch.zeros(len(Counter), dtype=torch.int64)
    counted[Counter.APPENDED_PAGES] = len(pages) * key.shape[1]
    counters = torch.zeros_like(counted), torch.zeros_like(counted).to(DEVICE)
    reference.append(scene.cache, key, value, slots, counters=counters[0])
    tensors = key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE)
    append(cache, *tensors, counters=counters[1])
    assert torch.equal(counters[0], counted) and torch.equal(counters[1].cpu(), counted)


def assert_same(scene, cache):
    """Equal everywhere, poison included; means and deviations up to the order of their sums."""
    expected, actual = scene.cache, PagedCacheOnHost(cache)
    assert torch.equal(expected.key.nan_to_num(7e3), actual.key)
    assert torch.equal(expected.value.nan_to_num(7e3), actual.value)
    tolerance = 0.0 if cache.layout.bounded else torch.finfo(cache.key.dtype).eps
    torch.testing.assert_close(
        actual.statistics, expected.statistics.nan_to_num(7e3), rtol=tolerance, atol=1e-6
    )
    assert torch.equal(actual.scales, expected.scales.nan_to_num(7e3))


class PagedCacheOnHost:
    def __init__(self, cache):
        parts = (x.cpu().nan_to_num(7e3) for x in cache[:4])
        self.key, self.value, self.statistics, self.scales = parts


@pytest.mark.parametrize("statistics", STATISTICS, ids=lambda names: " and ".join(names) or "none")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size, head_size", [(16, 80), (32, 64), (64, 96)])
def test_chunks_of_several_sequences_give_the_pages_of_the_reference(
    statistics, dtype, page_size, head_size
):
    lengths = [1, 15, 16, 17, 70, 130]
    scene = make_scene(
        lengths,
        page_size=page_size,
        head_size=head_size,
        statistics=statistics,
        dtype=dtype,
        filled=False,
    )
    cache = on_device(scene.cache)
    filled = [0] * len(lengths)
    for step in (13, 1, 1, 20, 100):
        ends = [min(n, start + step) for start, n in zip(filled, lengths, strict=True)]
        chunks = [*zip(range(len(lengths)), filled, ends, strict=True)]
        append_to_both(
            scene,
            cache,
            torch.cat([scene.key[b][start:end] for b, start, end in chunks]),
            torch.cat([scene.value[b][start:end] for b, start, end in chunks]),
            torch.cat([scene.slots(*chunk) for chunk in chunks]),
        )
        assert_same(scene, cache)
        filled = ends


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "infinite and no number"])
def test_boxes_are_those_of_the_reference_whatever_the_keys_are(kind, dtype):
    random = torch.Generator().manual_seed(7)
    layout = PageLayout(16, 32, BOX)
    expected = split_pages(allocate_pages(6, 4, layout, dtype), layout)
    actual = split_pages(allocate_pages(6, 4, layout, dtype, DEVICE), layout)
    for page in range(6):
        key = keys_to_bound(kind if kind in KINDS else "normal", random).to(dtype)
        if kind not in KINDS:
            key[3, 0, 7], key[4, 1, 8], key[:, 2, 9] = torch.inf, -torch.inf, torch.nan
        slots = 16 * page + torch.arange(16)
        reference.append(expected, key, key, slots)
        append(actual, key.to(DEVICE), key.to(DEVICE), slots.to(DEVICE))
    assert torch.equal(actual.scales.cpu(), expected.scales)
    assert torch.equal(actual.statistics.cpu(), expected.statistics)


@pytest.mark.parametrize(
    "head_size, dtype, kind",
    [(64, torch.float32, kind) for kind in (*CODED_KINDS, "infinite and no number")]
    + [(80, torch.float16, "all lengths"), (112, torch.float32, "one long")]
    + [(size, dtype, "normal") for size in (128, 256) for dtype in DTYPES],
)
def test_codes_are_those_of_the_reference_whatever_the_keys_are(head_size, dtype, kind):
    random = torch.Generator().manual_seed(7)
    layout = PageLayout(16, head_size, CODES)
    expected = split_pages(allocate_pages(4, 4, layout, dtype), layout)
    actual = split_pages(allocate_pages(4, 4, layout, dtype, DEVICE), layout)
    for page, rows in enumerate((16, 16, 7, 1)):
        key = keys_to_code(kind if kind in CODED_KINDS else "normal", head_size, random)
        key = key[:rows].to(dtype)
        if kind not in CODED_KINDS:
            key[0, 0, 7], key[-1, 1, 8], key[:, 2, 9] = torch.inf, -torch.inf, torch.nan
        slots = 16 * page + torch.arange(rows)
        reference.append(expected, key, key, slots)
        append(actual, key.to(DEVICE), key.to(DEVICE), slots.to(DEVICE))
    assert torch.equal(actual.scales.cpu(), expected.scales)
    assert torch.equal(actual.statistics.cpu(), expected.statistics)


def test_long_prompts_are_written_in_blocks():
    lengths = [1, 1100, 70]
    scene = make_scene(lengths, statistics=("mean", "std"), dtype=torch.float16, filled=False)
    cache = on_device(scene.cache)
    slots = torch.cat([scene.slots(b, 0, n) for b, n in enumerate(lengths)])
    append_to_both(scene, cache, torch.cat(scene.key), torch.cat(scene.value), slots)
    assert_same(scene, cache)


def test_negative_slots_are_skipped():
    scene = make_scene([40], statistics=("mean", "std"), dtype=torch.float32, filled=False)
    cache = on_device(scene.cache)
    slots = scene.slots(0, 0, 40)
    slots[21:] = -1
    append_to_both(scene, cache, scene.key[0], scene.value[0], slots)
    assert_same(scene, cache)
    append_to_both(scene, cache, scene.key[0], scene.value[0], torch.full_like(slots, -1))
    append_to_both(scene, cache, scene.key[0][:0], scene.value[0][:0], slots[:0])
    assert_same(scene, cache)


def test_keys_and_values_may_be_parts_of_one_projection():
    scene = make_scene([37], dtype=torch.float16, statistics=("mean", "std"), filled=False)
    cache = on_device(scene.cache)
    joint = torch.cat((scene.key[0], scene.value[0]), 1)  # [tokens, 2 * kv_heads, head_size]
    append_to_both(scene, cache, joint[:, :2], joint[:, 2:], scene.slots(0, 0, 37))
    assert_same(scene, cache)
