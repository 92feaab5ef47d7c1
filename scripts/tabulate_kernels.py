"""Put the kernels' measured results into docs/kernels.md, from the raw data in docs/results."""

import argparse
import json
from pathlib import Path
from typing import Any

from tables import put_tables, table_lines

from entmaxkv_vllm.bench.report import ASKED, READING_LIMIT, TITLES, cells

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "kernels.md"
EXACT_AT_LEAST = {8192: 0.97, 32768: 1.1, 131072: 1.48, 524288: 1.65, 1048576: 1.72}
SPARSE_AT_LEAST = {8192: 1.1, 32768: 2.1, 131072: 3.7, 524288: 5.7, 1048576: 6.6}
"""Ratios asked for, at 32 query and 8 KV heads of 128 and one sequence."""
ELSEWHERE_AT_LEAST = 0.9
PREFILL_AT_MOST = 2.2
REFERENCE_AT_LEAST = 5.0
CERTIFICATE_AT_MOST = 0.03


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens < 1 << 20 else f"{tokens >> 20}M"


def verdict(met: bool) -> str:
    return "yes" if met else "**no**"


def heading(result: dict[str, Any], what: str) -> list[str]:
    made = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = result["commit"][:12]
    return [f"{what} {result['gpu']}, {made}, commit {commit}, {result['date']}.", ""]


def decode_target(row: dict[str, Any]) -> float | None:
    # Nothing was asked for where the table has room for more than the row.
    if row["kernel"] == "gaussian" or row["table_tokens"] > row["context"]:
        return None
    plain = (row["query_heads"], row["kv_heads"], row["head_size"], row["batch"]) == (32, 8, 128, 1)
    if not plain:
        return ELSEWHERE_AT_LEAST
    return (EXACT_AT_LEAST if row["kernel"] == "exact" else SPARSE_AT_LEAST)[row["context"]]


def decode_table(result: dict[str, Any]) -> list[str]:
    titles = ["kernel", "heads", "D", "batch", "context", "pages read", "support", "us", "spread"]
    titles += ["FA3 us", "FA3 / ours", "asked", "met", "TB/s"]
    # What was asked for is of an H200.
    targets = "H200" in result["gpu"]
    rows = []
    for row in result["rows"]:
        asked = decode_target(row) if targets else None
        rows.append(
            (
                row["kernel"],
                f"{row['query_heads']}/{row['kv_heads']}",
                row["head_size"],
                row["batch"],
                thousands(row["context"]),
                f"{row['pages_read']:.1%}",
                f"{row['support']:.2%}",
                f"{row['us']:.1f}",
                f"{row['us_spread']:.1f}",
                f"{row['fa3_us']:.1f}",
                f"{row['ratio_fa3']:.3f}",
                asked or "",
                "" if asked is None else verdict(row["ratio_fa3"] >= asked),
                f"{row['bytes'] / row['us'] / 1e6:.2f}",
            )
        )
    return table_lines(titles, rows)


def kernel_table(result: dict[str, Any]) -> list[str]:
    titles = ["kernel", "context", "bytes", "limit us", "us", "microseconds of each launch"]
    rows = []
    for row in result["rows"]:
        launches = ", ".join(
            f"{name.removesuffix('_kernel')} {us:.1f}" for name, us in row["kernels_us"].items()
        )
        limit = row["bytes"] / READING_LIMIT[result["gpu"]] * 1e6
        size = f"{row['bytes'] / 1e6:.1f} MB"
        place = row["kernel"], thousands(row["context"])
        rows.append((*place, size, f"{limit:.1f}", f"{row['us']:.1f}", launches))
    return table_lines(titles, rows)


def costs_table(result: dict[str, Any]) -> list[str]:
    titles = ["kernel", "context", "counting nothing", "us", "spread", "counters"]
    titles += ["with a certificate", "spread", "certificate", "at most 3%"]
    rows = []
    for row in result["rows"]:
        if not row.keys() & {"counters_cost", "certificate_cost"}:
            continue
        counters, certificate = [""] * 2, [""] * 4
        if "counters_cost" in row:
            counters = [f"{row['uncounted_us']:.1f}", f"{row['counters_cost']:.1%}"]
        if "certificate_cost" in row:
            cost = row["certificate_cost"]
            certificate = [f"{row['certified_us']:.1f}", f"{row['certified_us_spread']:.1f}"]
            certificate += [f"{cost:.1%}", verdict(cost <= CERTIFICATE_AT_MOST)]
        own = f"{row['us']:.1f}", f"{row['us_spread']:.1f}"
        place = row["kernel"], thousands(row["context"])
        rows.append((*place, counters[0], *own, counters[1], *certificate))
    return table_lines(titles, rows)


def bench_table(result: dict[str, Any]) -> list[str]:
    asked = (f"{name} {result[name]}" for name in ASKED)
    return [f"Asked: {', '.join(asked)}.", "", *table_lines(TITLES, cells(result["rows"]))]


def prefill_table(result: dict[str, Any]) -> list[str]:
    titles = ["context", "block sparsity", "ms", "FA3 ms", "ours / FA3", "at most 2.2"]
    titles += ["AdaSplash-2 ms", "AdaSplash-2 / ours", "error"]
    rows = []
    for row in result["rows"]:
        other = ["", ""]
        if "adasplash_us" in row:
            other = [f"{row['adasplash_us'] / 1e3:.2f}", f"{row['ratio_adasplash']:.2f}"]
        rows.append(
            (
                thousands(row["context"]),
                f"{row['block_sparsity']:.0%}",
                f"{row['us'] / 1e3:.2f}",
                f"{row['fa3_us'] / 1e3:.2f}",
                f"{row['time_over_fa3']:.2f}",
                verdict(row["time_over_fa3"] <= PREFILL_AT_MOST),
                *other,
                f"{row['error']:.1e}",
            )
        )
    return table_lines(titles, rows)


def reference_table(result: dict[str, Any]) -> list[str]:
    return table_lines(
        ["path", "context", "us", "reference us", "reference / ours", "at least 5"],
        (
            (
                row["path"],
                thousands(row["context"]),
                f"{row['us']:.1f}",
                f"{row['reference_us']:.0f}",
                f"{row['ratio_reference']:.1f}",
                verdict(row["ratio_reference"] >= REFERENCE_AT_LEAST),
            )
            for row in result["rows"]
        ),
    )


def fuzz_table(result: dict[str, Any]) -> list[str]:
    titles = ["family", "cases", "with fallback", "worst error, of 1 allowed", "other pages"]
    rows = (
        (
            name,
            row["cases"],
            row["cases_with_fallback"],
            f"{row['worst_error']:.2f}",
            f"{row['rows_with_other_pages']:.2%}",
        )
        for name, row in result["families"].items()
    )
    total = f"{result['cases']:,} cases, {result['failures']} failures."
    return [total, "", *table_lines(titles, rows)]


def serving_table(result: dict[str, Any]) -> list[str]:
    titles = ["run", "model", "requests", "context", "selector", "pages read", "ms"]
    titles += ["FLASH_ATTN ms", "ratio", "GPU busy ms", "FLASH_ATTN's"]
    busy = "gpu_busy_ms", "gpu_busy_ms_flash_attn"
    rows = (
        (
            row["run"],
            row["model"],
            row["requests"],
            thousands(row["context"]),
            row["selector"],
            f"{row['pages_read_share']:.1%}",
            f"{row['tpot_ms']:.2f}",
            f"{row['tpot_ms_flash_attn']:.2f}",
            f"{row['ratio_flash_attn']:.2f}",
            *(f"{row[name]:.2f}" if name in row else "" for name in busy),
        )
        for row in result["rows"]
        if row["selector"] != "FLASH_ATTN"
    )
    return table_lines(titles, rows)


def layers_table(result: dict[str, Any]) -> list[str]:
    titles = ["layers", "context", "arm", "us", "spread", "without products", "FA3 / ours"]
    rows = (
        (
            row["layers"],
            thousands(row["context"]),
            row["arm"],
            *(f"{row[name]:.1f}" for name in ("us", "us_spread", "alone_us")),
            f"{row['ratio_fa3']:.2f}",
        )
        for row in result["rows"]
    )
    return table_lines(titles, rows)


def server_table(result: dict[str, Any]) -> list[str]:
    titles = ["model", "selector", "requests", "pages read", "requests/s", "output tokens/s"]
    titles += ["first token ms, p50", "p99", "output token ms, p50", "p99"]
    rows = []
    for row in result["rows"]:
        first, each = row["first_token_ms"], row["per_output_token_ms"]
        rows.append(
            (
                row["model"],
                row["selector"],
                row["requests"],
                f"{row['pages_read'] / row['pages_held']:.1%}" if row["pages_held"] else "",
                f"{row['requests_per_second']:.2f}",
                f"{row['output_tokens_per_second']:.0f}",
                *(f"{first[p]:.0f}" for p in ("p50", "p99")),
                *(f"{each[p]:.1f}" for p in ("p50", "p99")),
            )
        )
    return table_lines(titles, rows)


def soak_table(result: dict[str, Any]) -> list[str]:
    columns = {
        "selector": "selector",
        "requests": "requests",
        "aborted": "aborted",
        "preempted": "num_preemptions",
        "tokens": "tokens",
        "blocks compared": "blocks_compared",
        "wrong": "blocks_wrong",
        "blocks missing": "blocks_not_free",
        "bytes missing": "memory_growth",
    }
    rows = ([row[name] for name in columns.values()] for row in result["rows"])
    return table_lines(list(columns), rows)


def sanitizer_table(result: dict[str, Any]) -> list[str]:
    return table_lines(
        ["tool", "ended", "cases", "kernels", "errors"],
        (
            (row["tool"], row["ended"], len(row["cases"]), len(row["kernels"]), row["errors"])
            for row in result["rows"]
        ),
    )


def tests_table(result: dict[str, Any]) -> list[str]:
    return table_lines(
        ["tests", "GPUs", "passed", "skipped", "failed", "which"],
        (
            (
                ", ".join(f"`{file}`" for file in row["tests"].split()),
                *(row[name] for name in ("gpus", "passed", "skipped", "failed")),
                row.get("note", ""),
            )
            for row in result["rows"]
        ),
    )


SECTIONS = (
    ("decode-h200.json", "Decode, random keys", decode_table),
    ("costs-h200.json", "What counters and the certificate cost", costs_table),
    ("costs-h200-appended.json", "The same of steps that append, as a server's do", costs_table),
    ("costs-h200-clustered.json", "The same of keys in topics", costs_table),
    ("decode-h200-head-size-64.json", "Decode, random keys, head size 64", decode_table),
    ("decode-h200-other-shapes.json", "Decode, random keys, other shapes", decode_table),
    (
        "decode-h200-wide-table.json",
        "Decode, random keys, a block table for 128k tokens",
        decode_table,
    ),
    ("decode-h100.json", "Decode on an H100, random keys", decode_table),
    ("decode-h100.json", "What the certificate costs on an H100", costs_table),
    ("decode-h200-clustered.json", "Decode, keys in topics, support 0.1%", decode_table),
    ("decode-h200-clustered.json", "Where a step's time goes", kernel_table),
    (
        "decode-h200-gaussian.json",
        "Decode with `gaussian`, keys in topics, support 1%",
        decode_table,
    ),
    ("bench-h200.json", "Beside other kernels, by `entmaxkv bench`", bench_table),
    ("again/bench-h200.json", "The same once more", bench_table),
    ("prefill-h200.json", "Prefill", prefill_table),
    ("prefill-h100.json", "Prefill on an H100", prefill_table),
    ("reference-h200.json", "The paper's own code, on the same data", reference_table),
    ("serving-h200.json", "Inside vLLM, time per output token, dummy weights", serving_table),
    ("serving-h200-compiled.json", "The same, the rest compiled by vLLM", serving_table),
    (
        "serving-h200-captures.json",
        "The same, medians of five captures of each engine's graphs",
        serving_table,
    ),
    ("serving-h200-appended.json", "The same since decoding appends", serving_table),
    (
        "serving-h200-wide.json",
        "One request in an engine for 512k tokens (`topk`: for its own length), and eight",
        serving_table,
    ),
    (
        "serving-h200-one.json",
        "One request once more, since decoding appends for wide tables, too",
        serving_table,
    ),
    (
        "serving-h200-codes.json",
        "`topk` by codes, as whole numbers and in their first form, in bf16",
        serving_table,
    ),
    ("layers-h200.json", "A step between the matrix products of its layer", layers_table),
    ("serving-h200-gaussian.json", "The same of `gaussian`, by earlier kernels", serving_table),
    ("server-h200.json", "A server under mixed requests", server_table),
    ("server-h200-topk.json", "The same with `topk`, beside tests", server_table),
    ("soak-h200.json", "Thousands of requests, and what they leave behind", soak_table),
    ("soak-h200-topk.json", "The same with `topk`", soak_table),
    ("fuzz-h200.json", "Random cases against fp64", fuzz_table),
    ("sanitizer-h200.json", "compute-sanitizer", sanitizer_table),
    ("tests-h200.json", "Tests", tests_table),
)


def tables(results: Path = DOCS / "results") -> str:
    """All tables as Markdown, those whose raw data are there."""
    lines: list[str] = []
    for name, title, table in SECTIONS:
        path = results / name
        if path.exists():
            result = json.loads(path.read_text())
            lines += [f"### {title}", ""]
            lines += heading(result, f"Raw data: [{name}](results/{name}).")
            lines += [*table(result), ""]
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    put_tables(PAGE, tables())


if __name__ == "__main__":
    main()
