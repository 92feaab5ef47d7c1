"""What a compiled step says of what it left out: what the reference says, and never too little."""

from importlib import import_module

import pytest
import torch
from reference.scene import make_fp8_scene, make_scene
from reference.test_append import keys_to_bound
from reference.test_quest import PAGES, boxed_pages, queries_against

from entmaxkv_kernels import (
    Counter,
    Exact,
    Gaussian,
    PageLayout,
    TopK,
    allocate_pages,
    analyze_decode,
    append,
    decode,
    split_pages,
)
from entmaxkv_kernels.pages import BOX, CODES
from entmaxkv_kernels.reference.entmax import solve_entmax
from entmaxkv_kernels.triton import decode_workspace_size, workspace

from .device import DEVICE, DTYPES, ON_GPU, Step

RAGGED = [0, 1, 16, 17, 500, 300]
SLOPES = torch.tensor([0.5, 0.0, -0.05, 0.1])
HELD = workspace.HELD_LISTED
MIXED = torch.tensor([1.25, 1.0, 2.0, 4 / 3], dtype=torch.float64)

PATHS = {
    "scores in registers": {},
    "scores in lists": {"HELD_LISTED": 0},
    "pages listed by a program": {"RANKED_BY_READERS": 0},
    "pages listed by many programs": {"RANKED_ALONE": 32, "HELD_LISTED": 0},
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(workspace, name, value)


codes = pytest.mark.parametrize("codes", [False, True], ids=["by boxes", "by codes"])


def tight_scene(lengths=RAGGED, codes=False, **options):
    """Pages of keys that resemble each other, of which some heads prove something."""
    options = {"coherence": 0.999, "spread": 1.2, "dtype": torch.float32} | options
    return make_scene(lengths, statistics=CODES if codes else BOX, **options)


def check(scene, selector, workspace_size=None, **options):
    """The certificate [B, query_heads]: the reference's, to the rounding of sums, its size counted,
    and at least what the reference finds that was dropped."""
    step = Step(scene, selector, certify=True, **options)
    step.run(workspace_size)
    _, counters = step.run_reference()
    found, expected = step.certificate, step.expected_certificate
    # Where a page reaches the threshold just so, rounding decides between a proof and nearly one.
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-6)
    sizes = slice(Counter.CERTIFIED, None)
    filled = int((scene.seq_lens > 0).sum())
    assert step.counters[sizes].sum() == filled * found.shape[1]
    assert step.counters[Counter.CERTIFIED] == (found[scene.seq_lens > 0] == 0).sum()
    assert (step.counters[sizes] - counters[sizes]).abs().sum() <= 2
    assert (found[scene.seq_lens == 0] == 0).all()
    context = scene.last_queries, scene.cache, scene.block_table, scene.seq_lens
    report = analyze_decode(*context, **step.options)
    assert (found >= report.dropped_mass - 1e-5).all()
    assert (report.support_recall[(found == 0) & (scene.seq_lens > 0)[:, None]] == 1).all()
    return found


@pytest.mark.parametrize(
    "alpha, spread", [(1.5, 1.2), (2.0, 0.3), (4 / 3, 4.0), (1.2, 8.0), (1.0, 3.0)]
)
def test_certificates_are_those_of_the_reference(alpha, spread):
    found = check(tight_scene(spread=spread), TopK(64), alpha=alpha)
    sparse = found[4:]
    assert ((sparse > 0) & (sparse < 1)).any()
    assert alpha == 1 or (sparse == 0).any()


def test_whoever_lists_and_reads_the_pages(path):
    lengths = [0, 1, 40 * 16 + 3, 300, 1100]
    found = check(tight_scene(lengths), TopK(96))
    assert ((found[2:] > 0) & (found[2:] < 1)).any() and (found[2:] == 0).any()


def test_budgets_of_some_thousand_tokens_are_certified():
    selector = TopK(2200)
    scene = tight_scene([3000, 700], kv_heads=1)
    assert Step(scene, selector, certify=True).shape.held > 2048
    check(scene, selector)


@pytest.mark.parametrize("alpha", [1.5, 1.0], ids=["entmax", "softmax"])
@pytest.mark.parametrize("place", [33 * 16 + 5, -1], ids=["in a late split", "read unranked"])
@pytest.mark.parametrize("group", [2, 8], ids=["columns are left", "heads fill the columns"])
def test_rounding_goes_by_the_largest_page_wherever_it_is(group, place, alpha, monkeypatch):
    monkeypatch.setattr(workspace.Shape, "page_tile", 16)
    scene = tight_scene([9000], kv_heads=1, group=group, spread=1.2 if alpha > 1 else 4.0)
    usual = check(scene, TopK(96), alpha=alpha)
    shape = Step(scene, TopK(96), certify=True).shape
    assert shape.page_splits > 33 and (shape.padded_group > group) is (group == 2)
    page = scene.block_table[0, : -(-9000 // 16)][place]
    scene.cache.scales[page, :, 0] *= 1e3
    assert (check(scene, TopK(96), alpha=alpha) > usual + 0.005).any()


@pytest.mark.parametrize("held", [HELD, 0], ids=["scores in registers", "scores in lists"])
@pytest.mark.parametrize("parts", [1, 4], ids=["one program", "four that share a head"])
def test_bounds_of_more_pages_than_are_held_at_once_are_weighed_in_turn(held, parts, monkeypatch):
    monkeypatch.setattr(workspace, "HELD_LISTED", held)
    monkeypatch.setattr(workspace.Shape, "value_parts", parts)
    monkeypatch.setattr(workspace.Shape, "certificate_parts", lambda *_: parts)
    monkeypatch.setattr(workspace.Shape, "certificate_tile", lambda *_: 4)
    found = check(tight_scene([2300, 300]), TopK(96), alpha=MIXED, alibi_slopes=SLOPES)
    assert ((found > 0) & (found < 1)).any()


@codes
def test_heads_have_their_own_alpha_and_slope(path, codes):
    found = check(tight_scene([500, 300], codes), TopK(64, codes), alpha=MIXED, alibi_slopes=SLOPES)
    assert (found < 1).any()


@pytest.mark.parametrize("codes", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kv_heads, group, head_size, page_size",
    [(1, 16, 80, 32), (3, 1, 128, 16), (1, 3, 256, 64), (1, 20, 64, 16)],
)
def test_every_shape_of_heads_and_pages_is_served(
    kv_heads, group, head_size, page_size, dtype, codes
):
    shape = {"kv_heads": kv_heads, "group": group, "head_size": head_size, "page_size": page_size}
    scene = tight_scene([page_size - 1, 700], codes, dtype=dtype, **shape)
    check(scene, TopK(2 * page_size, codes))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("normal", DTYPES[-1]),
        ("outlier channels", torch.float32),
        ("of all magnitudes", torch.float32),
        ("huge", torch.float32),
    ],
)
def test_no_output_is_further_off_than_its_certificate_says(kind, dtype):
    """Queries for which a key scores as high as its page's radius allows, in steps that read two
    pages of twelve; values of at most 1."""
    random = torch.Generator().manual_seed(5)
    key = torch.cat([keys_to_bound(kind, random) for _ in range(PAGES)])
    # Many pages whose keys resemble each other: some steps prove something.
    key = torch.where(torch.arange(len(key))[:, None, None] % 32 < 16, key, key[::16][:1])
    key = key.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    value = (2 * torch.rand(key.shape, generator=random) - 1).to(dtype)
    judged = boxed_pages(key, torch.zeros(4, 1, 32, dtype=dtype), torch.float64)
    query = queries_against(key, judged)[:, 7::12]  # [4, 16, 32], of which 16 heads make a group
    scores = query @ key.double().permute(1, 2, 0)
    spread = scores.amax(-1, keepdim=True) - scores.amin(-1, keepdim=True)
    query = (8 * query / torch.where(spread > 0, spread, 1)).to(dtype)
    layout = PageLayout(16, 32, BOX)
    cache = split_pages(allocate_pages(PAGES, 4, layout, dtype, DEVICE), layout)
    slots = torch.arange(len(key), device=DEVICE)
    append(cache, key.to(DEVICE), value.to(DEVICE), slots, implementation="triton")
    certificate = torch.full((1, 64), torch.nan, device=DEVICE)
    output = decode(
        query.flatten(0, 1)[None].to(DEVICE),
        cache,
        torch.arange(PAGES, dtype=torch.int32, device=DEVICE)[None],
        torch.tensor([len(key)], dtype=torch.int32, device=DEVICE),
        scale=1.0,
        alpha=1.5,
        selector=TopK(16),
        certificate=certificate,
        implementation="triton",
    )
    scores = 0.5 * query.double() @ key.double().permute(1, 2, 0)
    weights, _ = solve_entmax(scores, 1.5)
    exact = weights @ value.double().transpose(0, 1)
    off = (output[0].cpu().double() - exact.flatten(0, 1)).norm(dim=-1)
    longest = value.double().norm(dim=-1).amax()
    assert (off <= 2 * longest * certificate[0].cpu().double() + 0.01 * longest).all()
    assert ((certificate >= 0) & (certificate <= 1)).all()


def test_fp8_pages_bound_the_numbers_that_they_hold():
    scales = {"key_scale": 0.25, "value_scale": 2.0}
    scene = make_fp8_scene(
        [17, 300], dtype=torch.float16, statistics=BOX, coherence=0.9999, spread=1.5, **scales
    )
    found = check(scene, TopK(64), scale=scene.scale * scales["key_scale"])
    assert (found[0] == 0).all()


def test_what_was_read_whole_is_certified():
    assert (check(tight_scene(), TopK(10**6)) == 0).all()
    exact_rows = torch.tensor([False, False, False, False, True, False])
    found = check(tight_scene(spread=0.1), TopK(0), exact_rows=exact_rows, exact_below=17)
    assert (found[:5] == 0).all() and (found[5] == 1).all()


@pytest.mark.parametrize("selector", [Exact(), TopK(16)], ids=lambda selector: selector.name)
def test_a_window_is_read_whole(selector):
    step = Step(tight_scene(), selector, certify=True, sliding_window=40)
    step.run()
    assert (step.certificate == 0).all()


def test_exact_steps_are_certified_at_any_length(path):
    step = Step(tight_scene(), Exact(), certify=True)
    step.run()
    assert (step.certificate == 0).all()
    assert step.counters[Counter.CERTIFIED] == 5 * 4


def test_means_and_deviations_certify_only_what_reads_everything():
    scene = make_scene(
        RAGGED, statistics=Gaussian.statistics, coherence=0.9, spread=6.0, dtype=torch.float32
    )
    step = Step(scene, Gaussian(), certify=True)
    step.run()
    step.run_reference()
    assert torch.equal(step.certificate, step.expected_certificate)
    assert (step.certificate[:4] == 0).all() and (step.certificate[4] == 1).all()


def test_heads_that_lists_do_not_serve_are_certified_too(monkeypatch):
    launches = import_module("entmaxkv_kernels.triton.decode")
    monkeypatch.setattr(launches, "processors", lambda device: 1)
    scene = tight_scene([600, 1], kv_heads=1)
    least = Step(scene, TopK(320), certify=True).shape.least_size
    found = check(scene, TopK(320), least)
    assert (found[0] < 1).any()


def test_bounds_that_are_no_numbers_prove_nothing():
    scene = tight_scene([500, 300])
    page = scene.block_table[0, 3].long()
    scene.cache.scales[page] = torch.nan
    step = Step(scene, TopK(64), certify=True)
    step.run()
    step.run_reference()
    assert (step.certificate[0] == 1).all() and (step.expected_certificate[0] == 1).all()
    assert (step.certificate[1] < 1).any()


def test_two_runs_give_the_same_bits(path):
    step = Step(tight_scene([700, 300]), TopK(64), certify=True)
    step.run()
    first = step.certificate
    step.run()
    assert torch.equal(step.certificate, first)


def test_nobody_else_s_output_depends_on_it(path):
    scene = tight_scene([700, 300])
    outputs = [Step(scene, TopK(64), certify=certify).run() for certify in (False, True)]
    assert torch.equal(*outputs)


def test_the_workspace_has_room_for_bounds():
    scene = tight_scene([500])
    step = Step(scene, TopK(64), certify=True)
    size = decode_workspace_size(
        1, 4, 2, 64, 16, torch.float32, scene.block_table.shape[1] * 16,
        selector=TopK(64), certificate=True, device=DEVICE,
    )  # fmt: skip
    assert step.shape.least_size <= step.shape.good_size <= size
