"""Dense causal entmax over pages, against naive attention in float64."""

import importlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entmaxkv_kernels import Exact, prefill

from .scene import assert_close, make_scene

# The package exports the function under the module's name.
implementation = importlib.import_module("entmaxkv_kernels.reference.prefill")

ALPHAS = [1.0, 1.25, 4 / 3, 1.5, 1.8, 2.0]
alphas = pytest.mark.parametrize("alpha", ALPHAS, ids=[f"alpha {a:.4g}" for a in ALPHAS])


def assert_prefill(scene, query_lens=None, **options):
    expected = scene.dense_prefill(query_lens, **options)
    if "slopes" in options:
        options["alibi_slopes"] = options.pop("slopes")
    if "window" in options:
        options["sliding_window"] = options.pop("window")
    for actual, wanted in zip(scene.prefill(query_lens, **options), expected, strict=True):
        assert_close(actual, wanted)


@alphas
@pytest.mark.parametrize("page_size", [16, 32, 64], ids="page size {}".format)
def test_ragged_batches_match_dense_attention(alpha, page_size):
    lengths = [1, page_size - 1, page_size, page_size + 1, 3 * page_size + 5]
    assert_prefill(make_scene(lengths, page_size=page_size), alpha=alpha)


@alphas
def test_alibi_and_a_sliding_window_match_dense_attention(alpha):
    scene = make_scene([1, 40, 77], group=3)
    slopes = torch.tensor([0.5, 0.0, -0.25, 0.0625, 0.01, 1.0])
    assert_prefill(scene, alpha=alpha, slopes=slopes)
    for window in (1, 16, 33, 1000):
        assert_prefill(scene, alpha=alpha, window=window)
        assert_prefill(scene, alpha=alpha, window=window, slopes=slopes)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8], ids="{} query heads per KV head".format)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256], ids="head size {}".format)
def test_head_groups_and_head_sizes_match_dense_attention(group, head_size):
    scene = make_scene([23, 50], group=group, head_size=head_size)
    assert_prefill(scene, alpha=1.5)


def test_each_query_head_can_have_its_own_alpha():
    scene = make_scene([5, 40], kv_heads=2, group=3)
    assert_prefill(scene, alpha=[1.0, 1.5, 2.0, 4 / 3, 1.5, 1.7])


@pytest.mark.parametrize("window", [None, 21], ids=["no window", "window 21"])
@pytest.mark.parametrize("alpha", [1.5, [1.0, 1.5, 2.0, 4 / 3]], ids=["one alpha", "mixed alphas"])
def test_tiles_of_few_heads_and_queries_give_the_same(monkeypatch, window, alpha):
    monkeypatch.setattr(implementation, "TILE_ELEMENTS", 500)
    monkeypatch.setattr(implementation, "MIN_QUERY_BLOCK", 3)
    scene = make_scene([1, 30, 101], kv_heads=2)
    slopes = torch.tensor([0.1, 0.0, 0.02, 1.0])
    assert_prefill(scene, alpha=alpha, window=window, slopes=slopes)
    assert_prefill(scene, [1, 17, 40], alpha=alpha, window=window, slopes=slopes)


def test_a_chunk_may_be_any_tail_of_its_sequence_even_empty():
    scene = make_scene([10, 33, 64, 7])
    assert_prefill(scene, [10, 1, 20, 0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 90),
    cuts=st.lists(st.integers(1, 89), max_size=4),
    alpha=st.sampled_from(ALPHAS),
    window=st.sampled_from([None, 13]),
)
def test_chunks_of_any_size_give_what_one_prefill_gives(length, cuts, alpha, window):
    scene = make_scene([length], filled=False)
    bounds = sorted({0, length, *(cut for cut in cuts if cut < length)})
    options = {"scale": scene.scale, "alpha": alpha, "sliding_window": window}
    parts = []
    for start, end in pairwise(bounds):
        scene.append(0, start, end)
        parts.append(
            prefill(
                scene.query[0][start:end],
                scene.cache,
                scene.block_table,
                torch.tensor([end]),
                torch.tensor([0, end - start]),
                **options,
            )
        )
    assert_close(torch.cat(parts), scene.prefill(alpha=alpha, sliding_window=window)[0])


@alphas
def test_decoding_token_by_token_gives_what_prefill_gives(alpha):
    scene = make_scene([37, 20], filled=False, statistics=("mean", "std"))
    rows = []
    for position in range(37):
        ends = [position + 1, min(position + 1, 20)]
        for b, end in enumerate(ends):
            if end == position + 1:
                scene.append(b, position, end)
        step = make_step(scene, ends)
        rows.append(step.decode(alpha=alpha, selector=Exact()))
    decoded = torch.stack(rows)
    first, second = scene.prefill(alpha=alpha)
    assert_close(decoded[:, 0], first)
    assert_close(decoded[:20, 1], second)


def make_step(scene, ends):
    """The scene as it was when its sequences had these lengths."""
    query = [q[:end] for q, end in zip(scene.query, ends, strict=True)]
    return replace(scene, query=query, seq_lens=torch.tensor(ends))


def test_tokens_outside_every_chunk_are_left_alone():
    scene = make_scene([30])
    query = torch.cat((scene.query[0], scene.query[0][:5]))
    arguments = query, scene.cache, scene.block_table, scene.seq_lens, torch.tensor([0, 30])
    out = torch.full_like(query, 7.0)
    returned = prefill(*arguments, scale=scene.scale, alpha=1.5, out=out)
    assert returned is out
    assert_close(out[:30], scene.dense_prefill(alpha=1.5)[0])
    assert (out[30:] == 7).all()
    fresh = prefill(*arguments, scale=scene.scale, alpha=1.5)
    assert (fresh[30:] == 0).all()


def test_pages_before_the_window_are_never_read():
    scene = make_scene([100])
    scene.block_table[0, :4] = 10**8  # given back by the engine: positions 0 to 63
    (out,) = scene.prefill([10], sliding_window=20)
    assert_close(out, scene.dense_prefill([10], alpha=1.5, window=20)[0])


def test_a_batch_without_sequences_gives_nothing():
    scene = make_scene([3])
    empty = torch.zeros(0, dtype=torch.int32)
    out = prefill(
        scene.query[0][:0],
        scene.cache,
        scene.block_table[:0],
        empty,
        torch.zeros(1, dtype=torch.int32),
        scale=1.0,
        alpha=1.5,
    )
    assert out.shape == (0, 4, 64)
