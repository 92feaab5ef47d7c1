"""Time attention where an engine has it: between the matrix products of a layer, after its append.

Steps of one sequence, one for each layer of a Llama shape, as one CUDA graph: the products before
attention, the append of the new token, attention, the products after it. Every layer has weights
of its own, so that caches and translations of addresses hold what they would hold in an engine.
What a step takes is the graph's time a layer, less that of a graph without attention; graphs take
turns. `alone` is the same without the products.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from entmaxkv_kernels import Exact, NewTokens, Selector, TopK, decode
from entmaxkv_vllm.bench.arms import EntmaxArm
from entmaxkv_vllm.bench.batch import Request
from entmaxkv_vllm.bench.peers import flash_attention
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.timing import Step, alternate, graph_of
from entmaxkv_vllm.bench.workload import ALPHA, Pool, Shape, Workload

POOL_TOKENS = 1 << 20
INTERMEDIATE = 3.5
"""Of the hidden size, as in Llama's 8B."""

Attend = Callable[[int], object]
"""Appends to one set of pages and attends over it."""


class Products:
    """The weights of some layers, and what they are multiplied with before and after attention."""

    def __init__(self, layers: int, shape: Shape) -> None:
        hidden = shape.query_heads * shape.head_size
        qkv = hidden + 2 * shape.kv_heads * shape.head_size
        wide = int(INTERMEDIATE * hidden)
        sizes = ((qkv, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide))
        options: dict[str, Any] = {"device": shape.device, "dtype": shape.dtype}
        self.weights = [[torch.randn(*x, **options) * 0.02 for x in sizes] for _ in range(layers)]
        self.row = torch.randn(1, hidden, **options)

    def step(self, layer: int, attend: Step) -> Step:
        qkv, output, up, down = self.weights[layer]
        linear, normed = torch.nn.functional.linear, torch.nn.functional.rms_norm

        def run() -> None:
            linear(normed(self.row, self.row.shape[1:]), qkv)
            attend()
            middle = linear(self.row, output)
            gate, value = linear(normed(middle, middle.shape[1:]), up).chunk(2, -1)
            linear(torch.nn.functional.silu(gate) * value, down)

        return run


def new_tokens(work: Workload) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A key and a value [1, kv_heads, head_size], and their slot in each set of pages."""
    shape, last = work.shape, work.longest - 1
    options: dict[str, Any] = {"device": shape.device, "dtype": shape.dtype}
    key, value = torch.randn(2, 1, shape.kv_heads, shape.head_size, **options)
    pages = work.tables[:, :1, last // shape.page_size].long()
    return key, value, list(pages * shape.page_size + last % shape.page_size)


def append_as_vllm(work: Workload) -> Attend:
    """vLLM's own append to FlashAttention's cache."""
    from vllm import _custom_ops as ops

    key, value, slots = new_tokens(work)
    one = torch.ones(1, device=work.shape.device)
    return lambda index: ops.reshape_and_cache_flash(
        key, value, *work.pool.paged, slots[index], "auto", one, one
    )


def flash_arm(work: Workload) -> Attend:
    appends, steps = append_as_vllm(work), flash_attention(work)["fa3_scheduled"]

    def attend(index: int) -> None:
        appends(index)
        steps[index]()

    return attend


def entmax_arm(work: Workload, selector: Selector) -> Attend:
    """As the backend does: flags of exact rows with a sparse selector, the step appends."""
    arm, shape = EntmaxArm(work, selector), work.shape
    key, value, slots = new_tokens(work)
    exact_rows = torch.zeros(1, dtype=torch.bool, device=shape.device)
    kernels: dict[str, Any] = {"counters": arm.counters, "implementation": shape.implementation}

    def attend(index: int) -> None:
        decode(
            work.queries[index],
            arm.cache,
            work.tables[index],
            work.lengths,
            scale=shape.scale,
            alpha=ALPHA,
            selector=selector,
            exact_rows=exact_rows if selector.statistics else None,
            out=arm.outs[index],
            workspace=arm.workspace,
            new_tokens=NewTokens(key, value, slots[index]),
            **kernels,
        )

    return attend


def attend_nothing(index: int) -> None:
    """What graphs without attention have in its place."""


def measure(work: Workload, products: Products, share: float, repeats: int) -> Iterator[dict]:
    """One row for each arm."""
    layers = len(products.weights)
    budget = max(work.shape.page_size, int(share * work.longest))
    arms: dict[str, Attend] = {
        "fa3": flash_arm(work),
        "exact": entmax_arm(work, Exact()),
        "topk": entmax_arm(work, TopK(budget)),
    }
    graphs: dict[str, Step] = {}
    for name, attend in {"none": attend_nothing, **arms}.items():
        steps: list[Step] = [partial(attend, i % work.sets) for i in range(layers)]
        graphs[name] = graph_of([products.step(i, x) for i, x in enumerate(steps)]).replay
        if name in arms:
            graphs[f"{name} alone"] = graph_of(steps).replay
    us = {k: [t / layers for t in times] for k, times in alternate(graphs, repeats).items()}
    median = {name: statistics.median(times) for name, times in us.items()}
    for name in arms:
        yield {
            "layers": layers,
            "context": work.longest,
            "table_tokens": work.table_tokens,
            "arm": name,
            "us": median[name] - median["none"],
            "us_spread": max(us[name]) - min(us[name]),
            "products_us": median["none"],
            "alone_us": median[f"{name} alone"],
            "ratio_fa3": (median["fa3"] - median["none"]) / (median[name] - median["none"]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--more", type=int, default=512, help="room of the table beyond a context")
    parser.add_argument("--share", type=float, default=0.05, help="share of pages that top-k reads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = Shape(32, 8, 128)
    pool = Pool.of(shape, POOL_TOKENS, "random")
    rows: list[dict[str, Any]] = []
    result = about(arguments.commit) | {"rows": rows}
    for layers in arguments.layers:
        products = Products(layers, shape)
        for context in arguments.contexts:
            sets = min(layers, POOL_TOKENS // context)
            requests = [Request(1, context)]
            work = Workload.over(pool, requests, sets, 0.005, context + arguments.more)
            for row in measure(work, products, arguments.share, arguments.repeats):
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
                rows.append(row)
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        del products
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
