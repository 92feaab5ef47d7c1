"""Compare what sparse steps say at most of what they drop with what they drop, on random heads.

Keys of several kinds, lengths, budgets and alphas, through `analyze_decode`. Writes
docs/results/certificate-*.json and exits with status 1 if a bound lies below the truth, by more
than ROUNDING, or a certified head lost a token of its support.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import put_tables, table_lines
from torch import Tensor

from entmaxkv_kernels import PageLayout, TopK, allocate_pages, analyze_decode, append, split_pages
from entmaxkv_vllm.bench.provenance import about

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
"""Of sums of weights, which are computed in fp32 but for fp64 keys."""
ALPHAS = (1.0, 1.25, 4 / 3, 1.5, 1.75, 2.0)
BATCH, KV_HEADS, GROUP, HEAD_SIZE, PAGE_SIZE, LONGEST = 8, 2, 16, 64, 16, 1024


def independent(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random)


def drifting(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Neighbours resemble each other, from hardly to nearly entirely."""
    share = 1 - 10 ** (-3 * torch.rand((), generator=random))
    common = torch.randn((-(-shape[0] // 32), *shape[1:]), generator=random)
    common = common.repeat_interleave(32, 0)[: shape[0]]
    return share.sqrt() * common + (1 - share).sqrt() * torch.randn(shape, generator=random)


def heavy_tailed(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, less its scale."""
    normal = torch.randn((4, *shape), generator=random)
    return normal[0] / (normal[1:].square().mean(0)).sqrt()


def few_channels(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Some channels far larger than others, and off center."""
    keys = torch.randn(shape, generator=random)
    keys[..., :3] = keys[..., :3] * 4 + 15
    return keys


def needles(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """One token in a hundred much larger than the others."""
    keys = torch.randn(shape, generator=random)
    return torch.where(torch.rand(shape[0], 1, 1, generator=random) < 0.01, 6 * keys, keys)


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "independent": independent,
    "drifting": drifting,
    "heavy-tailed": heavy_tailed,
    "few channels": few_channels,
    "needles": needles,
}


def check(kind: str, dtype: torch.dtype, alibi: bool, random: torch.Generator) -> dict[str, Tensor]:
    """One random batch: the bound, the truth and the recall of its heads."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    layout = PageLayout(PAGE_SIZE, HEAD_SIZE, TopK.statistics)
    lengths = [integer(1, LONGEST) for _ in range(BATCH)]
    pages = -(-LONGEST // PAGE_SIZE)
    cache = split_pages(allocate_pages(BATCH * pages, KV_HEADS, layout, dtype), layout)
    for b, length in enumerate(lengths):
        shape = (length, KV_HEADS, HEAD_SIZE)
        key, value = KINDS[kind](shape, random).to(dtype), independent(shape, random).to(dtype)
        append(cache, key, value, b * pages * PAGE_SIZE + torch.arange(length))
    spread = 2.0 ** integer(-1, 3)
    query = spread * independent((BATCH, KV_HEADS * GROUP, HEAD_SIZE), random)
    slopes = 2.0 ** -torch.arange(1.0, KV_HEADS * GROUP + 1) if alibi else None
    report = analyze_decode(
        query.to(dtype),
        cache,
        torch.arange(BATCH * pages, dtype=torch.int32).view(BATCH, pages),
        torch.tensor(lengths),
        scale=HEAD_SIZE**-0.5,
        alpha=ALPHAS[integer(0, len(ALPHAS) - 1)],
        selector=TopK(integer(0, LONGEST // 2)),
        alibi_slopes=slopes,
    )
    assert report.dropped_bound is not None
    unread = report.selected.sum(-1) < -(-torch.tensor(lengths)[:, None] // PAGE_SIZE)
    sparse = unread.repeat_interleave(GROUP, 1)
    return {
        "bound": report.dropped_bound[sparse].double(),
        "truth": report.dropped_mass[sparse].double(),
        "recall": report.support_recall[sparse].double(),
    }


def summary(found: dict[str, Tensor], rounding: float) -> dict[str, Any]:
    """What is reported of the heads of one kind."""
    bound, truth, recall = found["bound"], found["truth"], found["recall"]
    certified, some = bound == 0, truth > 1e-6
    low = (bound < truth - rounding) | (certified & (recall < 1))
    return {
        "heads_checked": len(bound),
        "violations": int(low.sum()),
        "certified": float(certified.double().mean()),
        "exact": float((truth == 0).double().mean()),
        "above_0.99": float((bound > 0.99).double().mean()),
        "median_tightness": float((bound[some] / truth[some]).median()) if some.any() else None,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    titles = ["keys", "dtype", "ALiBi", "heads", "violations", "exact", "certified", "near 1"]
    rows = []
    for row in result["rows"]:
        tightness = row["median_tightness"]
        rows.append(
            (
                row["keys"],
                row["dtype"],
                "yes" if row["alibi"] else "no",
                f"{row['heads_checked']:,}",
                row["violations"],
                *(f"{row[name]:.1%}" for name in ("exact", "certified", "above_0.99")),
                "" if tightness is None else f"{tightness:.2f}",
            )
        )
    total = (
        f"{result['heads_checked']:,} heads, {result['violations']} violations; PyTorch "
        f"{result['versions']['torch']} on a {result['gpu']}, commit {result['commit'][:12]}, "
        f"{result['date']}."
    )
    return "\n".join([total, "", *table_lines([*titles, "tightness"], rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="a Markdown page to put the table into")
    parser.add_argument("--heads", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    args = parser.parse_args()
    random = torch.Generator().manual_seed(args.seed)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    families = [
        (kind, dtype, alibi)
        for kind in KINDS
        for dtype, alibi in ((torch.float64, False), (torch.bfloat16, False), (torch.float32, True))
    ]
    for kind, dtype, alibi in families:
        parts: list[dict[str, Tensor]] = []
        while sum(len(part["bound"]) for part in parts) < args.heads / len(families):
            parts.append(check(kind, dtype, alibi, random))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        about_family = {"keys": kind, "dtype": str(dtype).removeprefix("torch."), "alibi": alibi}
        rows.append(about_family | summary(found, ROUNDING[dtype]))
        print(json.dumps(rows[-1]), flush=True)
    totals = {name: sum(int(row[name]) for row in rows) for name in ("heads_checked", "violations")}
    result = about(args.commit) | totals | {"seconds": time.perf_counter() - began, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.page:
        put_tables(args.page, table(result))
    if totals["violations"]:
        raise SystemExit(f"{totals['violations']} bounds lie below what was dropped")


if __name__ == "__main__":
    main()
