"""Time the decode kernels of the paper's own code beside this project's, on the same data.

The code is a checkout of github.com/deep-spin/entmaxkv, whose path is given. It takes as many KV
heads as query heads, one length, contiguous fp16 caches, and no CUDA graph, since it synchronises
with the host; its statistics are ready made and its new token is in the cache already. Its steps
are timed by events and this project's as a graph, each as it would be used.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_decode import (
    PAGE_SIZE,
    POOL_TOKENS,
    Case,
    calibrated_queries,
    entmax_steps,
    fill,
)
from timing import Step, about, alternate, graph_of

from entmaxkv_kernels import (
    Exact,
    Gaussian,
    PagedCache,
    PageLayout,
    TopK,
    allocate_pages,
    append,
    split_pages,
)

HEADS, HEAD_SIZE, ALPHA, SHARE = 8, 128, 1.5, 0.05


def reference_steps(key: torch.Tensor, value: torch.Tensor, query: torch.Tensor) -> dict[str, Step]:
    """Its dense entmax, top-k and Gaussian steps.

    key, value: [heads, N, head_size]; query: [heads, head_size]; all fp16.
    """
    from entmaxkv import (
        PagedKVCache,
        sparse_attention_decode_gaussian_aware_entmax,
        sparse_attention_decode_paged,
    )
    from entmaxkv.kernels.adadecode import sparse_attention_decode_orchestrator

    cache = PagedKVCache(page_size=PAGE_SIZE)
    cache.k_cache, cache.v_cache = key[None], value[None]
    paged = key.view(HEADS, -1, PAGE_SIZE, HEAD_SIZE)[None].float()
    cache.k_min, cache.k_max = (x.half() for x in (paged.amin(3), paged.amax(3)))
    cache.k_mean, cache.k_std = paged.mean(3).half(), paged.std(3, unbiased=False).half()
    context = key.shape[1]
    q, new = query[None, :, None], key[None, :, -1:]
    lengths = torch.tensor([context], dtype=torch.int32, device="cuda")
    positions = torch.arange(context, dtype=torch.int32, device="cuda")
    positions = positions.expand(1, HEADS, -1).contiguous()
    budget = max(PAGE_SIZE, int(SHARE * context) // PAGE_SIZE * PAGE_SIZE)
    read = torch.tensor([budget + PAGE_SIZE], dtype=torch.int32, device="cuda")
    common = {"q": q, "alpha": ALPHA, "out": torch.zeros_like(q), "q_seqlens": lengths}
    cached = common | {"kv_cache": cache, "k_new": new, "v_new": new, "append_cache": False}
    return {
        "dense": lambda: sparse_attention_decode_orchestrator(
            **common,
            k_cache=cache.k_cache,
            v_cache=cache.v_cache,
            cache_seqlens=lengths[:, None].expand(1, HEADS),
            token_positions=positions,
            niter=2,
        ),
        "topk": lambda: sparse_attention_decode_paged(
            **cached, token_budget=budget, cache_seqlens=read, niter=2
        ),
        "gaussian": lambda: sparse_attention_decode_gaussian_aware_entmax(**cached),
    }


def own_steps(
    case: Case, raw: PagedCache, tables: torch.Tensor, queries: torch.Tensor
) -> dict[str, list[Step]]:
    """This project's exact, top-k and Gaussian steps over the pages of `raw`."""
    steps = {}
    for name, selector in (
        ("dense", Exact()),
        ("topk", TopK(token_budget=max(PAGE_SIZE, int(SHARE * case.context)))),
        ("gaussian", Gaussian()),
    ):
        layout = PageLayout(PAGE_SIZE, HEAD_SIZE, selector.statistics)
        pages = split_pages(
            allocate_pages(len(raw.key), HEADS, layout, torch.float16, "cuda"), layout
        )
        for keys, values, first in zip(
            raw.key.split(4096),
            raw.value.split(4096),
            range(0, len(raw.key), 4096),
            strict=True,
        ):
            slots = torch.arange(len(keys) * PAGE_SIZE, device="cuda") + first * PAGE_SIZE
            key, value = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
            append(pages, key, value, slots, implementation="triton")
        steps[name], _, _ = entmax_steps(case, pages, tables, queries, selector)
    return steps


def measure(context: int, pages: PagedCache, repeats: int) -> list[dict[str, Any]]:
    case = Case(HEADS, HEADS, HEAD_SIZE, 1, context, 0.005, context)
    order = torch.randperm(POOL_TOKENS // PAGE_SIZE, dtype=torch.int32, device="cuda")
    tables = order[: case.sets * context // PAGE_SIZE].view(case.sets, 1, -1)
    queries = calibrated_queries(case, pages, tables)
    table = tables[0, 0].long()
    key, value = (x[table].transpose(0, 1).flatten(1, 2) for x in (pages.key, pages.value))
    theirs = reference_steps(key.contiguous(), value.contiguous(), queries[0, 0])
    rows = []
    for name, steps in own_steps(case, pages, tables, queries).items():
        graph = graph_of(steps)
        for _ in range(3):
            theirs[name]()
        times = alternate({"own": graph.replay, "reference": theirs[name]}, repeats)
        own = statistics.median(times["own"]) / case.sets
        reference = statistics.median(times["reference"])
        row = {
            "path": name,
            "heads": HEADS,
            "head_size": HEAD_SIZE,
            "context": context,
            "us": own,
            "reference_us": reference,
            "reference_us_spread": max(times["reference"]) - min(times["reference"]),
            "ratio_reference": reference / own,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="of the reference system")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**n for n in (13, 15, 17, 19)])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="of a copy of this code that is no checkout")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    torch.manual_seed(0)
    layout = PageLayout(PAGE_SIZE, HEAD_SIZE, ())
    raw = allocate_pages(POOL_TOKENS // PAGE_SIZE, HEADS, layout, torch.float16, "cuda")
    pages = split_pages(raw, layout)
    fill(pages, "random")
    rows = []
    for context in arguments.contexts:
        rows += measure(context, pages, arguments.repeats)
    arguments.out.write_text(json.dumps(about(arguments.commit) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
