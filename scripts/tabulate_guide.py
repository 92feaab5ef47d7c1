"""Put measured speed-ups into docs/guide.md, from the raw data in docs/results."""

import argparse
import json
from pathlib import Path
from typing import Any

from tables import put_tables, table_lines
from tabulate_kernels import thousands

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "guide.md"
KERNELS = "decode-h200.json"
SERVING = tuple(
    f"serving-h200{kind}.json"
    for kind in ("", "-compiled", "-captures", "-wide", "-one", "-appended")
)
"""Later runs replace what earlier ones have of the same."""


def read(name: str) -> Any:
    return json.loads((DOCS / "results" / name).read_text())


def table() -> str:
    """How many times as fast as FlashAttention-3: attention alone and inside vLLM, by context."""
    kernels, serving = read(KERNELS), [read(name) for name in SERVING]
    alone = {
        (row["selector"], row["context"]): row["ratio_fa3"]
        for row in kernels["rows"]
        if (row["query_heads"], row["kv_heads"], row["head_size"], row["batch"]) == (32, 8, 128, 1)
    }
    inside = {
        (row["selector"], row["context"]): row["ratio_flash_attn"]
        for result in serving
        for row in result["rows"]
        if (row["model"], row["requests"]) == ("8B", 1) and row["selector"] != "FLASH_ATTN"
    }
    titles = [
        "context",
        "`exact`, attention",
        "`topk`, attention",
        "`exact`, model",
        "`topk`, model",
    ]
    columns = [(measured, name) for measured in (alone, inside) for name in ("exact", "topk")]
    rows = []
    for context in sorted({context for _, context in (*alone, *inside)}):
        found = (measured.get((name, context)) for measured, name in columns)
        rows.append([thousands(context), *("" if x is None else f"{x:.2f}" for x in found)])
    files = [
        f"[{name}](results/{name}) ({result['gpu']}, {result['date']})"
        for name, result in zip((KERNELS, *SERVING), (kernels, *serving), strict=True)
    ]
    lines = [*table_lines(titles, rows), "", "Raw data: " + ",\n".join(files) + "."]
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    put_tables(PAGE, table())


if __name__ == "__main__":
    main()
