"""Put what selectors drop into docs/fidelity.md, from the raw data in docs/results."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import measure_fidelity
from tables import put_tables, table_lines
from tabulate_selectors import (
    RESULTS,
    Row,
    codes_tables,
    load,
    made_on,
    number,
    study_tables,
)
from tabulate_trained import more_than_exact, trained_tables

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "fidelity.md"
DEMO = RESULTS / "fidelity-demo-model.json"
DEMO_PERPLEXITY = RESULTS / "fidelity-demo-model-perplexity.json"
TWINS = {"entmax": 1.5, "softmax": 1.0}
LAYERED = ("gaussian", "topk:1024", "adaptive:1.75", "adaptive:2.25")


def part_of_twins(name: str, part: str) -> tuple[list[Row], str]:
    """The rows of one file of a twin's results, and what they were made on."""
    path = RESULTS / f"fidelity-twins-{name}-{part}.json"
    result = load(path)
    return result[result["arguments"]["parts"].strip("[']")], made_on(result, path)


def perplexity_cells(rows: dict[tuple[int, str], Row], context: int, selector: str) -> list[str]:
    row = rows.get((context, selector))
    if row is None:
        return ["-", "-"]
    shown = f"{math.exp(row['nats_per_byte']):.4f}"
    return [shown, more_than_exact(row, rows[context, "exact"]) if selector != "exact" else ""]


def perplexity_tables() -> Iterator[str]:
    names = {"entmax": ("entmax", "perplexity"), "softmax": ("softmax", "perplexity")}
    names["fewer steps"] = ("entmax", "adaptive")
    found = {name: part_of_twins(*place) for name, place in names.items()}
    yield from ["### Perplexity of held-out text", "", *(made for _, made in found.values()), ""]
    by_place = {
        name: {(row["context"], row["selector"]): row for row in rows}
        for name, (rows, _) in found.items()
    }
    lines = [
        (
            context,
            f"`{selector}`",
            *perplexity_cells(by_place["entmax"], context, selector),
            *perplexity_cells(by_place["softmax"], context, selector),
        )
        for context, selector in by_place["entmax"]
    ]
    titles = ["context", "selector", "entmax", "more than `exact`", "softmax", "more than `exact`"]
    yield from table_lines(titles, lines)
    yield from [
        "",
        "The last 128 tokens of each window alone, with `adaptive` without its guard:",
        "",
    ]
    fewer = by_place["fewer steps"]
    lines = [
        (context, f"`{selector}`", *perplexity_cells(fewer, context, selector))
        for context, selector in fewer
    ]
    yield from table_lines(titles[:4], lines)
    yield ""


def task_tables() -> Iterator[str]:
    found = {name: part_of_twins(name, "tasks") for name in TWINS}
    yield from ["### Tasks after RULER", "", *(made for _, made in found.values()), ""]
    scores: dict[tuple[str, int], dict[tuple[str, str], str]] = {}
    columns: dict[tuple[str, str], None] = {}
    for name, (rows, _) in found.items():
        for row in rows:
            column = name, row["selector"]
            columns[column] = None
            place = scores.setdefault((row["task"], row["context"]), {})
            place[column] = f"{sum(row['solved']) / row['tasks']:.1%}"
    titles = ["task", "context", *(f"{name} `{selector}`" for name, selector in columns)]
    order = dict.fromkeys(task for task, _ in scores)
    yield from table_lines(
        titles,
        [
            (task, context, *(scores[task, context].get(column, "-") for column in columns))
            for task in order
            for context in sorted(c for t, c in scores if t == task)
        ],
    )
    yield ""


def attention_line(rows: list[Row]) -> tuple[str, ...]:
    """Over layers: means, the largest 99th percentile of a layer, and the worst head of all."""

    def mean(key: str) -> float:
        return float(sum(row[key]["mean"] for row in rows) / len(rows))

    line = [f"{mean('pages_read'):.1%}"]
    for key in ("dropped_mass", "output_error"):
        largest = [max(row[key][at] for row in rows) for at in ("p99", "worst")]
        line += map(number, [mean(key), *largest])
    line.append(f"{mean('support_recall'):.4f}")
    if "dropped_bound" in rows[0]:
        certified = sum(row["certified"] for row in rows) / len(rows)
        return (*line, f"{certified:.1%}", number(min(r["least_slack_of_bound"] for r in rows)))
    return (*line, "-", "-")


ATTENTION_TITLES = ["pages read", "dropped mass", "99th percentile", "worst"]
ATTENTION_TITLES += ["output error", "99th percentile", "worst", "recall"]
ATTENTION_TITLES += ["certified", "least slack of the bound"]


def position_cells(rows: list[Row]) -> list[str]:
    """Dropped mass in each part of the positions, over layers and heads."""
    layers = [row["dropped_mass"]["by_position"] for row in rows]
    means, worst = (
        zip(*(layer[key] for layer in layers), strict=True) for key in ("mean", "worst")
    )
    return [
        f"{number(sum(mean) / len(mean))} ({number(max(most))})"
        for mean, most in zip(means, worst, strict=True)
    ]


def attention_tables() -> Iterator[str]:
    found = {name: part_of_twins(name, "attention") for name in TWINS}
    yield from ["### Attention of the twins", "", *(made for _, made in found.values()), ""]
    rows, layers, places = [], [], []
    for name, (measured, _) in found.items():
        for context, selector in dict.fromkeys((r["context"], r["selector"]) for r in measured):
            here = [r for r in measured if (r["context"], r["selector"]) == (context, selector)]
            rows.append((name, context, f"`{selector}`", *attention_line(here)))
            if context == max(r["context"] for r in measured) and selector in LAYERED:
                layers += [
                    (name, f"`{selector}`", row["layer"], *attention_line([row])) for row in here
                ]
                places.append((name, f"`{selector}`", *position_cells(here)))
    yield from table_lines(["model", "context", "selector", *ATTENTION_TITLES], rows)
    yield from ["", "Layer by layer, at the longest context:", ""]
    yield from table_lines(["model", "selector", "layer", *ATTENTION_TITLES], layers)
    yield from ["", "Dropped mass by position, in eighths of those measured: mean (worst):", ""]
    titles = ["model", "selector", *(f"{eighth}" for eighth in range(1, 9))]
    yield from table_lines(titles, places)
    yield ""


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
        *trained_tables("coded"),
        *perplexity_tables(),
        *task_tables(),
        *attention_tables(),
        "",
    ]
    lines += demo_perplexity_table()
    lines += ["### The demo model, through the engine that serves it", "", made_on(demo, DEMO), ""]
    return "\n".join([*lines, measure_fidelity.table(demo)])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    put_tables(PAGE, tables())
