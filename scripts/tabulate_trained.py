"""Tables of docs/fidelity.md of twins, entmax and softmax, trained on the same batches."""

import math
import statistics
from collections.abc import Iterator

from tables import table_lines
from tabulate_selectors import RESULTS, Row, load, made_on, number

TWINS = ("entmax", "softmax")
FILES = {
    "entmax": ("perplexity", "attention", "attention-long", "tasks"),
    "softmax": ("perplexity", "attention", "tasks"),
}
"""Parts of the evaluation of each twin; attention beyond the trained length has its own file."""

LAYERED = ("adaptive-codes", "gaussian-paper", "topk-codes:1024", "topk:1024")
"""Selectors that have lines for each layer and for each eighth of the positions."""


def of_model(name: str, part: str) -> list[Row]:
    """The rows of one part of the evaluation of a twin."""
    rows: list[Row] = []
    for file in FILES[name]:
        if file.partition("-")[0] == part:
            rows += load(RESULTS / f"fidelity-trained-{name}-{file}.json")[part]
    return rows


def made_from() -> list[str]:
    """What each file was made on."""
    paths = [
        RESULTS / f"fidelity-trained-{name}-{file}.json" for name in TWINS for file in FILES[name]
    ]
    return [made_on(load(path), path) for path in paths]


def more_than_exact(row: Row, exact: Row) -> str:
    """By how much perplexity is above that of exact decoding, with the standard error of the mean
    over sequences."""
    pairs = zip(row["by_sequence"], exact["by_sequence"], strict=True)
    more = [ours - theirs for ours, theirs in pairs]
    error = statistics.stdev(more) / len(more) ** 0.5
    return f"{math.expm1(statistics.mean(more)):+.2%} ± {error:.2%}"


def perplexity_lines() -> Iterator[tuple[object, ...]]:
    found = {
        name: {(row["context"], row["selector"]): row for row in of_model(name, "perplexity")}
        for name in TWINS
    }
    for context, selector in found["entmax"]:
        line: list[object] = [context, f"`{selector}`"]
        line.append(f"{found['entmax'][context, selector]['pages_read']:.1%}")
        for rows in found.values():
            row = rows.get((context, selector))
            line.append("-" if row is None else f"{math.exp(row['nats_per_byte']):.4f}")
            if row is None or selector == "exact":
                line.append("-" if row is None else "")
            else:
                line.append(more_than_exact(row, rows[context, "exact"]))
        yield tuple(line)


def mean_of(rows: list[Row], measure: str) -> float:
    return float(sum(row[measure]["mean"] for row in rows) / len(rows))


def attention_by_selector(name: str, context: int) -> dict[str, dict[str, float]]:
    """Of each selector at one context: means over layers, the largest 99th percentile of a layer
    and the worst head of all, of what it drops, and the layer with the least recall."""
    found: dict[str, list[Row]] = {}
    for row in of_model(name, "attention"):
        if row["context"] == context:
            found.setdefault(row["selector"], []).append(row)
    return {selector: attention_numbers(rows) for selector, rows in found.items()}


def attention_numbers(rows: list[Row]) -> dict[str, float]:
    """What `attention_by_selector` says, of the rows of some layers."""
    measures = ("pages_read", "dropped_mass", "output_error", "support_recall")
    numbers = {measure: mean_of(rows, measure) for measure in measures}
    for measure in ("dropped_mass", "output_error"):
        for at in ("p99", "worst"):
            numbers[f"{measure} {at}"] = max(row[measure][at] for row in rows)
    numbers["least_recall"] = min(row["support_recall"]["mean"] for row in rows)
    numbers["nothing_dropped"] = sum(row["nothing_dropped"] for row in rows) / len(rows)
    if "dropped_bound" in rows[0]:
        numbers["certified"] = sum(row["certified"] for row in rows) / len(rows)
        numbers["least_slack"] = min(row["least_slack_of_bound"] for row in rows)
    return numbers


TITLES = ["pages read", "dropped mass", "99th percentile", "worst", "output error"]
TITLES += ["99th percentile", "worst", "recall", "of the worst layer", "nothing dropped"]
TITLES += ["certified", "least slack of the bound"]


def attention_cells(numbers: dict[str, float]) -> list[str]:
    cells = [f"{numbers['pages_read']:.1%}"]
    for measure in ("dropped_mass", "output_error"):
        cells += [number(numbers[f"{measure}{at}"]) for at in ("", " p99", " worst")]
    cells += [f"{numbers[key]:.4f}" for key in ("support_recall", "least_recall")]
    cells.append(f"{numbers['nothing_dropped']:.1%}")
    if "certified" in numbers:
        return [*cells, f"{numbers['certified']:.1%}", number(numbers["least_slack"])]
    return [*cells, "-", "-"]


def attention_lines() -> Iterator[tuple[object, ...]]:
    for name in TWINS:
        for context in sorted({row["context"] for row in of_model(name, "attention")}):
            found = attention_by_selector(name, context)
            for selector in sorted(found, key=lambda selector: found[selector]["pages_read"]):
                yield name, context, f"`{selector}`", *attention_cells(found[selector])


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


def place_tables(context: int) -> Iterator[str]:
    """The same layer by layer, and by position, of some selectors at one context."""
    layers, places = [], []
    for name in TWINS:
        here = [row for row in of_model(name, "attention") if row["context"] == context]
        for selector in LAYERED:
            rows = [row for row in here if row["selector"] == selector]
            for row in rows:
                cells = attention_cells(attention_numbers([row]))
                layers.append((name, f"`{selector}`", row["layer"], *cells))
            if rows:
                places.append((name, f"`{selector}`", *position_cells(rows)))
    yield from [f"Layer by layer, at {context} tokens:", ""]
    yield from [*table_lines(["model", "selector", "layer", *TITLES], layers), ""]
    yield from ["Dropped mass by position, in eighths of those measured: mean (worst):", ""]
    titles = ["model", "selector", *(f"{eighth}" for eighth in range(1, 9))]
    yield from [*table_lines(titles, places), ""]


def lost_and_won(name: str) -> dict[tuple[str, int, str], tuple[int, int, int, float]]:
    """By task, context and selector: tasks that exact decoding solves, those of them that the
    selector does not, those that only the selector solves, and the share of pages read."""
    rows = of_model(name, "tasks")
    exact = {(r["task"], r["context"]): r["solved"] for r in rows if r["selector"] == "exact"}
    found = {}
    for row in rows:
        pairs = list(zip(exact[row["task"], row["context"]], row["solved"], strict=True))
        lost = sum(truth and not ours for truth, ours in pairs)
        won = sum(ours and not truth for truth, ours in pairs)
        place = row["task"], row["context"], row["selector"]
        found[place] = sum(truth for truth, _ in pairs), lost, won, row["pages_read"]
    return found


def task_lines(name: str) -> list[str]:
    found = lost_and_won(name)
    selectors = [s for s in dict.fromkeys(place[2] for place in found) if s != "exact"]
    lines = []
    for task, context in dict.fromkeys(place[:2] for place in found):
        row = [task, context, found[task, context, "exact"][0]]
        for selector in selectors:
            place = found.get((task, context, selector))
            row.append("-" if place is None else f"{place[1]} ({place[2]}), {place[3]:.0%}")
        lines.append(row)
    titles = ["task", "context", "solved by `exact`", *(f"`{s}`, pages read" for s in selectors)]
    return table_lines(titles, lines)


def trained_tables() -> Iterator[str]:
    """Perplexity, attention by selector, layer and position, and tasks that were lost."""
    yield from ["### Selectors on twins", "", *made_from(), ""]
    titles = ["context", "selector", "pages read"]
    for name in TWINS:
        titles += [f"perplexity per byte, {name}", "more than `exact`"]
    yield from [*table_lines(titles, list(perplexity_lines())), ""]
    titles = ["model", "context", "selector", *TITLES]
    yield from [*table_lines(titles, list(attention_lines())), ""]
    yield from place_tables(16384)
    for name in TWINS:
        yield f"Tasks that `exact` solves of 48 and a selector does not (and the reverse), {name}:"
        yield from ["", *task_lines(name), ""]
