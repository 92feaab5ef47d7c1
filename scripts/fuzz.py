"""Run random cases of the compiled kernels against fp64; on a GPU, by many processes.

A case is one call on one batch. It is given by the name of its family and its index, and runs
again with `--replay FAMILY INDEX`.
"""

import argparse
import collections
import datetime
import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fuzz_cases import DEVICE, FAMILIES, Batch, Draw, Family, attention, make_batch
from timing import checked_out

from entmaxkv_kernels import Counter, Exact, decode, prefill
from entmaxkv_kernels.reference.select import select_pages
from entmaxkv_kernels.triton import prefill_workspace_size
from entmaxkv_kernels.triton.decode import step_shape


def run_prefill(batch: Batch, family: Family, draw: Draw) -> dict[str, float]:
    starts = torch.tensor([0, *batch.query_lens]).cumsum(0).int().to(DEVICE)
    size = prefill_workspace_size(
        family.query_heads,
        family.kv_heads,
        family.head_size,
        family.dtype,
        family.width * family.page_size,
        device=DEVICE,
    )
    out = prefill(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        starts,
        scale=batch.scale,
        alpha=family.alphas,
        alibi_slopes=batch.slopes,
        sliding_window=family.window,
        out=torch.full_like(batch.query, torch.nan),
        workspace=torch.full((size,), 255, dtype=torch.uint8, device=DEVICE),
        implementation="triton",
    )
    worst = 0.0
    for b, chunk in enumerate(out.split(batch.query_lens)):
        if len(chunk):
            query = batch.query[int(starts[b]) : int(starts[b + 1])]
            worst = max(worst, excess(chunk, *attention(batch, family, b, query)))
    return {"error": worst}


def excess(out: Tensor, exact: Tensor, bound: Tensor) -> float:
    """The largest error over what is allowed; infinite for what is no number."""
    share = (out.double() - exact).abs() / bound
    return torch.inf if share.isnan().any() else share.max().item()


def run_decode(batch: Batch, family: Family, draw: Draw) -> dict[str, float]:
    exact_rows = None
    if not isinstance(family.selector, Exact) and draw.uniform(0, 1) < 0.5:
        exact_rows = torch.tensor(
            [draw.uniform(0, 1) < 0.3 for _ in range(family.batch)], device=DEVICE
        )
    shape = step_shape(
        batch.query, batch.cache, batch.block_table, family.selector, exact_rows is not None, 0
    )
    size = shape.good_size
    if draw.uniform(0, 1) < 0.3:
        size = draw.integer(shape.least_size, shape.good_size)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    counters = torch.zeros(len(Counter), dtype=torch.int64, device=DEVICE)
    options: dict[str, Any] = {
        "scale": batch.scale,
        "alpha": family.alphas,
        "selector": family.selector,
        "alibi_slopes": batch.slopes,
        "sliding_window": family.window,
        "exact_rows": exact_rows,
    }
    context = batch.cache, batch.block_table, batch.seq_lens

    def step() -> Tensor:
        return decode(
            batch.query,
            *context,
            **options,
            counters=counters,
            out=torch.full_like(batch.query, torch.nan),
            workspace=workspace,
            implementation="triton",
        )

    out = step()
    parts = shape.divide(workspace, shape.capacity(size))
    entmax = torch.tensor(family.alphas, device=DEVICE) > 1
    left = parts["state"].view(family.batch, -1)[:, entmax].any().item() if entmax.any() else False
    told = {"error": 0.0, "fallback": float(left), "pages_differ": 0.0}
    allowed = None
    if not isinstance(family.selector, Exact):
        allowed = torch.zeros(
            family.batch,
            family.kv_heads,
            family.width,
            dtype=torch.bool,
            device=DEVICE,
        )
        listed = parts["listed"].view(family.batch, family.kv_heads, 2, -1)[:, :, 1]
        counts = parts["listed_count"].view(family.batch, family.kv_heads, 1)
        places = torch.arange(listed.shape[-1], device=DEVICE) < counts
        row, head, place = places.nonzero(as_tuple=True)
        allowed[row, head, listed[row, head, place].long()] = True
        alpha = torch.tensor(family.alphas, dtype=torch.float64, device=DEVICE)
        chosen = select_pages(
            batch.query,
            *context[:2],
            batch.seq_lens.long(),
            **(options | {"alpha": alpha if len(set(family.alphas)) > 1 else family.alphas[0]}),
            exact_below=0,
        ).selected
        differ = (allowed[..., : chosen.shape[-1]] != chosen).any(-1)
        told["pages_differ"] = differ.double().mean().item()
    for b, n in enumerate(batch.seq_lens.tolist()):
        if n == 0:
            told["error"] = max(told["error"], 0.0 if (out[b] == 0).all() else torch.inf)
            continue
        read = None
        if allowed is not None:
            read = allowed[b].repeat_interleave(family.page_size, 1)[:, :n]
            if not read[:, n - 1].all():
                raise AssertionError("the last page is not read")
        told["error"] = max(
            told["error"],
            excess(out[b : b + 1], *attention(batch, family, b, out_query(batch, b), read)),
        )
    if draw.uniform(0, 1) < 0.01 and not torch.equal(out, step()):
        raise AssertionError("two runs differ")
    return told


def out_query(batch: Batch, b: int) -> Tensor:
    return batch.query[b : b + 1]


def check_append(batch: Batch, family: Family) -> None:
    """The cache holds what was appended."""
    for b, n in enumerate(batch.seq_lens.tolist()):
        pages = batch.block_table[b, : -(-n // family.page_size)].long()
        for stored, given in ((batch.cache.key, batch.key), (batch.cache.value, batch.value)):
            rows = stored[pages].transpose(1, 2).flatten(0, 1)[:n]
            if not torch.equal(rows, given[b, :n]):
                raise AssertionError("append wrote something else")


def run_case(name: str, index: int) -> dict[str, float]:
    family = FAMILIES[name]
    batch, draw = make_batch(family, index)
    check_append(batch, family)
    return (run_prefill if family.prefill else run_decode)(batch, family, draw)


def work(worker: int, workers: int, cases: int, deadline: float, results: Any) -> None:
    """Run every workers-th case of each family, until the deadline."""
    total = sum(family.weight for family in FAMILIES.values())
    # Workers begin with different families, so that each compiles something else.
    names = list(FAMILIES)
    names = names[worker * len(names) // workers :] + names[: worker * len(names) // workers]
    for name in names:
        share = -(-cases * FAMILIES[name].weight // total)
        for index in range(worker, share, workers):
            if time.time() > deadline:
                return results.put(None)
            try:
                results.put((name, index, run_case(name, index), ""))
            except Exception:
                results.put((name, index, {"error": torch.inf}, traceback.format_exc()))
                if DEVICE == "cuda" and not usable():
                    return results.put(None)
    results.put(None)


def usable() -> bool:
    """Whether the device still answers this process: after a failed assertion it does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def gather(workers: int, cases: int, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Run the cases, as many as the time allows, and add up what they tell."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    deadline = time.time() + seconds
    processes = [
        context.Process(target=work, args=(w, workers, cases, deadline, results))
        for w in range(workers)
    ]
    for process in processes:
        process.start()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    worst: dict[str, float] = collections.defaultdict(float)
    differ: dict[str, float] = collections.defaultdict(float)
    failures, running, start, done = [], workers, time.time(), 0
    while running:
        result = results.get()
        if result is None:
            running -= 1
            continue
        name, index, told, trace = result
        done += 1
        counts[name]["cases"] += 1
        counts[name]["fallback"] += int(told.get("fallback", 0))
        differ[name] += told.get("pages_differ", 0)
        worst[name] = max(worst[name], told["error"])
        if not told["error"] <= 1:
            failures.append(
                f"{name!r} {index}: error {told['error']:.3g} of what is allowed {trace}"
            )
            print("FAILED", failures[-1], flush=True)
        if done % 2000 == 0:
            print(f"{done} cases, {len(failures)} failed, {time.time() - start:.0f} s", flush=True)
    families = {
        name: {
            "cases": count["cases"],
            "cases_with_fallback": count["fallback"],
            "worst_error": worst[name],
            "rows_with_other_pages": differ[name] / count["cases"],
        }
        for name, count in counts.items()
    }
    return {"cases": done, "failures": len(failures), "families": families}, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    parser.add_argument("--workers", type=int, default=12 if DEVICE == "cuda" else 1)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--replay", nargs=2, metavar=("FAMILY", "INDEX"))
    arguments = parser.parse_args()
    if arguments.replay:
        print(run_case(arguments.replay[0], int(arguments.replay[1])))
        return
    result, failures = gather(arguments.workers, arguments.cases, arguments.seconds)
    about = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "versions": {"torch": torch.__version__, "triton": sys.modules["triton"].__version__},
        "commit": arguments.commit or checked_out(),
        "date": datetime.date.today().isoformat(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(about | result, indent=1) + "\n")
    print(f"{result['cases']} cases, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
