"""Decoding that appends the newest tokens."""

from importlib import import_module

import pytest
import torch

from entmaxkv_kernels import (
    Counter,
    Exact,
    Gaussian,
    NewTokens,
    PageLayout,
    TopK,
    allocate_pages,
    append,
    decode,
    split_pages,
)
from entmaxkv_kernels.pages import CODES, FP8
from entmaxkv_kernels.triton import decode_workspace_size
from entmaxkv_kernels.triton.decode import step_shape

from .device import DEVICE, ON_GPU, on_a_gpu

PAGE = 16
KV_HEADS, GROUP, HEAD_SIZE = (8, 4, 128) if ON_GPU else (2, 2, 16)
SHARED = ("key_scale", "value_scale", "counters", "implementation")
"""What append and decode are both given."""
STEPS, REPLAYS = (8, 25) if ON_GPU else (2, 1)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

SHORT = [97, 96, 1, 17, 16, 200, 95, 0]
"""The first sequence shares all full pages of the second, which fills its last one in the step; it
is flagged to be read whole."""

CASES = {
    "all scores stored": (Exact(), SHORT, 256, {}),
    "window": (Exact(), SHORT, 256, {"sliding_window": 50}),
    "several tiles a program": (Exact(), [9009, 9008, 20001, 33], 20016, {}),
    "short rows beside a guessed one": (Exact(), [40001, 40000, 97, 2048, 129], 40016, {}),
    "chosen by who reads": (TopK(64), SHORT, 256, {"exact_below": 32}),
    "certified": (TopK(64), SHORT, 256, {"exact_below": 32, "certify": True}),
    "exact, pages of 32": (Exact(), SHORT, 256, {"page": 32}),
    "pages of 32": (TopK(64), SHORT, 256, {"page": 32, "certify": True}),
    "fp8": (TopK(64), SHORT, 256, {"certify": True, "key_scale": 0.3, "value_scale": 7.0}),
    "by codes": (TopK(64, codes=True), SHORT, 256, {"exact_below": 32, "certify": True}),
    "by codes, fp8": (TopK(64, codes=True), SHORT, 256, {"key_scale": 0.3, "value_scale": 7.0}),
    "by codes, pages of 32": (TopK(64, codes=True), SHORT, 256, {"page": 32}),
    "by codes, from a long table": (TopK(2048, codes=True), [40001, 40000, 97], 40016, {}),
    "chosen by launches": (TopK(4096), [70001, 70000, 131, 33000], 131072, {"certify": True}),
    "chosen from a long table": (TopK(2048), [40001, 40000, 97, 2049], 40016, {}),
    "guessed from a list": (TopK(66000), [80001, 80000, 97], 131072, {}),
    "exact that prunes, none flagged": (Exact(prune=True), SHORT, 256, {"exact_rows": None}),
    "gaussian": (Gaussian(), SHORT, 256, {"exact_below": 32}),
    "alpha per head": (Exact(), SHORT, 256, {"alpha": [1.0, 1.5, 2.0, 1.2][:GROUP] * KV_HEADS}),
}
HEAVY = [name for name, (_, lengths, _, _) in CASES.items() if max(lengths) > 1000]
HEAVY += ["by codes, fp8", "by codes, pages of 32", "pages of 32", "exact, pages of 32"]
HEAVY += ["exact that prunes, none flagged", "gaussian"]


class Sequences:
    """Sequences whose newest token is appended again in every step, with another key and value."""

    def __init__(self, selector, lengths, most, options):
        random = torch.Generator(DEVICE).manual_seed(1)
        options = dict(options)
        self.page = page_size = options.pop("page", PAGE)
        width = -(-most // page_size)
        fp8 = "key_scale" in options
        scales = {name: options[name] for name in options if name.endswith("_scale")}
        # Smaller keys have no codes.
        head_size = max(64, HEAD_SIZE) if selector.statistics == CODES else HEAD_SIZE
        layout = PageLayout(page_size, head_size, selector.statistics, fp8=fp8)
        dtype = FP8 if fp8 else DTYPE
        pool = allocate_pages(1 + len(lengths) * width, KV_HEADS, layout, dtype, DEVICE)
        self.cache = split_pages(pool, layout)
        self.table = 1 + torch.arange(len(lengths) * width, dtype=torch.int32, device=DEVICE)
        self.table = self.table.view(len(lengths), width)
        self.table[0, : lengths[1] // page_size] = self.table[1, : lengths[1] // page_size]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        last = self.lengths.long() - 1
        page = self.table.gather(1, (last.clamp(min=0) // page_size)[:, None])[:, 0].long()
        self.slots = torch.where(last >= 0, page * page_size + last % page_size, -1)

        def normal(*shape):
            return torch.randn(*shape, generator=random, device=DEVICE).to(DTYPE)

        for row, length in enumerate(lengths):
            slots = torch.arange(length, device=DEVICE)
            slots = self.table[row].long()[slots // page_size] * page_size + slots % page_size
            rows = normal(2, length, KV_HEADS, head_size)
            append(self.cache, *rows, slots, implementation="triton", **scales)
        self.query = normal(STEPS, len(lengths), KV_HEADS * GROUP, head_size)
        # Large ones, of which every step's output tells which it saw.
        self.key = 2 * normal(STEPS, len(lengths), KV_HEADS, head_size)
        self.value = 50 * normal(STEPS, len(lengths), KV_HEADS, head_size)
        self.out = torch.full_like(self.query, torch.nan)
        shape = KV_HEADS * GROUP, KV_HEADS, head_size, page_size, dtype, width * page_size
        size = decode_workspace_size(
            len(lengths),
            *shape,
            selector=selector,
            exact_below=options.get("exact_below", 0),
            certificate=options.get("certify", False),
            device=DEVICE,
        )
        self.certificate = None
        if options.pop("certify", False):
            self.certificate = torch.full(self.query.shape[:3], torch.nan, device=DEVICE)
        self.options = {
            "scale": head_size**-0.5,
            "exact_rows": torch.arange(len(lengths), device=DEVICE) == 0,
            "counters": torch.zeros(len(Counter), dtype=torch.int64, device=DEVICE),
            "alpha": 1.5,
            "selector": selector,
            "implementation": "triton",
            "workspace": torch.full((size,), 255, dtype=torch.uint8, device=DEVICE),
            **options,
        }

    def step(self, step, at_once):
        new_tokens = NewTokens(self.key[step], self.value[step], self.slots)
        if not at_once:
            given = {x: self.options[x] for x in self.options if x in SHARED}
            append(self.cache, *new_tokens, **given)
        decode(
            self.query[step],
            self.cache,
            self.table,
            self.lengths,
            out=self.out[step],
            certificate=None if self.certificate is None else self.certificate[step],
            new_tokens=new_tokens if at_once else None,
            **self.options,
        )

    def forget(self):
        """Erase what a step writes."""
        self.out.fill_(torch.nan)
        self.options["counters"].zero_()
        if self.certificate is not None:
            self.certificate.fill_(torch.nan)
        written = self.slots[self.slots >= 0]
        place = written // self.page, slice(None), written % self.page
        nothing = torch.full_like(self.key[0][self.slots >= 0], torch.nan).to(self.cache.key.dtype)
        self.cache.key[place] = self.cache.value[place] = nothing
        self.cache.statistics[written // self.page] = 0
        self.cache.scales[written // self.page] = 0

    def written(self):
        """What a step writes."""
        written = self.slots[self.slots >= 0]
        place = written // self.page, slice(None), written % self.page
        found = [x[place].float() for x in (self.cache.key, self.cache.value)]
        found += [x[written // self.page] for x in (self.cache.statistics, self.cache.scales)]
        found += [self.out.clone(), self.options["counters"].clone()]
        return found if self.certificate is None else [*found, self.certificate.clone()]


@pytest.mark.parametrize("case", CASES)
def test_decoding_with_new_tokens_is_appending_and_decoding(case):
    if not ON_GPU and case in HEAVY:
        pytest.skip("too long for the interpreter, which runs nothing at once")
    assert_at_once_is_in_turn(Sequences(*CASES[case]))


@on_a_gpu
def test_a_guess_sees_no_key_that_its_step_appends(monkeypatch):
    launches = import_module("entmaxkv_kernels.triton.decode")
    monkeypatch.setattr(launches, "processors", lambda device: 1)
    monkeypatch.delattr(launches, "append")  # who lists the keys appends
    sequences = Sequences(Exact(), [513, 512, 1, 17, 129, 300, 127, 0], 600, {})
    shape = step_shape(sequences.query[0], sequences.cache, sequences.table, Exact(), 0)
    workspace = sequences.options["workspace"][: shape.size(shape.tile)]
    sequences.options["workspace"] = workspace
    assert_at_once_is_in_turn(sequences)
    guess = shape.divide(workspace, shape.tile)["guess"].view(len(sequences.lengths), -1)
    guessed = sequences.lengths > shape.tile * shape.splits
    assert torch.equal(guess.isfinite().all(1), guessed)
    at_once = guess.clone()
    sequences.step(STEPS - 1, at_once=False)
    assert torch.equal(guess, at_once)


@pytest.mark.parametrize(
    ("lengths", "most", "options"),
    [
        ([49, 48, 1, 17, 33, 0, 16, 32], 64, {}),
        ([49, 48, 1, 17, 33, 0, 16, 200], 256, {"sliding_window": 20}),
    ],
    ids=["all", "in windows"],
)
def test_a_guess_from_what_the_step_appends_comes_after_it(lengths, most, options, monkeypatch):
    monkeypatch.setattr(
        import_module("entmaxkv_kernels.triton.decode"), "processors", lambda device: 1
    )
    sequences = Sequences(Exact(), lengths, most, options)
    shape = step_shape(sequences.query[0], sequences.cache, sequences.table, Exact(), 0)
    sequences.options["workspace"] = sequences.options["workspace"][: shape.least_size]
    assert_at_once_is_in_turn(sequences)


def assert_at_once_is_in_turn(sequences):
    """Steps with new tokens write what `append` and steps after it do, to the bit."""
    sequences.forget()
    for step in range(STEPS):
        sequences.step(step, at_once=False)
        if ON_GPU:
            torch.cuda.synchronize()
    expected = sequences.written()
    assert not torch.equal(sequences.out[0], sequences.out[1])

    def run_all():
        for step in range(STEPS):
            sequences.step(step, at_once=True)

    replay = run_all
    if ON_GPU:
        run_all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        replay = graph.replay
    for _ in range(REPLAYS):
        sequences.forget()
        replay()
        for found, wanted in zip(sequences.written(), expected, strict=True):
            assert torch.equal(found, wanted)
