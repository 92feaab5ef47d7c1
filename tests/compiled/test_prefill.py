"""Compiled prefill: as accurate as straightforward PyTorch, whatever the seed of its threshold."""

import sys

import pytest
import torch
import triton
import triton.language as tl
from reference.scene import make_scene
from reference.test_precision import assert_no_worse, straightforward_attention

from entmaxkv_kernels.triton.prefill import prefill
from entmaxkv_kernels.triton.prefill_rough import (
    likely_step,
    rough_moments,
    scaled_rows,
    sum_bounds,
    unscaled,
)
from entmaxkv_kernels.triton.prefill_tiles import heads_in_turn, moments, tile_of

from .device import DEVICE, DTYPES, on_device

launches = sys.modules["entmaxkv_kernels.triton.prefill"]
MIXED = torch.tensor([1.0, 1.5, 2.0, 1.25], dtype=torch.float64)
SLOPES = torch.tensor([0.5, 0.0, -0.25, 0.01])
LAST_BITS = 2e-5
"""An error of fp32 that needs no yardstick; with high scores straightforward PyTorch has more."""

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(scene, query_lens=None, padding=3, workspace_size=1 << 18, **options):
    """Output of each chunk, in a poisoned workspace; tokens outside every chunk stay poison."""
    query_lens = scene.seq_lens.tolist() if query_lens is None else query_lens
    query = [q[len(q) - n :] for q, n in zip(scene.query, query_lens, strict=True)]
    query = torch.cat(
        [*query, torch.full_like(scene.query[0][:1], torch.nan).expand(padding, -1, -1)]
    )
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    options = {"alpha": 1.5, "alibi_slopes": None, "sliding_window": None} | options
    for name, value in options.items():
        options[name] = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    out = torch.full_like(query, torch.nan).to(DEVICE)
    workspace = torch.full((workspace_size,), 255, dtype=torch.uint8, device=DEVICE)
    context = scene.block_table.to(DEVICE), scene.seq_lens.to(DEVICE), starts.to(DEVICE)
    cache = on_device(scene.cache)
    options |= {"scale": scene.scale, "out": out, "workspace": workspace}
    prefill(query.to(DEVICE), cache, *context, **options)
    *chunks, rest = out.cpu().split([*query_lens, padding])
    assert rest.isnan().all()
    return chunks


def check(scene, query_lens=None, **options):
    alpha, slopes = options.get("alpha", 1.5), options.get("alibi_slopes")
    window = options.get("sliding_window")
    actual = run(scene, query_lens, **options)
    alphas = alpha.tolist() if isinstance(alpha, torch.Tensor) else alpha
    exact = scene.dense_prefill(query_lens, alpha=alphas, slopes=slopes, window=window)
    assert not any(chunk.isnan().any() for chunk in actual)
    errors = torch.cat([(a.double() - e).flatten() for a, e in zip(actual, exact, strict=True)])
    if actual[0].dtype == torch.float32 and errors.abs().max() <= LAST_BITS:
        return
    assert isinstance(alphas, float) and window is None, "the yardstick takes one alpha, no window"
    yardstick = [
        straightforward_attention(q, k, v, scene.scale, alpha, slopes)
        for q, k, v in zip(scene.query, scene.key, scene.value, strict=True)
    ]
    lengths = [len(chunk) for chunk in actual]
    yardstick = [y[len(y) - n :] for y, n in zip(yardstick, lengths, strict=True)]
    assert_no_worse(actual, yardstick, exact)


@dtypes
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 4 / 3, 1.2], ids="alpha {:.3g}".format)
def test_ragged_batches_are_exact(dtype, alpha):
    check(make_scene([1, 15, 16, 17, 70, 333], dtype=dtype, kv_heads=1), alpha=alpha)


@pytest.mark.parametrize(
    "kv_heads, group, head_size, page_size",
    [(2, 1, 64, 64), (1, 3, 80, 16), (1, 5, 96, 32), (1, 8, 128, 16), (1, 2, 256, 64)],
)
@dtypes
def test_every_shape_of_heads_and_pages_is_exact(dtype, kv_heads, group, head_size, page_size):
    shape = {"kv_heads": kv_heads, "group": group, "head_size": head_size}
    check(make_scene([1, page_size, 130], page_size=page_size, dtype=dtype, **shape))


@pytest.mark.parametrize("window", [None, 1, 20, 100], ids="window {}".format)
def test_heads_have_their_own_alpha_and_slope_and_see_a_window(window):
    scene = make_scene([5, 150], dtype=torch.float32)
    check(scene, alpha=MIXED, alibi_slopes=SLOPES, sliding_window=window)
    check(scene, [5, 40], sliding_window=window)


@dtypes
def test_a_chunk_may_be_any_tail_of_its_sequence_even_empty(dtype):
    check(make_scene([10, 133, 300, 7], dtype=dtype), [10, 1, 90, 0])


def test_pages_before_the_window_are_never_read():
    scene = make_scene([100], dtype=torch.float32)
    scene.block_table[0, :4] = 10**8  # given back by the engine: positions 0 to 63
    check(scene, [10], sliding_window=20)


@dtypes
def test_equal_scores_all_have_weight(dtype):
    scene = make_scene([300], kv_heads=1, dtype=dtype, filled=False)
    scene.key[0][:] = scene.key[0][0]
    scene.append_all()
    check(scene)


@dtypes
@pytest.mark.parametrize("keys, apart", [(300, 0.03), (2100, 0.018), (3300, 0.012)])
def test_a_likely_threshold_that_is_too_high_is_stepped_back_from(monkeypatch, dtype, keys, apart):
    """The mass of keys with one of two scores each falls as a square: of 16-bit queries the likely
    threshold is too high, somewhat for 300 keys, past the margin for 2100, and above all scores for
    3300. The lower ones have weight, too."""
    monkeypatch.setattr(launches, "SAMPLED", 64)  # none, which would find the threshold
    scene = make_scene([keys], kv_heads=1, group=1, dtype=dtype, filled=False)
    query = scene.query[0][0]
    scene.query[0][:] = query
    low = 2 * apart / scene.scale * query[0].float() / query[0].float().square().sum()
    scene.key[0][:] = scene.key[0][0]
    scene.key[0][(torch.arange(keys) // 16) % 2 == 0] -= low.to(dtype)
    scene.append_all()
    check(scene, [3])


SPREAD_SCORES = {
    "wider than sums allow": (
        {257: 23.37, 108: 22.47, 193: 18.05, 13: 17.34, 245: 16.5, 276: 15.8}
        | {333: 15.34, 81: 14.86, 335: 14.82},
        (20, 21),
        458,
    ),
    "as wide as they allow": (
        {328: 3.40625, 132: 2.984375, 265: 1.8125, 112: 1.46875, 165: 1.15625, 197: 1.671875}
        | {357: 1.03125, 113: 2.703125, 47: 2.671875, 89: 1.25, 262: 2.84375, 391: 0},
        (0.375, 0.875),
        512,
    ),
}


@dtypes
@pytest.mark.parametrize("high, differing, keys", SPREAD_SCORES.values(), ids=SPREAD_SCORES)
def test_a_likely_threshold_just_below_the_highest_score_does_not_hide_the_second(
    high, differing, keys, dtype
):
    """What rounding leaves of a little mass, added up with a wide margin, does not say how far
    below the threshold is. Rows differ in one score, on which the likely threshold depends."""
    scene = make_scene([keys], kv_heads=1, group=1, dtype=dtype, filled=False)
    scores = torch.full((keys,), -20.0)
    scores[list(high)] = torch.tensor(list(high.values()))
    scene.key[0][:] = 0
    scene.key[0][:, 0, 0] = scores * 2 / scene.scale
    scene.key[0][185, 0, :2] = torch.tensor([0.0, 2 / scene.scale])
    scene.query[0][:] = 0
    scene.query[0][..., 0] = 1
    scene.query[0][-100:, 0, 1] = torch.linspace(*differing, 100)
    scene.append_all()
    check(scene, [100])


@dtypes
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.1], ids="alpha {}".format)
@pytest.mark.parametrize("others", [1, 150], ids=["one high key", "half of the keys high"])
def test_high_scores_that_the_seed_misses_are_found(dtype, alpha, others):
    """Of fp16 and alpha 1.5 they are too high for sums of fp16."""
    scene = make_scene([400], kv_heads=1, group=1, dtype=dtype, filled=False)
    scene.query[0][:] = scene.query[0][0]
    scene.key[0][100 : 100 + others] += 20 * scene.query[0][:1] / scene.query[0][0].norm()
    scene.append_all()
    check(scene, [64], alpha=alpha)


@dtypes
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.2], ids="alpha {}".format)
@pytest.mark.parametrize("mass", [1e-3, 2.0], ids=["guess too high", "guess"])
def test_a_guess_is_proved_or_made_up_for(monkeypatch, mass, alpha, dtype):
    """Made to show far less mass than one, the sample guesses above nearly every threshold."""
    monkeypatch.setattr(launches, "SAMPLED", 4)
    monkeypatch.setattr(launches, "GUESSED_MASS", mass)
    check(make_scene([1500], kv_heads=1, dtype=dtype), [70], alpha=alpha)


@triton.jit
def rough_kernel(p_z, p_tau, p_bounds, keys, BM: tl.constexpr, BN: tl.constexpr):
    """Bounds [4, BM] of the mass and power of z [BM, BN] above tau."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    b_one = tl.full([BM], 1.0, tl.float32)
    b_z, b_tau = tl.load(p_z + o_m[:, None] * BN + o_n[None, :]), tl.load(p_tau + o_m)
    # Of what the queries are, the dtype alone counts.
    rows = b_one.to(tl.float16), b_one, b_one, b_one, o_m, 0, 0, 0, 0
    rows, b_unit, b_tau = scaled_rows(rows, b_one, b_tau, 2)
    b_mass, b_power, _, _ = rough_moments(rows, b_z * b_unit[:, None], b_tau, 2)
    b_mass, b_power = unscaled(rows, tl.sum(b_mass, 1), tl.sum(b_power, 1), 2)
    b_least, b_most = sum_bounds(rows, b_mass, b_power, keys, BN, 2)
    tl.store(p_bounds + o_m, b_least[0])
    tl.store(p_bounds + BM + o_m, b_least[1])
    tl.store(p_bounds + 2 * BM + o_m, b_most[0])
    tl.store(p_bounds + 3 * BM + o_m, b_most[1])


@pytest.mark.parametrize("height", [1e-7, 1e-4, 1e-2, 1.0, 5.0, 100.0])
def test_rough_sums_are_between_their_bounds(height):
    torch.manual_seed(0)
    z = torch.rand(16, 128, device=DEVICE) * height
    z[8:] = z[8:, :1]  # equal ones, whose roundings add up
    tau = torch.linspace(-0.5, 0.5, 16, device=DEVICE) * height
    bounds = torch.full((4, 16), torch.nan, device=DEVICE)
    rough_kernel[(1,)](z, tau, bounds, 128, 16, 128)
    x = (z.double() - tau.double()[:, None]).clamp_min(0)
    sums = torch.stack([x.square().sum(1), x.sum(1)])
    assert ((bounds[:2] <= sums) & (sums <= bounds[2:]) | bounds[:2].isinf()).all()
    if height <= 1:
        assert (bounds[2:] - bounds[:2] <= 0.03 * sums + 1e-5).all()


@triton.jit
def margin_kernel(p_z, p_power, p_sums, keys, left_mass, BM: tl.constexpr, BN: tl.constexpr):
    """Likely step, margin, and mass [3, BM] of z [BM, BN] past the margin above a threshold of 0,
    of rows that had a mass of 1."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    b_one = tl.full([BM], 1.0, tl.float32)
    # Of what the queries are, the dtype alone counts.
    rows = b_one.to(tl.float16), b_one, b_one, b_one, o_m, 0, 0, 0, 0
    b_power = tl.load(p_power + o_m)
    b_step, b_margin = likely_step(rows, o_m >= 0, b_one, b_power, keys, left_mass, 2)
    b_z = tl.load(p_z + o_m[:, None] * BN + o_n[None, :])
    b_mass, _, _, _ = moments(rows, b_z, b_one - 1.0, b_margin, 2)
    tl.store(p_sums + o_m, b_step)
    tl.store(p_sums + BM + o_m, b_margin)
    tl.store(p_sums + 2 * BM + o_m, tl.sum(b_mass, 1))


@pytest.mark.parametrize("keys", [512, 1 << 17])
def test_sums_past_a_margin_are_off_by_half_of_what_may_be_left_or_there_is_none(keys):
    """Keys far below the threshold, whose roundings add up, and margins to twice the widest."""
    left_mass, rows = launches.LEFT_MASS[torch.float16], 64
    widest = (2.0**19 * left_mass / keys) ** 0.5
    power = 0.02 / torch.linspace(0.5 * widest, 2 * widest, rows, device=DEVICE)
    z = torch.full((rows, 128), -4 * widest, device=DEVICE)
    sums = torch.full((3, rows), torch.nan, device=DEVICE)
    margin_kernel[(1,)](z, power, sums, keys, left_mass, rows, 128)
    step, margin, mass = sums
    assert (step == 0).all()  # masses are one
    assert (margin[: rows // 4] > 0).all() and (margin[rows // 2 :] == 0).all()
    assert (mass.abs() * (keys / 128) <= 0.5 * left_mass).all()


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "not sampled"])
def test_one_high_score_leaves_the_output_exact_whether_a_guess_saw_it_or_not(sampled):
    scene = make_scene([1500], kv_heads=1, group=1, dtype=torch.float32, filled=False)
    scene.query[0][:] = scene.query[0][0]
    # The first key is always in the sample, where few others are.
    scene.key[0][0 if sampled else 1] += 8 * scene.query[0][0] / scene.query[0][0].norm()
    scene.append_all()
    check(scene, [64])


@triton.jit
def order_kernel(p_key, p_seq_lens, p_order, batch, slab, HKV: tl.constexpr, D: tl.constexpr):
    together = heads_in_turn(p_key, p_seq_lens, batch, HKV, D)
    for item in range(0, slab * HKV):
        i_h, i_slab = tile_of(item, slab, together)
        tl.store(p_order + 2 * item, i_h)
        tl.store(p_order + 2 * item + 1, i_slab)


@pytest.mark.parametrize(
    "longest, turns",
    [(1 << 16, True), ((1 << 16) + 1, False)],
    ids=["L2 holds the keys of all heads", "L2 does not"],
)
def test_late_tiles_go_first_and_heads_take_turns_if_l2_holds_their_keys(longest, turns):
    slab, kv_heads = 5, 4
    lengths = torch.ones(300, dtype=torch.int32, device=DEVICE)
    lengths[170] = longest
    order = torch.empty(slab * kv_heads, 2, dtype=torch.int32, device=DEVICE)
    key = torch.empty(0, dtype=torch.float16, device=DEVICE)
    order_kernel[(1,)](key, lengths, order, len(lengths), slab, kv_heads, 64)
    late_first = range(slab - 1, -1, -1)
    expected = [(h, tile) for h in range(kv_heads) for tile in late_first]
    if turns:
        expected = [(h, tile) for tile in late_first for h in range(kv_heads)]
    assert order.tolist() == [list(pair) for pair in expected]


def test_two_runs_give_the_same_bits():
    scene = make_scene([150, 50], dtype=torch.float16)
    assert all(map(torch.equal, run(scene), run(scene)))


def test_the_smallest_workspace_gives_the_same_bits():
    scene = make_scene([150, 50], dtype=torch.float16)
    with pytest.raises(ValueError, match="expected at least") as error:
        run(scene, workspace_size=64)
    least = int(str(error.value).split()[-1])
    assert all(map(torch.equal, run(scene), run(scene, workspace_size=least)))


def test_a_workspace_that_is_too_small_is_refused():
    scene = make_scene([33], dtype=torch.float32)
    context = on_device(scene.cache), scene.block_table, scene.seq_lens, torch.tensor([0, 33])
    with pytest.raises(ValueError, match=r"workspace has 64 bytes; expected at least \d+"):
        prefill(
            scene.query[0],
            *context,
            scale=1.0,
            alpha=1.5,
            alibi_slopes=None,
            sliding_window=None,
            out=torch.empty_like(scene.query[0]),
            workspace=torch.empty(64, dtype=torch.uint8),
        )
