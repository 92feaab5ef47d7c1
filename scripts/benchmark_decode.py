"""Time decode beside FlashAttention-3 on one GPU, in one run, and write docs/results/decode-*.json.

All arms read the same keys and values through shuffled block tables, as CUDA graphs over rotating
sets of pages that exceed the L2 cache; replays of the arms take turns. FlashAttention-3 is vLLM's,
on a cache in its own order (tokens outside heads), which it reads fastest, called plainly and with
its schedule made beforehand, as vLLM does for all layers at once; the faster of the two counts.

Where memory lies makes the same kernels faster in one process than in the next. With --processes
each row has the medians of several, which all read the same bytes, and their own times in `runs`.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from entmaxkv_kernels import Counter, Exact, Selector, TopK
from entmaxkv_vllm.bench.arms import EntmaxArm, selector_of
from entmaxkv_vllm.bench.batch import Request
from entmaxkv_vllm.bench.peers import flash_attention
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.timing import kernel_times, per_step
from entmaxkv_vllm.bench.workload import Pool, Shape, Workload

PAGE_SIZE = 16
POOL_TOKENS = 1 << 20
REPLAYS = 15
PROFILED_SETS = 8
SHAPES = {
    "GQA, D 128": (32, 8, 128, 1, (8192, 32768, 131072, 524288, 1048576)),
    "GQA, D 64": (32, 8, 64, 1, (8192, 32768, 131072, 524288, 1048576)),
    "MHA, D 128": (8, 8, 128, 1, (8192, 32768, 131072, 524288)),
    "batch 8": (32, 8, 128, 8, (32768,)),
    "batch 32": (32, 8, 128, 32, (8192,)),
}
"""Query heads, KV heads, head size, batch, contexts."""


def measure(
    work: Workload,
    selectors: dict[str, Selector],
    profiled: bool,
    costs: bool = False,
    appends: bool = False,
) -> Iterable[dict[str, Any]]:
    """One row for each selector, whose names are those of the rows' kernels.

    costs: time steps that count nothing as well, and `topk` with a certificate.
    appends: see `EntmaxArm`; FlashAttention-3 only reads.

    Raises:
        RuntimeError: if `topk` read everything, or nothing sparsely.
    """
    flash = flash_attention(work)
    for name, selector in selectors.items():
        own = EntmaxArm(work, selector, appends=appends)
        arms = {"entmax": own.steps} | flash
        certifying = None
        if costs:
            arms["uncounted"] = EntmaxArm(work, selector, appends=appends, counts=False).steps
        if costs and isinstance(selector, TopK):
            certifying = EntmaxArm(work, selector, certified=True, appends=appends)
            arms["certified"] = certifying.steps
        us = per_step(arms, REPLAYS, graphs=True)
        if isinstance(selector, TopK) and (complaint := (certifying or own).complaint()):
            raise RuntimeError(f"{name} at {work.longest} tokens: {complaint}")
        median = {arm: statistics.median(values) for arm, values in us.items()}
        flash_us = min(median["fa3_plain"], median["fa3_scheduled"])
        counted = own.counted()
        row: dict[str, Any] = {
            "kernel": name,
            "selector": selector.name,
            "batch": len(work.requests),
            "query_heads": work.shape.query_heads,
            "kv_heads": work.shape.kv_heads,
            "head_size": work.shape.head_size,
            "context": work.longest,
            "table_tokens": work.table_tokens,
            "pages_read": counted["pages_read"],
            "support": counted["support"],
            "us": median["entmax"],
            "us_spread": max(us["entmax"]) - min(us["entmax"]),
            "fa3_us": flash_us,
            "fa3_plain_us": median["fa3_plain"],
            "fa3_scheduled_us": median["fa3_scheduled"],
            "fa3_us_spread": max(max(us[arm]) - min(us[arm]) for arm in flash),
            "ratio_fa3": flash_us / median["entmax"],
            "bytes": counted["bytes"],
        }
        if isinstance(selector, Exact):
            row["error"] = work.exact_error(own.outs[0])
        for arm in ("uncounted", "certified"):
            if arm in us:
                row[f"{arm}_us"] = median[arm]
                row[f"{arm}_us_spread"] = max(us[arm]) - min(us[arm])
        row |= costs_of(row)
        if certifying is not None:
            row["certificates"] = certifying.counters[Counter.CERTIFIED :].tolist()
            if profiled:
                row["certified_kernels_us"] = kernel_times(certifying.steps[:PROFILED_SETS])
        if profiled:
            row["kernels_us"] = kernel_times(own.steps[:PROFILED_SETS])
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        yield row


def costs_of(row: dict[str, Any]) -> dict[str, float]:
    """What counters and the certificate add to a step, as shares of it without them."""
    found = {}
    if "uncounted_us" in row:
        found["counters_cost"] = row["us"] / row["uncounted_us"] - 1
    if "certified_us" in row:
        found["certificate_cost"] = row["certified_us"] / row["us"] - 1
    return found


def merge(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several processes as one each: medians of what was timed, and the widest spread.

    Raises:
        ValueError: if the processes measured different cases.
    """
    merged = []
    for rows in zip(*runs, strict=True):
        if len({(row["kernel"], row["batch"], row["context"], row["bytes"]) for row in rows}) > 1:
            raise ValueError(f"processes measured different cases: {rows}")
        timed = [name for name in rows[0] if name.removesuffix("_spread").endswith("us")]
        row = rows[0] | {"runs": [{name: each[name] for name in timed} for each in rows]}
        for name in timed:
            times = [each[name] for each in rows]
            if isinstance(row[name], dict):
                row[name] = {k: statistics.median(each[k] for each in times) for k in row[name]}
            elif name.endswith("us"):
                row[name] = statistics.median(times)
                if (spread := f"{name}_spread") in row:
                    row[spread] = max(max(times) - min(times), *(each[spread] for each in rows))
        row["ratio_fa3"] = row["fa3_us"] / row["us"]
        merged.append(row | costs_of(row))
    return merged


def measure_in_processes(count: int, out: Path) -> None:
    """Run this command several times, one after the other, and write what they have in common."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        for _ in range(count):
            command = [sys.executable, *sys.argv, "--processes", "1", "--out", str(part)]
            subprocess.run(command, check=True)
            results.append(json.loads(part.read_text()))
            # Written after each: a run that is cut short keeps what it has.
            rows = merge([result["rows"] for result in results])
            out.write_text(json.dumps(results[0] | {"rows": rows}, indent=1) + "\n")


def selectors_for(name: str, context: int, share: float) -> dict[str, Selector]:
    """The selectors that are timed on the same pages, by kernel."""
    if name != "topk":
        return {name: selector_of(name, context, share, PAGE_SIZE)}
    return {"exact": Exact(), "sparse": selector_of("topk", context, share, PAGE_SIZE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--support", type=float, default=0.005, help="share of tokens with weight")
    parser.add_argument("--share", type=float, default=0.05, help="share of pages that top-k reads")
    parser.add_argument("--data", choices=("random", "clustered"), default="random")
    sparse = ("topk", "gaussian", "adaptive", "pruned")
    parser.add_argument("--sparse", choices=sparse, default="topk")
    parser.add_argument(
        "--costs",
        action="store_true",
        help="time steps without counters and with certificates, too",
    )
    parser.add_argument(
        "--appends",
        action="store_true",
        help="new tokens, as a server does; FlashAttention-3 does not",
    )
    parser.add_argument("--profile", action="store_true", help="add the time of each kernel")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="only these of the shapes' contexts"
    )
    parser.add_argument(
        "--table-tokens", type=int, default=0, help="room of the block table; at least the context"
    )
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    parser.add_argument("--processes", type=int, default=1, help="each measures everything")
    arguments = parser.parse_args()
    if arguments.processes > 1:
        measure_in_processes(arguments.processes, arguments.out)
        return
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    # Written after each case: a run that is cut short keeps what it has.
    settings = {"data": arguments.data, "appends": arguments.appends}
    result = about(arguments.commit) | settings | {"rows": rows}
    chosen = [SHAPES[name] for name in arguments.shapes]
    chosen.sort(key=lambda shape: shape[:3])
    for heads, shapes in itertools.groupby(chosen, key=lambda shape: shape[:3]):
        query_heads, kv_heads, head_size = heads
        shape = Shape(query_heads, kv_heads, head_size, PAGE_SIZE)
        pool = Pool.of(shape, POOL_TOKENS, arguments.data)
        for *_, batch, contexts in shapes:
            for context in contexts:
                if arguments.contexts and context not in arguments.contexts:
                    continue
                sets = max(1, POOL_TOKENS // (batch * context))
                requests = [Request(1, context)] * batch
                work = Workload.over(
                    pool, requests, sets, arguments.support, max(context, arguments.table_tokens)
                )
                selectors = selectors_for(arguments.sparse, context, arguments.share)
                asked = arguments.profile, arguments.costs, arguments.appends
                for row in measure(work, selectors, *asked):
                    rows.append(row)
                    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        # The next shape takes its memory.
        del pool, work
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
