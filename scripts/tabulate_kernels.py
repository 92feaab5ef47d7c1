"""Put the kernels' measured results into docs/kernels.md, from the raw data in docs/results."""

import argparse
import json
from pathlib import Path
from typing import Any

from tables import put_tables

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "kernels.md"
PEAK = {"NVIDIA H200": 4.26e12}
"""Bytes per second that reading alone reaches, measured."""

EXACT_AT_LEAST = {8192: 0.97, 32768: 1.1, 131072: 1.48, 524288: 1.65, 1048576: 1.72}
SPARSE_AT_LEAST = {8192: 1.1, 32768: 2.1, 131072: 3.7, 524288: 5.7, 1048576: 6.6}
"""Ratios asked for, at 32 query and 8 KV heads of 128 and one sequence."""
ELSEWHERE_AT_LEAST = 0.9
PREFILL_AT_MOST = 2.2
REFERENCE_AT_LEAST = 5.0


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens < 1 << 20 else f"{tokens >> 20}M"


def verdict(met: bool) -> str:
    return "yes" if met else "**no**"


def heading(result: dict[str, Any], what: str) -> list[str]:
    made = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = result["commit"][:12]
    return [f"{what} {result['gpu']}, {made}, commit {commit}, {result['date']}.", ""]


def decode_target(row: dict[str, Any]) -> float | None:
    if row["kernel"] == "gaussian":
        return None
    plain = (row["query_heads"], row["kv_heads"], row["head_size"], row["batch"]) == (32, 8, 128, 1)
    if not plain:
        return ELSEWHERE_AT_LEAST
    return (EXACT_AT_LEAST if row["kernel"] == "exact" else SPARSE_AT_LEAST)[row["context"]]


def decode_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| kernel | heads | D | batch | context | pages read | support | us | spread "
        "| FA3 us | FA3 / ours | asked | met | TB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        asked = decode_target(row)
        met = "" if asked is None else verdict(row["ratio_fa3"] >= asked)
        lines.append(
            f"| {row['kernel']} | {row['query_heads']}/{row['kv_heads']} | {row['head_size']} "
            f"| {row['batch']} | {thousands(row['context'])} | {row['pages_read']:.1%} "
            f"| {row['support']:.2%} | {row['us']:.1f} | {row['us_spread']:.1f} "
            f"| {row['fa3_us']:.1f} | {row['ratio_fa3']:.2f} | {asked or ''} | {met} "
            f"| {row['bytes'] / row['us'] / 1e6:.2f} |"
        )
    return lines


def kernel_table(result: dict[str, Any]) -> list[str]:
    lines = ["| kernel | context | bytes | limit us | us | microseconds of each launch |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["rows"]:
        launches = ", ".join(
            f"{name.removesuffix('_kernel')} {us:.1f}" for name, us in row["kernels_us"].items()
        )
        limit = row["bytes"] / PEAK[result["gpu"]] * 1e6
        lines.append(
            f"| {row['kernel']} | {thousands(row['context'])} | {row['bytes'] / 1e6:.1f} MB "
            f"| {limit:.1f} | {row['us']:.1f} | {launches} |"
        )
    return lines


def prefill_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| context | block sparsity | ms | FA3 ms | ours / FA3 | at most 2.2 "
        "| AdaSplash-2 ms | AdaSplash-2 / ours | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        other = ["", ""]
        if "adasplash_us" in row:
            other = [f"{row['adasplash_us'] / 1e3:.2f}", f"{row['ratio_adasplash']:.2f}"]
        lines.append(
            f"| {thousands(row['context'])} | {row['block_sparsity']:.0%} "
            f"| {row['us'] / 1e3:.2f} | {row['fa3_us'] / 1e3:.2f} | {row['time_over_fa3']:.2f} "
            f"| {verdict(row['time_over_fa3'] <= PREFILL_AT_MOST)} "
            f"| {other[0]} | {other[1]} | {row['error']:.1e} |"
        )
    return lines


def reference_table(result: dict[str, Any]) -> list[str]:
    lines = ["| path | context | us | reference us | reference / ours | at least 5 |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["rows"]:
        lines.append(
            f"| {row['path']} | {thousands(row['context'])} | {row['us']:.1f} "
            f"| {row['reference_us']:.0f} | {row['ratio_reference']:.1f} "
            f"| {verdict(row['ratio_reference'] >= REFERENCE_AT_LEAST)} |"
        )
    return lines


def fuzz_table(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['cases']:,} cases, {result['failures']} failures.", ""]
    lines.append("| family | cases | with fallback | worst error, of 1 allowed | other pages |")
    lines.append("|---|---|---|---|---|")
    for name, row in result["families"].items():
        lines.append(
            f"| {name} | {row['cases']} | {row['cases_with_fallback']} "
            f"| {row['worst_error']:.2f} | {row['rows_with_other_pages']:.2%} |"
        )
    return lines


def serving_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| run | model | requests | context | selector | pages read | ms | FLASH_ATTN ms | ratio |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        if row["selector"] != "FLASH_ATTN":
            lines.append(
                f"| {row['run']} | {row['model']} | {row['requests']} "
                f"| {thousands(row['context'])} | {row['selector']} "
                f"| {row['pages_read_share']:.1%} | {row['tpot_ms']:.2f} "
                f"| {row['tpot_ms_flash_attn']:.2f} | {row['ratio_flash_attn']:.2f} |"
            )
    return lines


def server_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| model | selector | requests | pages read | requests/s | output tokens/s "
        "| first token ms, p50 | p99 | output token ms, p50 | p99 |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        first, each = row["first_token_ms"], row["per_output_token_ms"]
        read = f"{row['pages_read'] / row['pages_held']:.1%}" if row["pages_held"] else ""
        lines.append(
            f"| {row['model']} | {row['selector']} | {row['requests']} | {read} "
            f"| {row['requests_per_second']:.2f} | {row['output_tokens_per_second']:.0f} "
            f"| {first['p50']:.0f} | {first['p99']:.0f} | {each['p50']:.1f} | {each['p99']:.1f} |"
        )
    return lines


def soak_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| selector | requests | aborted | preempted | tokens | blocks compared | wrong "
        "| blocks missing | bytes missing |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        lines.append(
            f"| {row['selector']} | {row['requests']} | {row['aborted']} "
            f"| {row['num_preemptions']} | {row['tokens']} | {row['blocks_compared']} "
            f"| {row['blocks_wrong']} | {row['blocks_not_free']} | {row['memory_growth']} |"
        )
    return lines


def sanitizer_table(result: dict[str, Any]) -> list[str]:
    lines = ["| tool | ended | cases | kernels | errors |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        cases, kernels = len(row["cases"]), len(row["kernels"])
        lines.append(f"| {row['tool']} | {row['ended']} | {cases} | {kernels} | {row['errors']} |")
    return lines


SECTIONS = (
    ("decode-h200.json", "Decode, random keys", decode_table),
    (
        "decode-h200-other-shapes.json",
        "Decode, random keys, other shapes, before the latest kernels",
        decode_table,
    ),
    ("decode-h200-clustered.json", "Decode, keys in topics, support 0.1%", decode_table),
    ("decode-h200-clustered.json", "Where a step's time goes", kernel_table),
    (
        "decode-h200-gaussian.json",
        "Decode with `gaussian`, keys in topics, support 1%",
        decode_table,
    ),
    ("prefill-h200.json", "Prefill", prefill_table),
    ("reference-h200.json", "The paper's own code, on the same data", reference_table),
    ("serving-h200.json", "Inside vLLM, time per output token, dummy weights", serving_table),
    ("server-h200.json", "A server under mixed requests", server_table),
    ("soak-h200.json", "Thousands of requests, and what they leave behind", soak_table),
    ("fuzz-h200.json", "Random cases against fp64", fuzz_table),
    ("sanitizer-h200.json", "compute-sanitizer", sanitizer_table),
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
