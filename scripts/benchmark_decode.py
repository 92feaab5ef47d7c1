"""Time decode beside FlashAttention-3 on one GPU, in one run, and write docs/results/decode-*.json.

All arms read the same keys and values through shuffled block tables, as CUDA graphs over rotating
sets of pages that exceed the L2 cache; replays of the arms take turns. FlashAttention-3 is vLLM's,
on a cache in its own order (tokens outside heads), which it reads fastest, called plainly and with
its schedule made beforehand, as vLLM does for all layers at once; the faster of the two counts.
"""

import argparse
import itertools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import Step, about, alternate, graph_of, kernel_times

from entmaxkv_kernels import (
    Counter,
    Exact,
    Gaussian,
    PagedCache,
    PageLayout,
    Selector,
    TopK,
    allocate_pages,
    append,
    decode,
    split_pages,
)
from entmaxkv_kernels.reference.entmax import entmax_threshold_sort
from entmaxkv_kernels.triton import decode_workspace_size

PAGE_SIZE = 16
POOL_TOKENS = 1 << 20
REPLAYS = 15
PROFILED_SETS = 8
GRAPH_STEPS = 8
"""Steps of a graph, at least: to launch one takes some microseconds, which are no step's."""
SHAPES = {
    "GQA, D 128": (32, 8, 128, 1, (8192, 32768, 131072, 524288, 1048576)),
    "GQA, D 64": (32, 8, 64, 1, (8192, 32768, 131072, 524288, 1048576)),
    "MHA, D 128": (8, 8, 128, 1, (8192, 32768, 131072, 524288)),
    "batch 8": (32, 8, 128, 8, (32768,)),
    "batch 32": (32, 8, 128, 32, (8192,)),
}
"""Query heads, KV heads, head size, batch, contexts."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    support: the mean share of tokens with weight, per query head.
    table_tokens: what the block table has room for, as an engine's has for its longest request.
    """

    query_heads: int
    kv_heads: int
    head_size: int
    batch: int
    context: int
    support: float
    table_tokens: int

    @property
    def sets(self) -> int:
        """How many sets of pages the pool holds."""
        return max(1, POOL_TOKENS // (self.batch * self.context))

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return self.context // PAGE_SIZE


def clustered_keys(tokens: int, kv_heads: int, head_size: int) -> torch.Tensor:
    """Keys [tokens, kv_heads, head_size] of topics that last some 128 tokens, with noise.

    Half of the variance is a topic's, drawn from 64 recurring ones per head; half is the token's.
    """
    topics = torch.randn(64, kv_heads, head_size, device="cuda")
    changes = torch.rand(tokens, device="cuda") < 1 / 128
    segment = changes.cumsum(0)
    topic_of = torch.randint(64, (int(segment[-1]) + 1,), device="cuda")
    keys = topics[topic_of[segment]] + torch.randn(tokens, kv_heads, head_size, device="cuda")
    return keys * 0.5**0.5


def fill(pages: PagedCache, data: str) -> None:
    """Write POOL_TOKENS keys and values into the pages, in chunks."""
    kv_heads, head_size = pages.key.shape[1], pages.layout.head_size
    chunk = 1 << 16
    for start in range(0, POOL_TOKENS, chunk):
        shape = (chunk, kv_heads, head_size)
        key = clustered_keys(*shape) if data == "clustered" else torch.randn(shape, device="cuda")
        value = torch.randn(shape, device="cuda")
        slots = torch.arange(start, start + chunk, device="cuda")
        dtype = pages.key.dtype
        append(pages, key.to(dtype), value.to(dtype), slots, implementation="triton")


def without_statistics(pages: PagedCache) -> PagedCache:
    """The same keys and values in pages as `exact` has them."""
    count, kv_heads = pages.key.shape[:2]
    layout = PageLayout(PAGE_SIZE, pages.layout.head_size)
    raw = allocate_pages(count, kv_heads, layout, pages.key.dtype, "cuda")
    plain = split_pages(raw, layout)
    plain.key.copy_(pages.key)
    plain.value.copy_(pages.value)
    return plain


def calibrated_queries(case: Case, pages: PagedCache, tables: torch.Tensor) -> torch.Tensor:
    """Random queries [sets, batch, query_heads, head_size], scaled for the wanted support.

    The scale is found by bisection on the first sequence and KV head.
    """
    shape = (case.sets, case.batch, case.query_heads, case.head_size)
    queries = torch.randn(shape, device="cuda")
    group = case.query_heads // case.kv_heads
    keys = pages.key[tables[0, 0, : case.pages].long(), 0].flatten(0, 1).double()
    z = queries[0, 0, :group].double() @ keys.T * (0.5 * case.head_size**-0.5)
    low, high = 1e-2, 1e2
    for _ in range(24):
        middle = math.sqrt(low * high)
        scores = z * middle
        share = (scores > entmax_threshold_sort(scores, 1.5)[..., None]).double().mean().item()
        low, high = (middle, high) if share > case.support else (low, middle)
    return (queries * low).to(pages.key.dtype)


def flash_attention(
    case: Case, pages: PagedCache, tables: torch.Tensor, queries: torch.Tensor
) -> dict[str, list[Step]]:
    """FlashAttention-3's steps over the same keys and values, by how they are scheduled."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    key, value = (part.transpose(1, 2).contiguous() for part in (pages.key, pages.value))
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    schedule = get_scheduler_metadata(
        batch_size=case.batch,
        max_seqlen_q=1,
        max_seqlen_k=case.context,
        num_heads_q=case.query_heads,
        num_heads_kv=case.kv_heads,
        headdim=case.head_size,
        cache_seqlens=lengths,
        qkv_dtype=key.dtype,
        cu_seqlens_q=starts,
        page_size=PAGE_SIZE,
        causal=True,
    )

    def step(index: int, scheduler_metadata: torch.Tensor | None) -> Step:
        out = torch.empty_like(queries[index])
        return lambda: flash_attn_varlen_func(
            queries[index],
            key,
            value,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=case.context,
            seqused_k=lengths,
            softmax_scale=case.head_size**-0.5,
            causal=True,
            block_table=tables[index],
            out=out,
            fa_version=3,
            scheduler_metadata=scheduler_metadata,
        )

    return {
        "fa3_plain": [step(index, None) for index in range(case.sets)],
        "fa3_scheduled": [step(index, schedule) for index in range(case.sets)],
    }


def entmax_steps(
    case: Case,
    pages: PagedCache,
    tables: torch.Tensor,
    queries: torch.Tensor,
    selector: Selector,
    certified: bool = False,
) -> tuple[list[Step], list[torch.Tensor], torch.Tensor]:
    """This project's steps, their outputs, and the counters that they add to."""
    size = decode_workspace_size(
        case.batch,
        case.query_heads,
        case.kv_heads,
        case.head_size,
        PAGE_SIZE,
        pages.key.dtype,
        case.table_tokens,
        selector=selector,
        certificate=certified,
    )
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    counters = torch.zeros(len(Counter), dtype=torch.int64, device="cuda")
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    outs = [torch.empty_like(query) for query in queries]
    certificate = torch.empty(queries.shape[1:3], device="cuda") if certified else None

    def step(index: int) -> Step:
        return lambda: decode(
            queries[index],
            pages,
            tables[index],
            lengths,
            scale=case.head_size**-0.5,
            alpha=1.5,
            selector=selector,
            counters=counters,
            out=outs[index],
            certificate=certificate,
            workspace=workspace,
            implementation="triton",
        )

    return [step(index) for index in range(case.sets)], outs, counters


def exact_error(
    case: Case, pages: PagedCache, tables: torch.Tensor, queries: torch.Tensor, out: torch.Tensor
) -> float:
    """Relative error of the output of the first sequence's first KV head against fp64."""
    group = case.query_heads // case.kv_heads
    key, value = (
        x[tables[0, 0, : case.pages].long(), 0].flatten(0, 1).double()
        for x in (pages.key, pages.value)
    )
    z = queries[0, 0, :group].double() @ key.T * (0.5 * case.head_size**-0.5)
    weights = (z - entmax_threshold_sort(z, 1.5)[..., None]).clamp_min(0).square()
    exact = weights @ value / weights.sum(-1, keepdim=True)
    return ((out[0, :group].double() - exact).norm() / exact.norm()).item()


def read_bytes(case: Case, row: dict[str, Any], selector: Selector, pages: PagedCache) -> int:
    """Bytes of keys, values and statistics that one step cannot do without.

    The values are those of a KV head's query heads together, which share some: a little too many.
    """
    rows, tokens = case.batch * case.kv_heads, case.context
    statistics_read = 0
    if selector.statistics:
        own = pages.statistics[0, 0].nbytes + pages.scales[0, 0].nbytes
        statistics_read = rows * tokens // PAGE_SIZE * own
    keys = rows * tokens * row["pages_read"]
    values = case.batch * case.query_heads * tokens * row["support"]
    return statistics_read + int((keys + values) * case.head_size * pages.key.itemsize)


def measure(
    case: Case,
    pages: PagedCache,
    plain: PagedCache,
    selectors: dict[str, Selector],
    profiled: bool,
    certified: bool,
) -> list[dict[str, Any]]:
    """One row for each selector, whose names are those of the rows' kernels.

    plain: the pages of selectors without statistics.
    certified: time `topk` with a certificate as well.
    """
    shape = case.sets, case.batch, case.pages
    order = torch.randperm(POOL_TOKENS // PAGE_SIZE, dtype=torch.int32, device="cuda")
    tables = order[: math.prod(shape)].view(shape)
    tables = torch.nn.functional.pad(tables, (0, case.table_tokens // PAGE_SIZE - case.pages))
    queries = calibrated_queries(case, pages, tables)
    flash = flash_attention(case, pages, tables, queries)
    rows = []
    for name, selector in selectors.items():
        own = pages if selector.statistics else plain
        steps, outs, counters = entmax_steps(case, own, tables, queries, selector)
        rounds = -(-GRAPH_STEPS // case.sets)
        arms = {"entmax": steps} | flash
        certifying = certified and isinstance(selector, TopK)
        if certifying:
            arms["certified"], _, certified_counters = entmax_steps(
                case, own, tables, queries, selector, certified=True
            )
        graphs = {arm: graph_of(arm_steps * rounds) for arm, arm_steps in arms.items()}
        times = alternate({arm: graph.replay for arm, graph in graphs.items()}, REPLAYS)
        us = {arm: [t / case.sets / rounds for t in replays] for arm, replays in times.items()}
        median = {arm: statistics.median(values) for arm, values in us.items()}
        flash_us = min(median["fa3_plain"], median["fa3_scheduled"])
        held, read = (counters[c].item() for c in (Counter.PAGES_HELD, Counter.PAGES_READ))
        support = counters[Counter.SUPPORT].item() / counters[Counter.QUERY_HEADS].item()
        row: dict[str, Any] = {
            "kernel": name,
            "selector": selector.name,
            "batch": case.batch,
            "query_heads": case.query_heads,
            "kv_heads": case.kv_heads,
            "head_size": case.head_size,
            "context": case.context,
            "table_tokens": case.table_tokens,
            "pages_read": read / held,
            "support": support / case.context,
            "us": median["entmax"],
            "us_spread": max(us["entmax"]) - min(us["entmax"]),
            "fa3_us": flash_us,
            "fa3_plain_us": median["fa3_plain"],
            "fa3_scheduled_us": median["fa3_scheduled"],
            "fa3_us_spread": max(max(us[arm]) - min(us[arm]) for arm in flash),
            "ratio_fa3": flash_us / median["entmax"],
        }
        row["bytes"] = read_bytes(case, row, selector, pages)
        if isinstance(selector, Exact):
            row["error"] = exact_error(case, pages, tables, queries, outs[0])
        if certifying:
            row |= {
                "certified_us": median["certified"],
                "certified_us_spread": max(us["certified"]) - min(us["certified"]),
                "certificate_cost": median["certified"] / median["entmax"] - 1,
                "certificates": certified_counters[Counter.CERTIFIED :].tolist(),
            }
            if profiled:
                row["certified_kernels_us"] = kernel_times(arms["certified"][:PROFILED_SETS])
        if profiled:
            row["kernels_us"] = kernel_times(steps[:PROFILED_SETS])
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def selectors_for(name: str, context: int, share: float) -> dict[str, Selector]:
    """The selectors that share a cache with one kind of statistics."""
    if name == "gaussian":
        return {"gaussian": Gaussian()}
    budget = max(PAGE_SIZE, int(share * context))
    return {"exact": Exact(), "sparse": TopK(token_budget=budget)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--support", type=float, default=0.005, help="share of tokens with weight")
    parser.add_argument("--share", type=float, default=0.05, help="share of pages that top-k reads")
    parser.add_argument("--data", choices=("random", "clustered"), default="random")
    parser.add_argument("--sparse", choices=("topk", "gaussian"), default="topk")
    parser.add_argument(
        "--certificate", action="store_true", help="time top-k with a certificate, too"
    )
    parser.add_argument("--profile", action="store_true", help="add the time of each kernel")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="only these of the shapes' contexts"
    )
    parser.add_argument(
        "--table-tokens", type=int, default=0, help="room of the block table; at least the context"
    )
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    # Written after each case: a run that is cut short keeps what it has.
    result = about(arguments.commit) | {"data": arguments.data, "rows": rows}
    chosen = [SHAPES[name] for name in arguments.shapes]
    chosen.sort(key=lambda shape: shape[1:3])
    sparse = Gaussian if arguments.sparse == "gaussian" else TopK
    for (kv_heads, head_size), shapes in itertools.groupby(chosen, key=lambda s: s[1:3]):
        layout = PageLayout(PAGE_SIZE, head_size, sparse.statistics)
        raw = allocate_pages(POOL_TOKENS // PAGE_SIZE, kv_heads, layout, torch.bfloat16, "cuda")
        pages = split_pages(raw, layout)
        fill(pages, arguments.data)
        plain = without_statistics(pages)
        for query_heads, _, _, batch, contexts in shapes:
            for context in contexts:
                if arguments.contexts and context not in arguments.contexts:
                    continue
                room = max(context, arguments.table_tokens)
                shape = query_heads, kv_heads, head_size, batch, context
                case = Case(*shape, arguments.support, room)
                selectors = selectors_for(arguments.sparse, context, arguments.share)
                rows += measure(
                    case, pages, plain, selectors, arguments.profile, arguments.certificate
                )
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        del raw, pages, plain
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
