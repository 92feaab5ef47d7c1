"""The small context whose whole course through the selectors is known, compiled."""

import pytest
import torch
from reference import golden

from entmaxkv_kernels import (
    Counter,
    Exact,
    Gaussian,
    TopK,
    allocate_pages,
    append,
    decode,
    split_pages,
)

from .device import DEVICE

OUTPUT = torch.tensor([0.807636, 0.738207, -0.009925, -0.748933], dtype=torch.float64)
"""Of exact attention, and of attention over pages 5 to 8, which hold all support."""


@pytest.mark.parametrize(
    "selector, pages",
    [(Exact(), 11), (TopK(64), 5), (Gaussian(), 5), (Gaussian(shared_spread=True), 5)],
    ids=lambda value: getattr(value, "name", f"{value} pages"),
)
def test_the_known_pages_are_read_and_give_the_known_output(selector, pages):
    exact_cache, block_table, seq_lens = golden.golden_cache(selector.statistics)
    layout = exact_cache.layout
    cache = split_pages(allocate_pages(11, 1, layout, torch.float32, DEVICE), layout)
    rows = (x.float().to(DEVICE) for x in (golden.KEY, golden.VALUE))
    append(cache, *rows, torch.arange(golden.LENGTH, device=DEVICE), implementation="triton")
    counters = torch.zeros(len(Counter), dtype=torch.int64, device=DEVICE)
    out = decode(
        golden.QUERY.float().to(DEVICE),
        cache,
        block_table.to(DEVICE),
        seq_lens.to(DEVICE),
        scale=golden.SCALE,
        alpha=golden.ALPHA,
        selector=selector,
        counters=counters,
        implementation="triton",
    )
    assert (out[0, 0, :4].cpu().double() - OUTPUT).abs().max() <= 2e-6
    assert counters[Counter.PAGES_READ] == pages
    assert counters[Counter.SUPPORT] == 14
