"""Writing tokens into pages, and the statistics that are kept of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entmaxkv_kernels import append

from .scene import assert_close, make_scene

STATISTICS = [("mean", "std"), ("minimum", "maximum")]
statistics = pytest.mark.parametrize("statistics", STATISTICS, ids=" and ".join)


def expected_statistics(key, names):
    """Of one page's own keys [tokens, kv_heads, head_size]: [kv_heads, 2, head_size]."""
    key = key.double()
    if names == ("mean", "std"):
        both = key.mean(0), key.std(0, correction=0).clamp_min(1e-6)
    else:
        both = key.amin(0), key.amax(0)
    return torch.stack(both, 1)


def assert_statistics(scene, lengths, tolerance=1e-12):
    size, names = scene.page_size, scene.cache.layout.statistics
    for b, length in enumerate(lengths):
        for page in range(-(-length // size)):
            own = scene.key[b][page * size : min(length, (page + 1) * size)]
            kept = scene.cache.statistics[scene.block_table[b, page]]
            assert_close(kept, expected_statistics(own, names), tolerance)


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
        size, names = scene.page_size, statistics
        for page in range(-(-end // size)):
            own = scene.key[1][page * size : min(end, (page + 1) * size)]
            kept = scene.cache.statistics[scene.block_table[1, page]]
            assert_close(kept, expected_statistics(own, names), 1e-12)


def test_equal_keys_have_the_least_standard_deviation():
    scene = make_scene([21], statistics=("mean", "std"), filled=False)
    scene.key[0][:] = 3.7
    scene.append_all()
    kept = scene.cache.statistics[scene.block_table[0, :2].long()]
    assert_close(kept[:, :, 0], torch.full_like(kept[:, :, 0], 3.7), 1e-14)
    assert_close(kept[:, :, 1], torch.full_like(kept[:, :, 1], 1e-6), 1e-20)


@statistics
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_are_rounded_once(statistics, dtype):
    scene = make_scene([16, 37], statistics=statistics, dtype=dtype)
    for b, length in enumerate([16, 37]):
        for page in range(-(-length // 16)):
            own = scene.key[b][page * 16 : min(length, (page + 1) * 16)]
            expected = expected_statistics(own, statistics)
            kept = scene.cache.statistics[scene.block_table[b, page]].double()
            # Half a unit in the last place of the stored value, and the float32 arithmetic.
            unit = torch.finfo(dtype).eps / 2 * expected.abs() + 4e-7
            assert ((kept - expected).abs() <= unit).all()
