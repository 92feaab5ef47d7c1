"""Time the decode kernels of the paper's own code beside this project's, on the same data.

What that code takes is in `entmaxkv_vllm/bench/reference_system.py`. Its steps are timed by events
and this project's as a graph, each as it would be used.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from entmaxkv_vllm.bench.arms import EntmaxArm, selector_of
from entmaxkv_vllm.bench.batch import Request
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.reference_system import decode_steps, use_checkout
from entmaxkv_vllm.bench.timing import alternate, graph_of
from entmaxkv_vllm.bench.workload import Pool, Shape, Workload

HEADS, HEAD_SIZE, PAGE_SIZE, SHARE, SUPPORT = 8, 128, 16, 0.05, 0.005
POOL_TOKENS = 1 << 20
SELECTORS = {"dense": "exact", "topk": "topk", "gaussian": "gaussian"}
"""This project's, by the path of the reference system."""


def measure(context: int, pool: Pool, repeats: int) -> list[dict[str, Any]]:
    work = Workload.over(pool, [Request(1, context)], POOL_TOKENS // context, SUPPORT)
    theirs = decode_steps(*work.gathered(0, 0), work.queries[0, 0], PAGE_SIZE, SHARE)
    rows = []
    for name, selector in SELECTORS.items():
        own_arm = EntmaxArm(work, selector_of(selector, context, SHARE, PAGE_SIZE))
        graph = graph_of(own_arm.steps)
        for _ in range(3):
            theirs[name]()
        times = alternate({"own": graph.replay, "reference": theirs[name]}, repeats)
        own = statistics.median(times["own"]) / work.sets
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
    use_checkout(arguments.checkout)
    torch.manual_seed(0)
    pool = Pool.of(Shape(HEADS, HEADS, HEAD_SIZE, PAGE_SIZE, torch.float16), POOL_TOKENS, "random")
    rows = []
    for context in arguments.contexts:
        rows += measure(context, pool, arguments.repeats)
    arguments.out.write_text(json.dumps(about(arguments.commit) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
