"""Put what selectors drop into docs/fidelity.md, from the raw data in docs/results."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import measure_fidelity
from tables import put_tables, table_lines
from tabulate_selectors import RESULTS, codes_tables, load, made_on, study_tables
from tabulate_trained import more_than_exact, trained_tables

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "fidelity.md"
DEMO = RESULTS / "fidelity-demo-model.json"
DEMO_PERPLEXITY = RESULTS / "fidelity-demo-model-perplexity.json"


def demo_perplexity_table() -> Iterator[str]:
    result = load(DEMO_PERPLEXITY)
    made = made_on(result, DEMO_PERPLEXITY)
    yield from ["### The demo model's perplexity, on few windows", "", made, ""]
    exact, *others = result["perplexity"]
    titles = ["context", "selector", "pages read", "perplexity per byte", "more than `exact`"]
    rows = [
        (
            row["context"],
            f"`{row['selector']}`",
            f"{row['pages_read']:.1%}",
            f"{math.exp(row['nats_per_byte']):.4f}",
            "" if row is exact else more_than_exact(row, exact),
        )
        for row in (exact, *others)
    ]
    yield from [*table_lines(titles, rows), ""]


def tables() -> str:
    demo = load(DEMO)
    lines = [
        *study_tables(),
        "",
        *codes_tables(),
        "",
        *trained_tables(),
    ]
    lines += demo_perplexity_table()
    lines += ["### The demo model, through the engine that serves it", "", made_on(demo, DEMO), ""]
    return "\n".join([*lines, measure_fidelity.table(demo)])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    put_tables(PAGE, tables())
