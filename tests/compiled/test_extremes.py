"""Inputs at the edge of what the formats tell apart, and shapes at the edge of what is divided."""

from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from reference.scene import make_scene

from entmaxkv_kernels import Exact
from entmaxkv_kernels.triton import workspace
from entmaxkv_kernels.triton.entmax import newton_step
from entmaxkv_kernels.triton.workspace import Shape

from .device import DEVICE, Step, on_a_gpu
from .test_exact import assert_accurate
from .test_prefill import check as check_prefill
from .test_prefill import run as run_prefill

alphas = pytest.mark.parametrize("alpha", [1.5, 2.0], ids="alpha {:.3g}".format)


def chip_of(processors, monkeypatch):
    launches = import_module("entmaxkv_kernels.triton.decode")
    monkeypatch.setattr(launches, "processors", lambda device: processors)


def decode_step(scene, **options):
    return Step(scene, Exact(), **options)


def all_scores(value, lengths, *, zeros=0, alpha=1.5, dtype=torch.float32, **options):
    """A scene in which every score z is `value`, exactly if that is a power of two, but for the
    first ones, which are zeros: queries and keys have but one channel."""
    options = {"kv_heads": 1, "group": 2} | options
    scene = make_scene(lengths, dtype=dtype, filled=False, **options)
    for query, key in zip(scene.query, scene.key, strict=True):
        query[:], key[:] = 0, 0
        query[..., 0], key[zeros:, ..., 0] = 1, value / (alpha - 1) / scene.scale
    scene.append_all()
    return scene


def test_every_row_is_written_where_tiles_and_splits_divide_unevenly(monkeypatch):
    """12 splits of 14 tiles in 16 parts: some parts meet twice as many candidates as others."""
    chip_of(3, monkeypatch)
    monkeypatch.setattr(workspace, "HELD", 0)
    scene = all_scores(0.0, [1700, 1537])
    step = decode_step(scene)
    assert_accurate(step, step.run())
    assert step.scratch("near_count").max() > 128


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_a_program_holds_the_scores_of_splits_of_several_tiles(spread, monkeypatch):
    """12 splits of 3 tiles, of which the last ones have one less."""
    chip_of(3, monkeypatch)
    monkeypatch.setattr(workspace, "HELD", 8192)
    scene = make_scene([4100], kv_heads=1, dtype=torch.float32, spread=spread)
    step = decode_step(scene)
    assert step.shape.splits == 12 and step.shape.held > 4096
    assert_accurate(step, step.run())


def test_no_program_meets_more_candidates_than_are_reckoned_with():
    heads = [(1, 1), (4, 1), (8, 8), (32, 8), (64, 8), (16, 1)]
    for query_heads, kv_heads in heads:
        for batch in (1, 2, 3, 5, 7, 16, 33, 65, 176, 256):
            for tokens in (2048, 5 * 1024, 16384, 20480, 32768, 1 << 17):
                shape = Shape(
                    batch, query_heads, kv_heads, 128, 16, torch.bfloat16, tokens, processors=132
                )
                tiles = -(-tokens // shape.tile)
                met = [0] * shape.filter_parts
                splits_each = -(-shape.splits // shape.filter_parts)
                splits_each = 1 << (splits_each - 1).bit_length()
                for tile in range(tiles):
                    met[tile % shape.splits // splits_each] += shape.tile
                assert max(met) <= shape.most_near
                assert shape.near % 16 == 0


@pytest.mark.parametrize("alpha", [1.0, 1.5], ids="alpha {:.3g}".format)
def test_pages_may_be_larger_than_a_tile_of_keys(alpha):
    scene = make_scene([0, 127, 128, 300], page_size=128, head_size=128, dtype=torch.float32)
    step = decode_step(scene, alpha=alpha)
    assert_accurate(step, step.run())


@alphas
@pytest.mark.parametrize("size", ["good", "least"])
def test_equal_scores_far_from_zero_have_equal_weight(size, alpha, monkeypatch):
    """Their threshold lies closer to them than fp32 numbers lie at such a height."""
    chip_of(1, monkeypatch)
    scene = all_scores(2.0**20, [900, 1], alpha=alpha)
    step = decode_step(scene, alpha=alpha)
    out = step.run(getattr(step.shape, f"{size}_size"))
    means = torch.stack([value.double().mean(0) for value in scene.value])
    assert (out.double() - means).abs().max() <= 2e-6
    chunks = run_prefill(scene, [3, 1], alpha=alpha)
    assert (chunks[0][-1].double() - means[0]).abs().max() <= 2e-6


def test_most_of_many_scores_far_from_zero_have_equal_weight(monkeypatch):
    monkeypatch.setattr(workspace, "HELD", 8192)
    scene = all_scores(2.0**20, [2200], zeros=600)
    step = decode_step(scene)
    assert step.shape.held > 2048
    mean = scene.value[0][600:].double().mean(0)
    assert (step.run()[0].double() - mean.repeat_interleave(2, 0)).abs().max() <= 2e-6


@pytest.mark.parametrize("score", [torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [300, 2100])
def test_a_score_that_is_not_finite_shows_in_its_own_output_alone(tokens, score, monkeypatch):
    monkeypatch.setattr(workspace, "HELD", 8192)
    scene = make_scene([tokens, 90], group=1, dtype=torch.float32)
    scene.cache.key[scene.block_table[0, 3], 1, 5] = score
    out = decode_step(scene).run()
    assert out[0, 1].isnan().all()
    assert not out[0, 0].isnan().any()
    assert not out[1].isnan().any()


def test_a_key_that_is_no_number_shows_in_the_outputs_of_those_who_see_it():
    scene = make_scene([200, 20], group=1, dtype=torch.float32)
    scene.cache.key[scene.block_table[0, 3], 1, 5] = torch.nan
    first, second = run_prefill(scene)
    position = 3 * scene.page_size + 5
    assert first[position:, 1].isnan().all()
    assert not first[:position].isnan().any()
    assert not first[:, 0].isnan().any()
    assert not second.isnan().any()


@triton.jit
def step_kernel(p_sums, p_step, exponent):
    step = newton_step(tl.load(p_sums), tl.load(p_sums + 1), 1.0, exponent, 0)
    tl.store(p_step, step)


def test_a_newton_step_from_sums_at_the_end_of_the_range_of_fp32_is_finite():
    """One score 5.8 above the bound and alpha 1.02, powers of 50."""
    sums = torch.tensor([5.8**50, 5.8**49], dtype=torch.float32, device=DEVICE)
    step = torch.full((1,), torch.nan, device=DEVICE)
    step_kernel[(1,)](sums, step, 50.0)
    assert abs(step.item() - 4.8) <= 1e-5


@on_a_gpu
@pytest.mark.parametrize("tokens", [200_000, 1_500_000])
def test_small_weights_keep_their_precision_in_half_precision(tokens):
    scene = all_scores(0.5, [tokens], dtype=torch.float16, group=1)
    mean = scene.value[0].double().mean(0)
    spread = torch.finfo(torch.float16).eps * mean.abs().max() + 1e-6
    step = decode_step(scene)
    assert ((step.run(step.shape.least_size).double() - mean).abs() <= 4 * spread).all()
    (chunk,) = run_prefill(scene, [1], workspace_size=1 << 21)
    assert ((chunk.double() - mean).abs() <= 4 * spread).all()


def test_groups_may_be_larger_than_a_tile_of_queries():
    scene = make_scene([40, 70], kv_heads=1, group=40, dtype=torch.float32)
    check_prefill(scene, [9, 5])
