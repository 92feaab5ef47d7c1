"""Sparse decode, compiled: the reference's pages, and exact attention over them."""

import pytest
import torch
from reference.scene import make_scene

from entmaxkv_kernels import Adaptive, Counter, Gaussian, TopK
from entmaxkv_kernels.triton import workspace

from .device import DTYPES, ON_GPU, Step, on_a_gpu

RAGGED = [0, 1, 16, 17, 500, 300]
MATCHED = [Counter.STEPS, Counter.SPARSE_STEPS, Counter.PAGES_HELD, Counter.QUERY_HEADS]

dtypes_and_alphas = pytest.mark.parametrize(
    "dtype, alpha",
    [(torch.float32, alpha) for alpha in (1.0, 4 / 3, 2.0, 1.2)]
    + [(dtype, 1.5) for dtype in DTYPES],
    ids="{}".format,
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def parametrized(selectors):
    ids = [f"{selector.name}-by-{selector.statistics[-1]}" for selector in selectors]
    return pytest.mark.parametrize("selector", selectors, ids=ids)


BY_CODES = [TopK(64, codes=True), Adaptive(reach=1.0, first_pages=4, codes=True)]
SELECTORS = [TopK(64), Gaussian(), Adaptive(reach=1.0, first_pages=4, guard=0)]
selectors = parametrized(SELECTORS + BY_CODES * ON_GPU)


def sparse_scene(selector, lengths=RAGGED, **options):
    """Pages that differ, so that few of them lie at the edge of a selection."""
    options = {"coherence": 0.8, "spread": 4.0, "dtype": torch.float32} | options
    return make_scene(lengths, statistics=selector.statistics, **options)


def make_pages_equal(scene):
    """To the last bit also where sums of products are added up in another order: of few bits."""
    for query in scene.query:
        query.round_()
    scene.cache.scales[..., :2].log2_().round_().exp2_()
    for part in (scene.cache.statistics, scene.cache.scales):
        part[:] = part[scene.block_table[0, 0]].clone()


def listed_pages(step):
    """Pages [B, kv_heads, P] bool that the step has listed, each once, and the last one last."""
    shape, held = step.shape, -(-step.scene.seq_lens.long() // step.scene.page_size)
    listed = step.scratch("listed").view(shape.batch, shape.kv_heads, 2, -1)
    counts = step.scratch("listed_count").view(shape.batch, shape.kv_heads)
    pages = torch.zeros(shape.batch, shape.kv_heads, int(held.max()), dtype=torch.bool)
    for b in range(shape.batch):
        for h in range(shape.kv_heads):
            physical, logical = listed[b, h, :, : counts[b, h]].long()
            assert len(logical.unique()) == len(logical)
            assert torch.equal(physical, step.scene.block_table[b, logical].long())
            pages[b, h, logical] = True
            assert not held[b] or logical[-1] == held[b] - 1
    return pages


def check(selector, scene, **options):
    """Few pages may differ from the reference's, and rows without any have its output."""
    step = Step(scene, selector, **options)
    out = step.run()
    expected, counters = step.run_reference()
    pages = listed_pages(step)
    selected = step.run_selection()
    same = (pages == selected).all(-1)
    assert same.float().mean() >= (1.0 if out.dtype == torch.float32 else 0.9)
    group = step.shape.group
    tolerance = {torch.float32: 2e-5}.get(out.dtype, 8 * torch.finfo(out.dtype).eps)
    difference = (out - expected).double().abs().amax(-1)
    assert not difference.isnan().any()
    assert (difference[same.repeat_interleave(group, 1)] <= tolerance).all()
    assert torch.equal(step.counters[MATCHED], counters[MATCHED])
    assert step.counters[Counter.PAGES_READ] == pages.sum()
    return pages


@dtypes_and_alphas
@parametrized(SELECTORS + BY_CODES)
def test_the_pages_are_those_of_the_reference(selector, alpha, dtype):
    if alpha == 1 and isinstance(selector, Gaussian | Adaptive):
        pytest.skip("softmax has no threshold to reach")
    if not ON_GPU and selector in BY_CODES and alpha != 1.5:
        pytest.skip("the interpreter is slow: there alphas are tried with boxes")
    pages = check(selector, sparse_scene(selector, dtype=dtype), alpha=alpha)
    assert not pages[4].all()


@selectors
@dtypes
@pytest.mark.parametrize(
    "kv_heads, group, head_size, page_size", [(1, 16, 80, 32), (3, 1, 128, 16), (1, 3, 256, 64)]
)
def test_every_shape_of_heads_and_pages_is_served(
    selector, kv_heads, group, head_size, page_size, dtype
):
    lengths = [0, page_size - 1, 9 * page_size, 700]
    shape = {"kv_heads": kv_heads, "group": group, "head_size": head_size, "dtype": dtype}
    check(selector, sparse_scene(selector, lengths, page_size=page_size, **shape))


@parametrized(SELECTORS + BY_CODES)
def test_heads_have_their_own_alpha_and_slope(selector):
    alpha = torch.tensor([1.25, 1.5, 2.0, 4 / 3], dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.0, 0.05, 0.004])
    check(selector, sparse_scene(selector), alpha=alpha, alibi_slopes=slopes)


def test_budgets_of_some_thousand_tokens_are_read_by_heads_of_their_own_alpha():
    selector = TopK(2200)
    scene = sparse_scene(selector, [3000, 2100, 0, 33], kv_heads=1)
    assert Step(scene, selector).shape.held > 2048
    check(selector, scene, alpha=torch.tensor([1.25, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("held", [2048, 0], ids=["scores in registers", "scores in lists"])
@selectors
def test_some_sequences_are_decoded_exactly(selector, held, monkeypatch):
    monkeypatch.setattr(workspace, "HELD_LISTED", held)
    exact_rows = torch.tensor([False, False, True, False, True, False])
    pages = check(selector, sparse_scene(selector), exact_rows=exact_rows, exact_below=16)
    assert pages[4, :, :32].all()
    assert not pages[5, :, :19].all()


def test_equal_pages_go_to_the_earlier_one():
    scene = sparse_scene(TopK(64), [500])
    make_pages_equal(scene)
    pages = check(TopK(64), scene)
    assert torch.equal(pages[0, 0].nonzero().flatten(), torch.tensor([0, 1, 2, 3, 31]))


@pytest.fixture(params=[2048, 0], ids=["listed by the last program", "listed by another launch"])
def long_rows(request, monkeypatch):
    """Rows of more than 64 pages are ranked by several programs."""
    monkeypatch.setattr(workspace, "RANKED_ALONE", 64)
    monkeypatch.setattr(workspace, "CANDIDATES", request.param)


@pytest.mark.parametrize(
    "equal",
    [False, pytest.param(True, marks=on_a_gpu)],
    ids=["pages that differ", "equal pages"],
)
def test_rows_of_more_pages_than_a_tile_are_ranked_as_a_whole(equal, long_rows):
    """Beside them are some that one program ranks."""
    lengths = [1100 * 16 + 1, 40, 1030 * 16, 64 * 16, 65 * 16, 0]
    scene = sparse_scene(TopK(1000), lengths, kv_heads=1, group=2)
    if equal:
        make_pages_equal(scene)
    exact_rows = torch.tensor([False, False, True, False, False, False])
    pages = check(TopK(1000), scene, exact_rows=exact_rows)
    budget = 1000 // 16 + 1
    assert pages.sum(-1).flatten().tolist() == [budget, 3, 1030, budget, budget, 0]


def test_the_least_workspace_is_enough_whatever_it_holds():
    """Scores have no room: a threshold is guessed from pages that have to be chosen before."""
    scene = sparse_scene(TopK(256), [600], kv_heads=1, group=2)
    step = Step(scene, TopK(256))
    out = step.run(step.shape.least_size)
    expected, _ = step.run_reference()
    assert (out - expected).abs().max() < 2e-5


def test_rows_may_be_ranked_by_programs_of_their_own(monkeypatch):
    monkeypatch.setattr(workspace, "RANKED_BY_READERS", 0)
    exact_rows = torch.tensor([False, False, False, False, False, True])
    pages = check(TopK(64), sparse_scene(TopK(64)), exact_rows=exact_rows, exact_below=16)
    assert not pages[4].all() and pages[5, :, :19].all()


def test_a_page_is_chosen_whoever_ranks_it(monkeypatch):
    """By the programs that read the row, by one of a wide block table, or by several, of which the
    last one or another launch lists it; also where bounds are no numbers, infinite or equal."""
    scene = sparse_scene(TopK(640), [2000, 300, 1024], kv_heads=1, group=2)
    scene.cache.scales[::7] = torch.nan
    scene.cache.scales[3] = torch.inf
    scene.cache.statistics[5::3] = scene.cache.statistics[5].clone()
    scene.cache.scales[5::3] = scene.cache.scales[5].clone()
    listed = []
    ways = (2048, 2048, 0), (0, 2048, 0), (0, 64, 0), (0, 32, 0), (0, 64, 2048), (0, 32, 2048)
    for readers, alone, candidates in ways:
        monkeypatch.setattr(workspace, "RANKED_BY_READERS", readers)
        monkeypatch.setattr(workspace, "RANKED_ALONE", alone)
        monkeypatch.setattr(workspace, "CANDIDATES", candidates)
        step = Step(scene, TopK(640))
        step.run()
        listed.append(listed_pages(step))
        assert torch.equal(listed[-1], listed[0])
    assert listed[0].sum(-1).flatten().tolist() == [41, 19, 41]


@pytest.mark.parametrize("pages", [2048, 2049, 2100])
def test_rows_of_many_pages_are_ranked_by_those_who_read_them(pages):
    """Beside it one of few pages, under the same wide table."""
    scene = sparse_scene(TopK(1000), [(pages - 1) * 16 + 3, 40 * 16], kv_heads=1, group=2)
    scene.block_table = torch.nn.functional.pad(scene.block_table, (0, 2100 - pages))
    chosen = check(TopK(1000), scene)
    assert chosen.sum(-1).flatten().tolist() == [63, 40]


@on_a_gpu
def test_many_equal_pages_go_to_the_earlier_ones():
    pages = 2100
    scene = sparse_scene(TopK(2060 * 16), [pages * 16], kv_heads=1, group=2)
    make_pages_equal(scene)
    chosen = check(TopK(2060 * 16), scene)
    assert chosen[0, 0, :2060].all() and not chosen[0, 0, 2060:-1].any()


@pytest.mark.parametrize("nearer", [True, False], ids=["others nearer", "others farther"])
def test_a_sample_that_misleads_is_made_up_for(nearer, long_rows):
    """Of 2,100 pages every other one is sampled, and most of those between lie nearer, or farther:
    more than wanted lie before where the sample has the last one, or too few before its end."""
    scene = sparse_scene(TopK(4000), [2100 * 16 + 3], kv_heads=1, group=2)
    scene.cache.scales[scene.block_table[0, int(nearer) : 1400 : 2].long()] *= 3
    pages = check(TopK(4000), scene)
    assert (pages[0, 0, :2100:2].sum() < 10) == nearer


def test_each_row_of_a_wide_table_has_its_own_rule(long_rows, monkeypatch):
    """Few pages, many of them ranked, read whole for their number or because they are flagged, and
    a budget of more than there are; what is left out has its bounds for the certificate."""
    monkeypatch.setattr(workspace.Shape, "list_tile", 64)
    lengths = [3000, 300, 1030, 1100, 1041, 0]
    exact_rows = torch.tensor([False, False, False, True, False, False])
    for budget, read in ((640, [41, 19, 65, 69, 41, 0]), (1100, [69, 19, 65, 69, 66, 0])):
        scene = sparse_scene(TopK(budget), lengths, kv_heads=1, group=2)
        options = {"exact_rows": exact_rows, "exact_below": 1030}
        step = Step(scene, TopK(budget), certify=True, **options)
        out = step.run()
        expected, counters = step.run_reference()
        assert (out - expected).abs().max() < 2e-5
        pages = listed_pages(step)
        assert pages.sum(-1).flatten().tolist() == read
        assert torch.equal(step.counters[MATCHED], counters[MATCHED])
        assert step.counters[Counter.PAGES_READ] == pages.sum()
        bound = step.scratch("bound").view(len(lengths), 2, -1)
        for b, ranked in ((0, 187), (4, 65)):
            unread = ~pages[b, 0, :ranked]
            assert torch.equal(bound[b, :, :ranked] > -torch.inf, unread.expand(2, -1))


@pytest.mark.parametrize("budget, pages", [(0, 1), (15, 1), (48, 4), (10**6, 32)])
def test_a_budget_is_whole_pages_besides_the_last(budget, pages):
    chosen = check(TopK(budget), sparse_scene(TopK(budget), [500]))
    assert (chosen.sum(-1) == pages).all()


def test_scores_of_every_spread_have_their_threshold():
    for spread in (1e-4, 0.3, 1.0, 30.0):
        check(Gaussian(), sparse_scene(Gaussian(), [700, 64], spread=spread))


def test_the_mean_spread_of_all_heads_may_choose_the_setting():
    """Some heads are narrow and some wide, and so is the mean of some sequences."""
    shared, own = Gaussian(shared_spread=True, excess_fraction=0), Gaussian(excess_fraction=0)
    scene = sparse_scene(shared, [700, 331, 900], kv_heads=3, group=2)
    for row, query in enumerate(scene.query):
        query *= torch.tensor([0.02, 0.3, 0.05, 1.5, 0.4, 0.02])[:, None] * (1 + row)
    assert not torch.equal(check(shared, scene), check(own, scene))


def test_two_runs_give_the_same_bits():
    step = Step(sparse_scene(Gaussian(), dtype=torch.float16), Gaussian())
    assert torch.equal(step.run(), step.run())


def test_two_runs_over_long_rows_give_the_same_lists_and_bits(long_rows):
    """Programs of a row come in any order, and count each other."""
    scene = sparse_scene(TopK(640), [2000, 1030, 3000], kv_heads=1, group=2)
    runs = []
    for _ in range(2):
        step = Step(scene, TopK(640))
        out, counts = step.run(), step.scratch("listed_count").clone()
        listed = step.scratch("listed").view(3, 2, -1)
        assert counts.tolist() == [41, 41, 41]
        runs.append((out, listed[:, :, :41].clone()))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
