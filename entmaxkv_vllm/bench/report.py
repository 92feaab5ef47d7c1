"""A kernel benchmark's result as a table, and whether a second run agrees with it."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

READING_LIMIT = {"NVIDIA H200": 4.26e12}
"""Bytes per second that reading alone reaches, measured, by GPU."""

TITLES = ["batch", "arm", "us", "spread", "pages read", "support", "FA3 / this"]
"""Of the table; without FlashAttention-3 the last column is of SDPA."""

ASKED = (
    "query_heads",
    "kv_heads",
    "head_size",
    "page_size",
    "dtype",
    "data",
    "support",
    "share",
    "table_tokens",
)
"""What two runs have to have in common beside the GPU."""


def table(result: dict[str, Any]) -> str:
    """The result as a table, with what was left out and refused."""
    lines = [f"{result['gpu']}, commit {result['commit'][:12]}, {result['date']}"]
    if "note" in result:
        lines.append(result["note"])
    whole = [_titles(result["rows"]), *cells(result["rows"])]
    widths = [max(len(line[i]) for line in whole) for i in range(len(TITLES))]
    for line in whole:
        padded = (
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    for why, batches in result["left_out"].items():
        where = "" if batches == result["batches"] else f" ({', '.join(batches)})"
        lines.append(f"left out: {why}{where}")
    lines += [f"REFUSED: {text}" for text in result["refused"]]
    return "\n".join(lines)


def _titles(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    with_flash = any(row["arm"].startswith("fa3") for row in rows)
    return TITLES if with_flash else [*TITLES[:-1], "SDPA / this"]


def yardstick(rows: Sequence[Mapping[str, Any]], batch: str) -> float | None:
    """Microseconds of FlashAttention-3 on a batch, the faster of its arms; of SDPA without it."""
    for prefix in ("fa3", "sdpa"):
        found = [
            row["us"] for row in rows if row["batch"] == batch and row["arm"].startswith(prefix)
        ]
        if found:
            return min(found)
    return None


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What stands under TITLES for each row."""
    lines = []
    for row in rows:
        other = yardstick(rows, row["batch"])
        lines.append(
            [
                row["batch"],
                row["arm"],
                f"{row['us']:.1f}",
                f"{row['us_spread']:.1f}",
                f"{row['pages_read']:.1%}" if "pages_read" in row else "",
                f"{row['support']:.2%}" if "support" in row else "",
                f"{other / row['us']:.2f}" if other else "",
            ]
        )
    return lines


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Rows of two runs whose medians differ by more than the larger spread, as text.

    Raises ValueError if the runs differ in their GPU or in what was asked for, or have no batch and
    arm in common.
    """
    for name in ("gpu", *ASKED):
        if first[name] != second[name]:
            raise ValueError(f"the runs differ in {name}: {first[name]} and {second[name]}")
    before = {(row["batch"], row["arm"]): row for row in first["rows"]}
    after = {(row["batch"], row["arm"]): row for row in second["rows"]}
    if not before.keys() & after.keys():
        raise ValueError("the runs have no batch and arm in common")
    apart = []
    for place in sorted(before.keys() & after.keys()):
        a, b = before[place], after[place]
        allowed = max(a["us_spread"], b["us_spread"])
        if abs(a["us"] - b["us"]) > allowed:
            apart.append(
                f"{place[0]}, {place[1]}: {a['us']:.1f} and {b['us']:.1f} us, "
                f"more than the spread of {allowed:.1f} apart"
            )
    return apart


def command(args: Any) -> int:
    """The subcommand: 0 if the runs agree."""
    try:
        apart = compare(*(json.loads(path.read_text()) for path in (args.first, args.second)))
    except (OSError, ValueError, KeyError) as error:
        print(f"entmaxkv bench compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(apart) or "the medians agree within the spread")
    return 1 if apart else 0
