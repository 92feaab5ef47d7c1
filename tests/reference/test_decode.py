"""One query per sequence over chosen pages, against naive attention in float64."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from entmaxkv_kernels import Counter, Exact, Gaussian, NewTokens, TopK, analyze_decode, decode
from entmaxkv_kernels.reference.quest import quest_bounds

from . import golden
from .dense import dense_attention, dense_scores, dense_weights
from .scene import STALE, assert_close, make_scene
from .test_gaussian import candidates_of

ALPHAS = [1.0, 1.25, 4 / 3, 1.5, 1.8, 2.0]
# Selectors that read every page: the Gaussian one accepts any page that any normal reaches.
ALL_PAGES = [Exact(), Gaussian(excess_fraction=1e6, safety=1e6, narrow_safety=1e6), TopK(10**6)]
SPARSE = [Gaussian(), TopK(64)]

alphas_and_selectors = pytest.mark.parametrize(
    "alpha, selector",
    [
        pytest.param(alpha, selector, id=f"{selector.name} with alpha {alpha:.4g}")
        for alpha in ALPHAS
        for selector in ALL_PAGES
        if alpha > 1 or selector.name != "gaussian"
    ],
)


def named(selectors):
    return pytest.mark.parametrize("selector", selectors, ids=[s.name for s in selectors])


def assert_decode(scene, selector=ALL_PAGES[0], **options):
    expected = scene.dense_decode(**options)
    if "slopes" in options:
        options["alibi_slopes"] = options.pop("slopes")
    if "window" in options:
        options["sliding_window"] = options.pop("window")
    assert_close(scene.decode(selector=selector, **options), expected)


def analyze(scene, selector, **options):
    options = {"scale": scene.scale, "alpha": 1.5} | options
    context = scene.last_queries, scene.cache, scene.block_table, scene.seq_lens
    return analyze_decode(*context, selector=selector, **options)


def poison_unselected(scene, selected):
    """NaN in the keys and values of every page that is not selected [B, kv_heads, P]."""
    for b, heads in enumerate(selected):
        for head, pages in enumerate(heads):
            for page in range(-(-int(scene.seq_lens[b]) // scene.page_size)):
                if not pages[page]:
                    scene.cache.key[scene.block_table[b, page], head] = torch.nan
                    scene.cache.value[scene.block_table[b, page], head] = torch.nan


@alphas_and_selectors
@pytest.mark.parametrize("page_size", [16, 32, 64, 128], ids="page size {}".format)
def test_reading_every_page_of_ragged_batches_matches_dense_attention(alpha, selector, page_size):
    lengths = [1, page_size - 1, page_size, page_size + 1, 3 * page_size + 5, 2]
    scene = make_scene(lengths, page_size=page_size, statistics=selector.statistics)
    assert_decode(scene, selector, alpha=alpha)


@alphas_and_selectors
def test_alibi_and_a_sliding_window_match_dense_attention(alpha, selector):
    scene = make_scene([1, 40, 77], group=3, statistics=selector.statistics)
    slopes = torch.tensor([0.5, 0.0, -0.25, 0.0625, 0.01, 1.0])
    assert_decode(scene, selector, alpha=alpha, slopes=slopes)
    for window in (1, 16, 33, 1000):
        assert_decode(scene, selector, alpha=alpha, window=window)
        assert_decode(scene, selector, alpha=alpha, window=window, slopes=slopes)


@named(ALL_PAGES)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8], ids="{} query heads per KV head".format)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256], ids="head size {}".format)
def test_head_groups_and_head_sizes_match_dense_attention(selector, group, head_size):
    scene = make_scene(
        [23, 70, 5], group=group, head_size=head_size, statistics=selector.statistics
    )
    assert_decode(scene, selector)


@named([Exact(), TopK(10**6)])
def test_each_query_head_can_have_its_own_alpha(selector):
    scene = make_scene([5, 90], kv_heads=2, group=3, statistics=selector.statistics)
    alpha = [1.0, 1.5, 2.0, 4 / 3, 1.5, 1.7]
    assert_decode(scene, selector, alpha=alpha)
    options = {"alpha": torch.tensor(alpha, dtype=torch.float64), "selector": selector}
    assert_close(scene.decode(**options), scene.dense_decode(alpha=alpha))


def test_small_chunks_of_rows_give_the_same(monkeypatch):
    for module in ("decode", "select"):
        # The package exports functions under the modules' names.
        implementation = importlib.import_module(f"entmaxkv_kernels.reference.{module}")
        monkeypatch.setattr(implementation, "CHUNK_ELEMENTS", 5000)
    for selector in ALL_PAGES:
        scene = make_scene([90, 1, 33, 0, 64, 17], statistics=selector.statistics)
        assert_decode(scene, selector)
        slopes = torch.tensor([0.1, 0.0, 0.03, 0.5])
        assert_decode(scene, selector, slopes=slopes)


@named([*ALL_PAGES, *SPARSE])
def test_a_sequence_of_length_zero_gives_zeros_and_counts_nowhere(selector):
    scene = make_scene([0, 40, 0], statistics=selector.statistics)
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    out = torch.full_like(scene.last_queries, torch.nan)
    returned = scene.decode(selector=selector, counters=counters, out=out)
    assert returned is out
    assert not out.isnan().any()
    assert (out[0] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any()
    assert counters[Counter.STEPS] == 1
    assert counters[Counter.QUERY_HEADS] == 4
    report = analyze(scene, selector)
    for field in (report.tau, report.dropped_mass, report.support_recall, report.output_error):
        assert not field.isnan().any()
        assert (field[0] == 0).all()


@named([*ALL_PAGES, *SPARSE])
def test_a_batch_of_padding_alone_gives_zeros(selector):
    scene = make_scene([0, 0], statistics=selector.statistics)
    assert (scene.decode(selector=selector) == 0).all()


@named(SPARSE)
@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0], ids="alpha {}".format)
def test_a_sparse_step_is_exact_entmax_over_what_it_reads_and_reads_nothing_else(
    selector, alibi, alpha
):
    lengths = [500, 90, 33, 1, 16]
    scene = make_scene(lengths, group=2, statistics=selector.statistics, spread=4, coherence=0.8)
    slopes = torch.tensor([0.2, 0.0, 0.01, 0.05]) if alibi else None
    options = {"alpha": alpha, "alibi_slopes": slopes}
    report = analyze(scene, selector, **options)
    assert not report.selected[0].all()
    poison_unselected(scene, report.selected)
    out = scene.decode(selector=selector, **options)
    for b, length in enumerate(lengths):
        for head in range(4):
            pages = report.selected[b, head // 2]
            read = pages.repeat_interleave(16)[:length]
            scores = dense_scores(scene.query[b][-1:], scene.key[b].double(), scene.scale, slopes)[
                head, 0
            ]
            weights = dense_weights(scores[read], alpha)
            assert_close(out[b, head], weights @ scene.value[b][read, head // 2])


@named(SPARSE)
def test_the_last_page_is_always_read_and_no_page_of_another_length(selector):
    scene = make_scene(
        [500, 96, 97, 16, 5], statistics=selector.statistics, spread=5, coherence=0.8
    )
    selected = analyze(scene, selector).selected
    for row, length in zip(selected, [500, 96, 97, 16, 5], strict=True):
        last = (length - 1) // 16
        assert row[:, last].all()
        assert not row[:, last + 1 :].any()


@named([Gaussian(quantile=1e-9, safety=0.0, excess_fraction=0.0), TopK(64)])
def test_the_report_agrees_with_its_definitions(selector):
    lengths = [400, 77]
    scene = make_scene(lengths, group=3, statistics=selector.statistics, spread=4, coherence=0.8)
    report = analyze(scene, selector)
    out, exact = scene.decode(selector=selector), scene.dense_decode()
    assert report.selected.shape == (2, 2, 25)
    for b, length in enumerate(lengths):
        scores = dense_scores(scene.query[b][-1:], scene.key[b], scene.scale)[:, 0]
        weights = dense_weights(scores, 1.5)
        read = report.selected[b].repeat_interleave(16, -1)[:, :length].repeat_interleave(3, 0)
        support = weights > 0
        assert_close(report.dropped_mass[b], (weights * ~read).sum(-1))
        assert_close(report.support_recall[b], (support & read).sum(-1) / support.sum(-1), 1e-6)
        threshold = scores.amax(-1) / 2 - weights.amax(-1).sqrt()
        assert_close(report.tau[b], threshold, 1e-8)
        error = (out[b] - exact[b]).norm(dim=-1) / exact[b].norm(dim=-1)
        assert_close(report.output_error[b], error)
    assert report.dropped_mass.max() > 0.01


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    length=st.integers(33, 400),
    budget=st.integers(0, 300),
    spread=st.floats(0.5, 20),
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([1.25, 1.5, 2.0]),
)
def test_the_dropped_mass_bounds_the_output_error(length, budget, spread, seed, alpha):
    """What is read gains what was dropped: the difference is delta * (mean of the dropped values
    - mean of the gaining ones), at most 2 delta times the largest value; none without delta."""
    scene = make_scene(
        [length], head_size=32, statistics=("center", "half_width"), spread=spread, seed=seed
    )
    selector = TopK(budget)
    report = analyze(scene, selector, alpha=alpha)
    exact = scene.dense_decode(alpha=alpha)
    difference = (scene.decode(selector=selector, alpha=alpha) - exact).norm(dim=-1)
    largest = scene.value[0].norm(dim=-1).amax(0).repeat_interleave(2)
    assert (difference <= 2 * report.dropped_mass * largest + 1e-9).all()
    assert ((report.dropped_mass > 0) | (report.support_recall == 1)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    length=st.integers(17, 300),
    budget=st.integers(0, 160),
    alibi=st.booleans(),
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([1.25, 1.5, 2.0]),
)
def test_a_step_is_exact_when_no_bound_of_an_unread_page_exceeds_tau(
    length, budget, alibi, seed, alpha
):
    scene = make_scene(
        [length], statistics=("center", "half_width"), spread=5, coherence=0.95, seed=seed
    )
    slopes = torch.tensor([0.3, 0.0, 0.05, 0.1]) if alibi else None
    options = {"alpha": alpha, "alibi_slopes": slopes}
    report = analyze(scene, TopK(budget), **options)
    bounds = quest_bounds(candidates_of(scene, alpha, slopes))[0, :, :, : (length - 1) // 16]
    unread = ~report.selected[0, :, None, : bounds.shape[-1]]
    certified = ((bounds <= report.tau.view(2, 2, 1)) | ~unread).all(-1).flatten()
    out = scene.decode(selector=TopK(budget), **options)[0, certified]
    assert_close(out, scene.dense_decode(alpha=alpha, slopes=slopes)[0, certified])
    assert (report.dropped_mass[0, certified] == 0).all()
    assert (report.support_recall[0, certified] == 1).all()
    event("certified" if certified.any() else "nothing certified")


def test_a_step_certified_by_the_page_bounds_is_exact():
    cache, block_table, seq_lens = golden.golden_cache(("center", "half_width"))
    context = golden.QUERY, cache, block_table, seq_lens
    options = {"scale": golden.SCALE, "alpha": golden.ALPHA}
    report = analyze_decode(*context, selector=TopK(64), **options)
    assert report.selected[0, 0].nonzero().flatten().tolist() == [5, 6, 7, 8, 10]
    # The largest unselected bound, 3.4473, lies below tau of what is read.
    assert report.tau.item() == pytest.approx(3.662499, abs=6e-7)
    assert report.dropped_mass.item() == 0
    assert report.support_recall.item() == 1
    assert report.output_error.item() <= 1e-12
    out = decode(*context, selector=TopK(64), **options)[0, 0, :4]
    known = [0.807636, 0.738207, -0.009925, -0.748933]
    assert out.tolist() == pytest.approx(known, abs=6e-7)


@named([Exact(), Gaussian()])
def test_the_context_of_the_paper_gives_its_known_output(selector):
    cache, block_table, seq_lens = golden.golden_cache(selector.statistics)
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    context = golden.QUERY, cache, block_table, seq_lens
    options = {"scale": golden.SCALE, "alpha": golden.ALPHA, "selector": selector}
    out = decode(*context, **options, counters=counters)[0, 0, :4]
    known = [0.807636, 0.738207, -0.009925, -0.748933]
    assert out.tolist() == pytest.approx(known, abs=6e-7)
    sparse = selector.name == "gaussian"
    expected = {
        Counter.STEPS: 1,
        Counter.SPARSE_STEPS: int(sparse),
        Counter.PAGES_HELD: 11,
        Counter.PAGES_READ: 5 if sparse else 11,
        Counter.SUPPORT: 14,
        Counter.QUERY_HEADS: 1,
    }
    expected = dict.fromkeys(Counter, 0) | expected
    assert dict(zip(Counter, counters.tolist(), strict=True)) == expected
    report = analyze_decode(*context, **options)
    assert report.tau.item() == pytest.approx(3.662499, abs=6e-7)
    if sparse:
        assert report.selected[0, 0].nonzero().flatten().tolist() == [5, 6, 7, 8, 10]


@named([*ALL_PAGES, *SPARSE])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0], ids="alpha {}".format)
def test_constant_keys_give_the_mean_of_the_values_read(selector, alpha):
    """With equal scores the paper's own code returns zeros."""
    scene = make_scene([200], kv_heads=1, statistics=selector.statistics, filled=False)
    scene.key[0][:] = scene.key[0][0].clone()
    scene.append_all()
    selected = analyze(scene, selector, alpha=alpha).selected[0, 0]
    read = selected.repeat_interleave(16)[:200]
    mean = scene.value[0][read].mean(0).expand(2, -1)
    assert_close(scene.decode(selector=selector, alpha=alpha)[0], mean)


def test_a_gaussian_step_reads_every_page_of_constant_keys():
    scene = make_scene([200], statistics=("mean", "std"), filled=False)
    scene.key[0][:] = scene.key[0][0].clone()
    scene.append_all()
    assert analyze(scene, Gaussian()).selected.all()


@named([*ALL_PAGES, *SPARSE])
@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
def test_a_sequence_does_not_depend_on_its_batch(selector, alibi):
    lengths = [300, 17, 64, 1, 129]
    scene = make_scene(lengths, statistics=selector.statistics, spread=4, coherence=0.8)
    slopes = torch.tensor([0.1, 0.0, 0.03, 0.5]) if alibi else None
    together = scene.decode(selector=selector, alibi_slopes=slopes)
    selected = analyze(scene, selector, alibi_slopes=slopes).selected
    for b, length in enumerate(lengths):
        alone = replace(
            scene,
            block_table=scene.block_table[b : b + 1],
            seq_lens=scene.seq_lens[b : b + 1],
            query=scene.query[b : b + 1],
        )
        assert_close(alone.decode(selector=selector, alibi_slopes=slopes)[0], together[b], 1e-12)
        pages = -(-length // 16)
        own = analyze(alone, selector, alibi_slopes=slopes).selected[0]
        assert torch.equal(own, selected[b, :, :pages])


@named([*ALL_PAGES, *SPARSE])
def test_a_second_call_repeats_the_first_bit_for_bit(selector):
    scene = make_scene([100, 37], statistics=selector.statistics, dtype=torch.bfloat16)
    out = torch.full_like(scene.last_queries, torch.nan)
    first = scene.decode(selector=selector, out=out).clone()
    assert torch.equal(scene.decode(selector=selector, out=out), first)


@named(SPARSE)
def test_rows_marked_exact_or_short_are_decoded_exactly(selector):
    lengths = [300, 300, 120, 121, 0]
    scene = make_scene(lengths, statistics=selector.statistics, spread=6, coherence=0.8)
    exact_rows = torch.tensor([True, False, False, False, True])
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    options = {"selector": selector, "exact_rows": exact_rows, "exact_below": 120}
    out = scene.decode(**options, counters=counters)
    selected = analyze(scene, **options).selected
    assert selected[0].all() and selected[2, :, :8].all()
    assert not selected[1].all() and not selected[3, :, :8].all()
    expected = scene.dense_decode()
    assert_close(out[0], expected[0])
    assert_close(out[2], expected[2])
    assert_close(out[1], scene.decode(selector=selector)[1])
    assert counters[Counter.STEPS] == 4
    assert counters[Counter.SPARSE_STEPS] == 2
    assert counters[Counter.PAGES_HELD] == 2 * (19 + 19 + 8 + 8)
    assert counters[Counter.PAGES_READ] == selected.sum()


@named([ALL_PAGES[0], *SPARSE])
def test_new_tokens_are_appended_before_anything_is_read(selector):
    scene = make_scene([300, 17, 64, 0], statistics=selector.statistics, spread=6)
    expected = scene.decode(selector=selector)
    statistics = scene.cache.statistics.clone()
    held = [(b, len(key) - 1) for b, key in enumerate(scene.key) if len(key)]
    slots = torch.full((4,), -1)
    key, value = torch.full((2, 4, *scene.key[0].shape[1:]), torch.nan).to(scene.cache.key.dtype)
    for b, last in held:
        slots[b] = scene.slots(b, last, last + 1)
        key[b], value[b] = scene.key[b][last], scene.value[b][last]
        page, row = divmod(int(slots[b]), scene.page_size)
        scene.cache.key[page, :, row] = scene.cache.value[page, :, row] = torch.nan
        scene.cache.statistics[page] = 0
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    new_tokens = NewTokens(key, value, slots)
    out = scene.decode(selector=selector, new_tokens=new_tokens, counters=counters)
    assert torch.equal(out, expected)
    torch.testing.assert_close(scene.cache.statistics, statistics, equal_nan=True)
    assert counters[Counter.APPENDED_PAGES] == 3 * scene.cache.key.shape[1]


def test_counters_add_up_over_calls():
    scene = make_scene([300, 40], group=3, spread=4)
    support = sum(
        (dense_weights(dense_scores(q[-1:], k, scene.scale), 1.5) > 0).sum().item()
        for q, k in zip(scene.query, scene.key, strict=True)
    )
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    for call in (1, 2):
        scene.decode(selector=Exact(), counters=counters)
        expected = [2, 0, 2 * (19 + 3), 2 * (19 + 3), support, 12]
        others = [0] * (len(Counter) - len(expected))
        assert counters.tolist() == [call * x for x in expected] + others


def test_a_sliding_window_reads_the_pages_inside_it_and_no_others():
    scene = make_scene([200, 30], statistics=("mean", "std"))
    scene.block_table[0, :9] = STALE  # given back by the engine: positions 0 to 143
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    options = {"sliding_window": 50, "selector": Gaussian(), "counters": counters}
    assert_close(scene.decode(**options), scene.dense_decode(window=50))
    assert counters[Counter.SPARSE_STEPS] == 0
    assert counters[Counter.PAGES_HELD] == counters[Counter.PAGES_READ] == 2 * (4 + 2)


@named(SPARSE)
def test_a_needle_in_constant_keys_is_found(selector):
    scene = make_scene([400], statistics=selector.statistics, filled=False)
    needle = 100
    scene.key[0][:] = 0.01 * scene.key[0]
    scene.key[0][needle] = 3 * scene.query[0][-1].unflatten(0, (2, 2)).sum(1)
    scene.append_all()
    report = analyze(scene, selector)
    assert report.selected[0, :, needle // 16].all()
    assert_close(report.dropped_mass, torch.zeros(1, 4), 1e-12)


@named([Exact(), TopK(32)])
def test_softmax_over_what_is_read_is_plain_attention(selector):
    scene = make_scene([130], statistics=selector.statistics)
    report = analyze(scene, selector, alpha=1.0)
    read = report.selected[0, 0].repeat_interleave(16)[:130]
    out = scene.decode(selector=selector, alpha=1.0)
    key, value = scene.key[0][read, :1], scene.value[0][read, :1]
    expected = dense_attention(scene.query[0][-1:, :2], key, value, scene.scale, 1.0)
    assert_close(out[0, :2], expected[0])
