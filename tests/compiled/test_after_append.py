"""Decoding that starts while the newest tokens are still being appended."""

import pytest
import torch

from entmaxkv_kernels import (
    Exact,
    Gaussian,
    PageLayout,
    TopK,
    allocate_pages,
    append,
    decode,
    split_pages,
)
from entmaxkv_kernels.triton import decode_workspace_size

from .device import DEVICE

PAGE = 16
ON_GPU = DEVICE == "cuda"
KV_HEADS, GROUP, HEAD_SIZE = (8, 4, 128) if ON_GPU else (2, 2, 16)
STEPS, REPLAYS = (8, 25) if ON_GPU else (2, 1)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

SHORT = [96, 97, 1, 17, 16, 200, 95, 0]
"""The second sequence shares all full pages of the first, which fills its last one in the step."""

CASES = {
    "all scores stored": (Exact(), SHORT, 256, {}),
    "window": (Exact(), SHORT, 256, {"sliding_window": 50}),
    "several tiles a program": (Exact(), [9008, 9009, 20001, 33], 20016, {}),
    "short rows beside a guessed one": (Exact(), [40000, 40001, 97, 2048, 129], 40016, {}),
    "chosen by who reads": (TopK(64), SHORT, 256, {"exact_below": 32}),
    "certified": (TopK(64), SHORT, 256, {"exact_below": 32, "certify": True}),
    "chosen from a long table": (TopK(2048), [40000, 40001, 97, 2049], 40016, {}),
    "guessed from a list": (TopK(66000), [80000, 80001, 97], 131072, {}),
    "gaussian": (Gaussian(), SHORT, 256, {"exact_below": 32}),
    "alpha per head": (Exact(), SHORT, 256, {"alpha": [1.0, 1.5, 2.0, 1.2][:GROUP] * KV_HEADS}),
}
HEAVY = [name for name, (_, lengths, _, _) in CASES.items() if max(lengths) > 1000]


class Sequences:
    """Sequences whose newest token is appended again in every step, with another key and value."""

    def __init__(self, selector, lengths, most, options):
        random = torch.Generator(DEVICE).manual_seed(1)
        width = -(-most // PAGE)
        layout = PageLayout(PAGE, HEAD_SIZE, selector.statistics)
        pool = allocate_pages(1 + len(lengths) * width, KV_HEADS, layout, DTYPE, DEVICE)
        self.cache = split_pages(pool, layout)
        self.table = 1 + torch.arange(len(lengths) * width, dtype=torch.int32, device=DEVICE)
        self.table = self.table.view(len(lengths), width)
        self.table[1, : lengths[0] // PAGE] = self.table[0, : lengths[0] // PAGE]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        last = self.lengths.long() - 1
        page = self.table.gather(1, (last.clamp(min=0) // PAGE)[:, None])[:, 0].long()
        self.slots = torch.where(last >= 0, page * PAGE + last % PAGE, -1)

        def normal(*shape):
            return torch.randn(*shape, generator=random, device=DEVICE).to(DTYPE)

        for row, length in enumerate(lengths):
            slots = torch.arange(length, device=DEVICE)
            slots = self.table[row].long()[slots // PAGE] * PAGE + slots % PAGE
            rows = normal(2, length, KV_HEADS, HEAD_SIZE)
            append(self.cache, *rows, slots, implementation="triton")
        self.query = normal(STEPS, len(lengths), KV_HEADS * GROUP, HEAD_SIZE)
        # Large ones, of which every step's output tells which it saw.
        self.key = 2 * normal(STEPS, len(lengths), KV_HEADS, HEAD_SIZE)
        self.value = 50 * normal(STEPS, len(lengths), KV_HEADS, HEAD_SIZE)
        self.out = torch.full_like(self.query, torch.nan)
        shape = KV_HEADS * GROUP, KV_HEADS, HEAD_SIZE, PAGE, DTYPE, width * PAGE
        size = decode_workspace_size(
            len(lengths),
            *shape,
            selector=selector,
            exact_below=options.get("exact_below", 0),
            certificate=options.get("certify", False),
            device=DEVICE,
        )
        options = dict(options)
        self.certificate = None
        if options.pop("certify", False):
            self.certificate = torch.full(self.query.shape[:3], torch.nan, device=DEVICE)
        self.options = {
            "scale": HEAD_SIZE**-0.5,
            "alpha": 1.5,
            "selector": selector,
            "implementation": "triton",
            "workspace": torch.full((size,), 255, dtype=torch.uint8, device=DEVICE),
            **options,
        }

    def step(self, step, **options):
        append(self.cache, self.key[step], self.value[step], self.slots, implementation="triton")
        return decode(
            self.query[step],
            self.cache,
            self.table,
            self.lengths,
            out=self.out[step],
            certificate=None if self.certificate is None else self.certificate[step],
            **self.options,
            **options,
        )


@pytest.mark.parametrize("case", CASES)
def test_decoding_right_after_append_sees_what_was_appended(case):
    if not ON_GPU and case in HEAVY:
        pytest.skip("long sequences take minutes in the interpreter, which runs nothing at once")
    sequences = Sequences(*CASES[case])
    for step in range(STEPS):
        sequences.step(step)
        if ON_GPU:
            torch.cuda.synchronize()
    expected = sequences.out.clone()
    certificate = sequences.certificate
    expected_certificate = None if certificate is None else certificate.clone()
    assert not torch.equal(expected[0], expected[1])

    def run_all():
        for step in range(STEPS):
            sequences.step(step, after_append=True)

    replay = run_all
    if ON_GPU:
        run_all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        replay = graph.replay
    for _ in range(REPLAYS):
        sequences.out.fill_(torch.nan)
        if certificate is not None:
            certificate.fill_(torch.nan)
        replay()
        assert torch.equal(sequences.out, expected)
        assert certificate is None or torch.equal(certificate, expected_certificate)
