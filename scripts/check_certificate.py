"""Compare what sparse steps say at most of what they drop with what they drop, on random heads.

Keys of several kinds, lengths, budgets and alphas, through `decode` of either implementation; the
truth is entmax of the stored keys in fp64. Of the reference it also checks the closer bound of
`analyze_decode`. Writes docs/results/certificate-*.json and exits with status 1 if a bound lies
below the truth, by more than ROUNDING, or a certified head lost a token of its support.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import put_tables, table_lines
from torch import Tensor

from entmaxkv_kernels import (
    PagedCache,
    PageLayout,
    TopK,
    allocate_pages,
    analyze_decode,
    append,
    decode,
    split_pages,
)
from entmaxkv_kernels.pages import BOX, CODES
from entmaxkv_kernels.reference.entmax import score_factor, solve_entmax
from entmaxkv_vllm.bench.provenance import about

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
"""Of the weights that are compared."""
ALPHAS = (1.0, 1.25, 4 / 3, 1.5, 1.75, 2.0)
KV_HEADS, GROUP, HEAD_SIZE, PAGE_SIZE, LONGEST = 2, 16, 64, 16, 1024
BATCH = {"reference": 8, "triton": 64}
DTYPES = {
    "reference": ((torch.float64, False), (torch.bfloat16, False), (torch.float32, True)),
    "triton": ((torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)),
}
"""Dtypes, and whether with ALiBi."""


def independent(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device)


def drifting(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Neighbours resemble each other, from hardly to nearly entirely."""
    share = 1 - 10 ** (-3 * torch.rand((), generator=random, device=random.device))
    common = independent((-(-shape[0] // 32), *shape[1:]), random)
    common = common.repeat_interleave(32, 0)[: shape[0]]
    return share.sqrt() * common + (1 - share).sqrt() * independent(shape, random)


def heavy_tailed(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, less its scale."""
    normal = independent((4, *shape), random)
    return normal[0] / (normal[1:].square().mean(0)).sqrt()


def few_channels(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Some channels far larger than others, and off center."""
    keys = independent(shape, random)
    keys[..., :3] = keys[..., :3] * 4 + 15
    return keys


def needles(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """One token in a hundred much larger than the others."""
    keys = independent(shape, random)
    rare = torch.rand(shape[0], 1, 1, generator=random, device=random.device) < 0.01
    return torch.where(rare, 6 * keys, keys)


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "independent": independent,
    "drifting": drifting,
    "heavy-tailed": heavy_tailed,
    "few channels": few_channels,
    "needles": needles,
}


def exact_weights(
    query: Tensor, key: Tensor, alpha: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and support of each page [query_heads, pages]: query [query_heads, HEAD_SIZE], key
    [tokens, KV_HEADS, HEAD_SIZE], both fp64."""
    query = query.unflatten(0, (KV_HEADS, GROUP)) * HEAD_SIZE**-0.5
    scores = (query @ key.permute(1, 2, 0)).flatten(0, 1)
    if slopes is not None:
        tokens = len(key)
        scores = scores + slopes.double()[:, None] * torch.arange(1 - tokens, 1, device=key.device)
    weights, _ = solve_entmax(scores * score_factor(alpha), alpha)
    pages = torch.nn.functional.pad(weights, (0, -len(key) % PAGE_SIZE)).unflatten(1, (-1, 16))
    return pages.sum(-1), (pages > 0).sum(-1)


def listed_pages(workspace: Tensor, context: tuple[Any, ...], selector: TopK) -> Tensor:
    """Pages [B, KV_HEADS, pages] bool that a step of the compiled kernels has listed."""
    from entmaxkv_kernels.triton.decode import step_shape

    query, cache, block_table, _ = context
    shape = step_shape(query, cache, block_table, selector, 0, True)
    parts = shape.divide(workspace, shape.capacity(len(workspace)))
    listed = parts["listed"].view(len(query), KV_HEADS, 2, -1)[:, :, 1]
    place = torch.arange(listed.shape[-1], device=listed.device)
    wanted = place < parts["listed_count"].view(len(query), KV_HEADS, 1)
    read = torch.zeros(listed.shape, dtype=torch.int32, device=listed.device)
    read.scatter_add_(-1, listed.long().where(wanted, 0), wanted.int())
    return read[..., : block_table.shape[1]] > 0


def run_step(
    context: tuple[Any, ...], implementation: str, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Certificates [B, query_heads], the closer bounds of them that are known, and the pages
    [B, KV_HEADS, pages] that were read."""
    query, cache, block_table, _ = context
    bound = torch.full(query.shape[:2], torch.nan, device=query.device)
    if implementation == "reference":
        decode(*context, **options, certificate=bound)
        report = analyze_decode(*context, **options)
        assert report.dropped_bound is not None
        return bound, report.dropped_bound, report.selected
    from entmaxkv_kernels.triton.decode import step_shape

    shape = step_shape(query, cache, block_table, options["selector"], 0, True)
    workspace = torch.empty(shape.good_size, dtype=torch.uint8, device=query.device)
    options = options | {"workspace": workspace, "implementation": implementation}
    decode(*context, **options, certificate=bound)
    return bound, bound, listed_pages(workspace, context, options["selector"])


def make_cache(
    kind: str,
    dtype: torch.dtype,
    lengths: list[int],
    args: argparse.Namespace,
    random: torch.Generator,
) -> tuple[PagedCache, list[Tensor]]:
    """Sequences one after the other in their own pages, and the keys of each that are stored."""
    layout = PageLayout(PAGE_SIZE, HEAD_SIZE, CODES if args.codes else BOX)
    pages = args.longest // PAGE_SIZE
    raw = allocate_pages(len(lengths) * pages, KV_HEADS, layout, dtype, random.device)
    cache, keys = split_pages(raw, layout), []
    for b, length in enumerate(lengths):
        key = KINDS[kind]((length, KV_HEADS, HEAD_SIZE), random).to(dtype)
        slots = b * args.longest + torch.arange(length, device=random.device)
        append(cache, key, key, slots, implementation=args.implementation)
        keys.append(key)
    return cache, keys


def check(
    kind: str,
    dtype: torch.dtype,
    alibi: bool,
    args: argparse.Namespace,
    random: torch.Generator,
) -> dict[str, Tensor]:
    """One random batch: the bound, the truth and the recall of its heads."""
    device, batch = random.device, args.batch or BATCH[args.implementation]

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random, device=device))

    lengths = [integer(1, args.longest) for _ in range(batch)]
    cache, keys = make_cache(kind, dtype, lengths, args, random)
    spread = 2.0 ** integer(-1, 3)
    query = spread * independent((batch, KV_HEADS * GROUP, HEAD_SIZE), random)
    slopes = 2.0 ** -torch.arange(1.0, KV_HEADS * GROUP + 1, device=device) if alibi else None
    pages = args.longest // PAGE_SIZE
    table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    context = query.to(dtype), cache, table, torch.tensor(lengths, device=device)
    options: dict[str, Any] = {
        "scale": HEAD_SIZE**-0.5,
        "alpha": ALPHAS[integer(0, len(ALPHAS) - 1)],
        "selector": TopK(integer(0, args.longest // 2), args.codes),
        "alibi_slopes": slopes,
    }
    bound, closer, read = run_step(context, args.implementation, options)
    truth, recall = torch.zeros_like(bound, dtype=torch.float64), torch.ones_like(bound)
    sparse = torch.zeros_like(bound, dtype=torch.bool)
    for b, key in enumerate(keys):
        weight, support = exact_weights(
            context[0][b].double(), key.double(), options["alpha"], slopes
        )
        unread = ~read[b, :, : weight.shape[1]].repeat_interleave(GROUP, 0)
        truth[b] = (weight * unread).sum(-1)
        recall[b] = 1 - (support * unread).sum(-1) / support.sum(-1)
        sparse[b] = unread.any(-1)
    found = {"bound": bound, "closer": closer, "truth": truth, "recall": recall}
    return {name: x[sparse].double().cpu() for name, x in found.items()}


def summary(found: dict[str, Tensor], rounding: float) -> dict[str, Any]:
    """What is reported of the heads of one kind."""
    bound, truth, recall = found["bound"], found["truth"], found["recall"]
    closer = torch.minimum(bound, found["closer"])
    certified, some = bound == 0, truth > 1e-6
    low = (closer < truth - rounding) | ((closer == 0) & (recall < 1))
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
    bounds = ", bounds by codes" if result.get("bounds") == "codes" else ""
    if (longest := result.get("longest", LONGEST)) != LONGEST:
        bounds += f", up to {longest:,} tokens"
    total = (
        f"{result['heads_checked']:,} heads, {result['violations']} violations; PyTorch "
        f"{result['versions']['torch']}, {result['gpu']}, the {result['implementation']} "
        f"implementation{bounds}, commit {result['commit'][:12]}, {result['date']}."
    )
    return "\n".join([total, "", *table_lines([*titles, "tightness"], rows)])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Checks all families and writes the result."""
    device = "cuda" if args.implementation == "triton" and torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(args.seed)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    families = [(kind, *family) for kind in KINDS for family in DTYPES[args.implementation]]
    for kind, dtype, alibi in families:
        parts: list[dict[str, Tensor]] = []
        while sum(len(part["bound"]) for part in parts) < args.heads / len(families):
            parts.append(check(kind, dtype, alibi, args, random))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        about_family = {"keys": kind, "dtype": str(dtype).removeprefix("torch."), "alibi": alibi}
        rows.append(about_family | summary(found, ROUNDING[dtype]))
        print(json.dumps(rows[-1]), flush=True)
    totals = {name: sum(int(row[name]) for row in rows) for name in ("heads_checked", "violations")}
    some = [row["median_tightness"] for row in rows if row["median_tightness"] is not None]
    result = about(args.commit) | {"implementation": args.implementation} | totals
    result |= {"bounds": "codes" if args.codes else "boxes", "longest": args.longest}
    result |= {"median_tightness": statistics.median(some) if some else None}
    result |= {"seconds": time.perf_counter() - began, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--page", type=Path, help="a Markdown page to put the tables into")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], help="other files to put there"
    )
    parser.add_argument("--implementation", choices=tuple(BATCH), default="reference")
    parser.add_argument("--codes", action="store_true", help="bound by codes, not by boxes")
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens, whole pages")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--heads", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    args = parser.parse_args()
    if args.longest < PAGE_SIZE or args.longest % PAGE_SIZE:
        parser.error(f"--longest is {args.longest}; expected a multiple of {PAGE_SIZE}")
    results = [json.loads(path.read_text()) for path in args.results]
    if args.out:
        results.insert(0, run(args))
    if args.page:
        put_tables(args.page, "\n\n".join(map(table, results)))
    if violations := sum(result["violations"] for result in results):
        raise SystemExit(f"{violations} bounds lie below what was dropped")


if __name__ == "__main__":
    main()
