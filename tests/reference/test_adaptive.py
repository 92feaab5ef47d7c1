"""The adaptive selector: what it reads, when it ends, and whom it refuses."""

import pytest
import torch

from entmaxkv_kernels import Adaptive, Counter, Exact, analyze_decode
from entmaxkv_kernels.pages import BOX
from entmaxkv_kernels.reference.adaptive import (
    FIRST_SHARE,
    NEIGHBOURS,
    adaptive_pages,
    choose_first,
    lower_threshold,
    possible_pages,
    read_first,
)
from entmaxkv_kernels.reference.entmax import entmax_threshold
from entmaxkv_kernels.reference.quest import page_reaches, radius_bounds
from entmaxkv_kernels.reference.scores import scale_to_scores

from .scene import make_scene
from .test_gaussian import candidates_of

SLOPES = torch.tensor([0.05, 0.01, 0.0, -0.02, 0.1, 0.01])
ALPHAS = torch.tensor([1.25, 1.5, 2.0, 1.5, 1.75, 4 / 3], dtype=torch.float64)


def report_of(scene, selector, **options):
    options = {"scale": scene.scale, "alpha": 1.5, "selector": selector} | options
    queries, table = scene.last_queries, scene.block_table
    return analyze_decode(queries, scene.cache, table, scene.seq_lens, **options)


def ids_of(scene, candidates):
    pages = candidates.ranked.shape[1]
    held = torch.arange(pages) <= candidates.ranked.sum(-1)[:, None]
    return scene.block_table[:, :pages].long().masked_fill(~held, 0)


def chosen_of(scene, selector, alpha=1.5, slopes=None):
    candidates = candidates_of(scene, alpha, slopes)
    ids = ids_of(scene, candidates)
    radius = scene.cache.scales[ids, :, 2].mT[..., None].double()
    candidates = candidates._replace(radius=radius)
    choose = possible_pages if isinstance(selector, Exact) else adaptive_pages
    return candidates, choose(candidates, selector, scene.cache, ids)


def true_scores(scene, sequence, alpha, slopes):
    """z [kv_heads, group, tokens] of the last query of one sequence."""
    query = scene.last_queries[sequence : sequence + 1]
    query, slopes = scale_to_scores(query, scene.scale, alpha, slopes)
    key = scene.key[sequence]
    scores = torch.einsum("hgd,nhd->hgn", query[0].unflatten(0, (key.shape[1], -1)), key)
    if slopes is not None:
        distance = torch.arange(len(key)) - (len(key) - 1)
        scores = scores + slopes.view(key.shape[1], -1, 1) * distance
    return scores


@pytest.mark.parametrize("alpha", [1.5, ALPHAS], ids=["one alpha", "an alpha for each head"])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["no ALiBi", "ALiBi"])
@pytest.mark.parametrize("first_pages", [2, 5])
def test_no_page_left_out_reaches_the_threshold_of_what_was_read(alpha, slopes, first_pages):
    scene = make_scene([701, 333], group=3, statistics=BOX, spread=4, coherence=0.8, seed=3)
    selector = Adaptive(reach=1.2, first_pages=first_pages, guard=0)
    candidates, chosen = chosen_of(scene, selector, alpha, slopes)
    reaches = page_reaches(candidates, selector.reach)
    heads = torch.as_tensor(alpha).expand(6).view(2, 3)
    left_out = 0
    for b, length in enumerate([701, 333]):
        full = (length - 1) // 16
        scores = true_scores(scene, b, alpha, slopes)
        for h in range(2):
            read = chosen[b, h].repeat_interleave(16)[:length]
            read = torch.nn.functional.pad(read[: full * 16], (0, length - full * 16), value=True)
            for g in range(3):
                tau = entmax_threshold(scores[h, g, read], heads[h, g].item())
                unread = ~chosen[b, h, :full]
                assert (reaches[b, h, g, :full][unread] <= tau + 1e-9).all()
                left_out += int(unread.sum())
    assert left_out > 50


def test_pages_are_those_that_reach_the_threshold_of_the_first_ones():
    scene = make_scene([1100], group=1, kv_heads=1, statistics=BOX, spread=3, coherence=0.9)
    selector = Adaptive(reach=1.5, first_pages=4, guard=0)
    candidates, chosen = chosen_of(scene, selector)
    reaches = page_reaches(candidates, selector.reach)[0, 0, 0]
    scores = true_scores(scene, 0, 1.5, None)[0, 0]
    ranks = page_reaches(candidates)[0, 0, 0]
    first = [c + 3 * int(ranks[c:68:3].argmax()) for c in range(3)]
    read = torch.zeros(len(scores), dtype=torch.bool)
    read[68 * 16 :] = True
    for page in first:
        read[page * 16 : page * 16 + 16] = True
    expected = reaches[:68] > entmax_threshold(scores[read], 1.5)
    expected[first] = True
    assert 5 < expected.sum() < 40
    assert torch.equal(chosen[0, 0, :68], expected)


def test_long_sequences_have_more_first_pages():
    tokens = 5 * FIRST_SHARE * 16 + 1
    scene = make_scene([tokens, 100], group=2, kv_heads=1, head_size=16, statistics=BOX)
    candidates, _ = chosen_of(scene, Adaptive())
    first = choose_first(candidates, 3)
    assert first.shape == (2, 1, 2, 4)
    assert torch.equal(first[0] % 4, torch.arange(4).expand(1, 2, 4))
    assert torch.equal(first[1, ..., :2] % 2, torch.arange(2).expand(1, 2, 2))
    assert (first[1, ..., 2:] == 6).all()


def test_a_head_reaches_as_far_as_its_first_pages_show():
    scene = make_scene([1100], group=2, kv_heads=1, statistics=BOX, spread=6, coherence=0.9)
    candidates, _ = chosen_of(scene, Adaptive())
    first = choose_first(candidates, 5)[0, 0]
    scores = true_scores(scene, 0, 1.5, None)[0]
    center = page_reaches(candidates, 0.0)[0, 0]
    spread = page_reaches(candidates, 1.0)[0, 0] - center
    wanted = torch.zeros(68, dtype=torch.bool)
    for head in range(2):
        height = scores[head, : 68 * 16].view(68, 16).amax(1)
        ratio = ((height - center[head, :68]) / spread[head, :68])[first[head]].max()
        pages = [*first[head].tolist(), 68]
        tau = entmax_threshold(torch.cat([scores[head, p * 16 : p * 16 + 16] for p in pages]), 1.5)
        wanted |= center[head, :68] + 1.2 * ratio * spread[head, :68] > tau
        wanted[first[head]] = True
    chosen = chosen_of(scene, Adaptive(margin=1.2, first_pages=5, guard=0))[1]
    assert wanted.sum() < 60
    assert torch.equal(chosen[0, 0, :68], wanted)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_pages_of_equal_keys_are_chosen_without_loss(alpha):
    scene = make_scene([517, 90, 16, 1], group=2, statistics=BOX, spread=8, coherence=1.0)
    report = report_of(scene, Adaptive(first_pages=2), alpha=alpha)
    assert report.dropped_mass.max() < 1e-12
    assert (report.support_recall == 1).all()
    assert report.selected[0].float().mean() < 0.7


def test_pages_with_larger_radii_than_their_neighbours_are_judged_by_their_bounds():
    scene = make_scene([1050, 333], group=2, statistics=BOX, spread=3, coherence=0.7)
    candidates, few = chosen_of(scene, Adaptive(reach=0.01, first_pages=2, guard=0))
    chosen = chosen_of(scene, Adaptive(reach=0.01, first_pages=2, guard=1.1))[1]
    first = choose_first(candidates, 2)
    scores = read_first(candidates, first, scene.cache, ids_of(scene, candidates))
    lowest = lower_threshold(candidates, scores)
    reaches = (radius_bounds(candidates) > lowest[..., None]).any(2)
    radius = candidates.radius[..., 0]
    for b, pages in enumerate([65, 20]):
        for h in range(2):
            for block in range(0, pages, NEIGHBOURS):
                near = slice(block, min(block + NEIGHBOURS, pages))
                outlying = radius[b, h, near] > 1.1 * radius[b, h, near].mean()
                wanted = few[b, h, near] | (outlying & reaches[b, h, near])
                assert torch.equal(chosen[b, h, near], wanted)
    assert few.sum() < chosen.sum() < reaches.sum()


def test_an_isolated_needle_is_found_by_its_bound_alone():
    scene = make_scene([1600], group=1, kv_heads=1, statistics=BOX, spread=2, coherence=0.99)
    query = scene.last_queries[0, 0]
    scores = true_scores(scene, 0, 1.5, None)[0, 0]
    lacking = scores.max() + 0.9 - scores[804]
    factor = 0.5 * scene.scale
    scene.key[0][804] += query * lacking / (factor * query.square().sum())
    scene.append_all()
    blind = Adaptive(reach=0.7, first_pages=2, guard=0)
    assert report_of(scene, blind).dropped_mass.item() > 0.5
    assert report_of(scene, Adaptive(reach=0.7, first_pages=2)).dropped_mass.item() < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_newest_tokens_count_in_the_threshold(seed):
    # Stale pages are poison: a step that read another page for the last one would choose others.
    scene = make_scene([407, 221], group=2, statistics=BOX, spread=5, coherence=0.8, seed=seed)
    selector = Adaptive(reach=1.0, first_pages=2, guard=0)
    chosen = chosen_of(scene, selector)[1]
    selected = report_of(scene, selector).selected
    for b, length in enumerate([407, 221]):
        full = length // 16
        assert selected[b, :, :full].equal(chosen[b, :, :full])
        assert selected[b, :, full].all()


def test_a_wider_reach_reads_more_and_an_endless_one_everything():
    scene = make_scene([900], group=2, statistics=BOX, spread=3, coherence=0.7)
    shares = [
        chosen_of(scene, Adaptive(reach, first_pages=2, guard=0))[1][..., :56].float().mean().item()
        for reach in (0.5, 1.0, 1.75, 100.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert shares[-1] == 1


def test_a_sequence_reads_the_same_pages_alone():
    together = make_scene([450, 210, 777], group=2, statistics=BOX, spread=4, coherence=0.8)
    chosen = report_of(together, Adaptive(first_pages=3)).selected
    for b, length in enumerate([450, 210, 777]):
        queries = together.last_queries[b : b + 1]
        alone = analyze_decode(
            queries,
            together.cache,
            together.block_table[b : b + 1],
            together.seq_lens[b : b + 1],
            scale=together.scale,
            alpha=1.5,
            selector=Adaptive(first_pages=3),
        )
        pages = -(-length // 16)
        assert alone.selected[0].equal(chosen[b, :, :pages])


def test_the_bound_of_dropped_mass_holds():
    scene = make_scene([600, 340], group=4, statistics=BOX, spread=4, coherence=0.6)
    report = report_of(scene, Adaptive(reach=0.6, first_pages=2))
    assert report.dropped_mass.max() > 0.01
    assert (report.dropped_bound >= report.dropped_mass - 1e-12).all()


def test_decoding_is_the_exact_entmax_of_the_chosen_pages():
    scene = make_scene([300, 77], group=2, statistics=BOX, spread=4, coherence=0.9)
    report = report_of(scene, Adaptive())
    error = (scene.decode(selector=Adaptive()) - scene.dense_decode()).norm(dim=-1)
    norm = scene.dense_decode().norm(dim=-1)
    torch.testing.assert_close(error / norm, report.output_error, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    "selector, name", [(Adaptive(), "adaptive"), (Exact(prune=True), "pruned")]
)
def test_softmax_is_refused(selector, name):
    scene = make_scene([50], statistics=BOX)
    with pytest.raises(ValueError, match=rf"alpha is 1 .*above 1 with the {name} selector"):
        scene.decode(selector=selector, alpha=1.0)


PRUNE = Exact(prune=True, first_pages=3)


@pytest.mark.parametrize("alpha", [1.5, ALPHAS], ids=["one alpha", "an alpha for each head"])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["no ALiBi", "ALiBi"])
def test_pruned_pages_hold_no_weight(alpha, slopes):
    scene = make_scene([0, 701, 333, 17], group=3, statistics=BOX, spread=4, coherence=0.99)
    options = {"alpha": alpha, "alibi_slopes": slopes}
    alphas = alpha.tolist() if isinstance(alpha, torch.Tensor) else alpha
    report = report_of(scene, PRUNE, **options)
    assert (report.dropped_mass == 0).all() and (report.dropped_bound == 0).all()
    assert (report.support_recall[1:] == 1).all()
    assert 0.05 < report.selected[1].float().mean() < 0.9
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    certificate = torch.full((4, 6), torch.nan)
    out = scene.decode(selector=PRUNE, counters=counters, certificate=certificate, **options)
    torch.testing.assert_close(
        out, scene.dense_decode(alpha=alphas, slopes=slopes), atol=1e-12, rtol=0
    )
    assert (certificate == 0).all()
    assert counters[Counter.PAGES_READ] == report.selected.sum() < counters[Counter.PAGES_HELD]


def test_independent_keys_are_read_whole_and_distance_prunes_them():
    scene = make_scene([1100], statistics=BOX, spread=1)
    assert report_of(scene, PRUNE).selected.all()
    slopes = torch.tensor([0.5, 0.25, 0.5, 0.25])
    report = report_of(scene, PRUNE, alibi_slopes=slopes)
    assert report.selected.float().mean() < 0.5
    assert (report.dropped_mass == 0).all()


def test_an_infinite_key_prunes_nothing():
    scene = make_scene([400], group=1, kv_heads=1, statistics=BOX, spread=4, coherence=0.999)
    assert not report_of(scene, PRUNE).selected.all()
    scene.key[0][100, 0, 3] = -torch.inf if scene.last_queries[0, 0, 3] > 0 else torch.inf
    scene.append_all()
    assert report_of(scene, PRUNE).selected.all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reach": 0.0}, "reach is 0.0"),
        ({"reach": float("nan")}, "reach is nan"),
        ({"reach": float("inf")}, "reach is inf"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"first_pages": 1}, "first_pages is 1"),
        ({"guard": 0.9}, "guard is 0.9"),
        ({"guard": float("inf")}, "guard is inf"),
    ],
    ids=[
        "no reach",
        "a reach that is no number",
        "an infinite reach",
        "no margin",
        "no first page besides the last",
        "a guard below what is usual",
        "an infinite guard",
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**settings)
