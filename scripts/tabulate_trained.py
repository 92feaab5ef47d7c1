"""Tables of docs/fidelity.md that compare selectors on twins that were trained for it."""

import math
import statistics
from collections.abc import Iterator

from tables import table_lines
from tabulate_selectors import RESULTS, Row, load, made_on, number

TWINS = ("entmax", "softmax")
PARTS = ("perplexity", "attention", "tasks")
PAIRS = {
    "trained": (TWINS, "Selectors on twins trained for it"),
    "coded": (("entmax",), "By codes, on an entmax model that was trained alone"),
}
"""What the files of models that were trained together are named after, which they are, and the
heading of their tables."""


def of_model(name: str, part: str, pair: str = "trained") -> tuple[list[Row], str]:
    """The rows of one part of the evaluation of a twin, and what they were made on."""
    path = RESULTS / f"fidelity-{pair}-{name}-{part}.json"
    result = load(path)
    return result[part], made_on(result, path)


def more_than_exact(row: Row, exact: Row) -> str:
    """By how much perplexity is above that of exact decoding, with the standard error of the mean
    over sequences."""
    pairs = zip(row["by_sequence"], exact["by_sequence"], strict=True)
    more = [ours - theirs for ours, theirs in pairs]
    error = statistics.stdev(more) / len(more) ** 0.5
    return f"{math.expm1(statistics.mean(more)):+.2%} ± {error:.2%}"


def mean_of(rows: list[Row], measure: str) -> float:
    return float(sum(row[measure]["mean"] for row in rows) / len(rows))


def attention_by_selector(
    name: str, context: int, pair: str = "trained"
) -> dict[str, dict[str, float]]:
    """Means over layers, and worst layers, of what each selector drops at one context."""
    found: dict[str, list[Row]] = {}
    for row in of_model(name, "attention", pair)[0]:
        if row["context"] == context:
            found.setdefault(row["selector"], []).append(row)
    return {
        name: {
            "pages_read": mean_of(rows, "pages_read"),
            "dropped_mass": mean_of(rows, "dropped_mass"),
            "output_error": mean_of(rows, "output_error"),
            "support_recall": mean_of(rows, "support_recall"),
            "least_recall": min(row["support_recall"]["mean"] for row in rows),
            "nothing_dropped": sum(row["nothing_dropped"] for row in rows) / len(rows),
        }
        for name, rows in found.items()
    }


def perplexity_lines(pair: str) -> list[tuple[object, ...]]:
    lines: list[tuple[object, ...]] = []
    for name in PAIRS[pair][0]:
        rows = of_model(name, "perplexity", pair)[0]
        exact = {row["context"]: row for row in rows if row["selector"] == "exact"}
        lines += [
            (
                name,
                row["context"],
                f"`{row['selector']}`",
                f"{row['pages_read']:.1%}",
                f"{math.exp(row['nats_per_byte']):.4f}",
                "" if row["selector"] == "exact" else more_than_exact(row, exact[row["context"]]),
            )
            for row in rows
        ]
    return lines


def attention_lines(pair: str) -> list[tuple[object, ...]]:
    lines: list[tuple[object, ...]] = []
    for name in PAIRS[pair][0]:
        for context in sorted({row["context"] for row in of_model(name, "attention", pair)[0]}):
            by_selector = attention_by_selector(name, context, pair)
            lines += [
                (
                    name,
                    context,
                    f"`{selector}`",
                    f"{found['pages_read']:.1%}",
                    number(found["dropped_mass"]),
                    number(found["output_error"]),
                    f"{found['support_recall']:.4f}",
                    f"{found['least_recall']:.4f}",
                    f"{found['nothing_dropped']:.1%}",
                )
                for selector, found in sorted(
                    by_selector.items(), key=lambda item: item[1]["pages_read"]
                )
            ]
    return lines


def trained_tables(pair: str = "trained") -> Iterator[str]:
    """Perplexity and attention by selector, and tasks that were lost."""
    names, heading = PAIRS[pair]
    made = (of_model(name, part, pair)[1] for name in names for part in PARTS)
    yield from [f"### {heading}", "", *made, ""]
    titles = ["model", "context", "selector", "pages read"]
    more = ["perplexity per byte", "more than `exact`"]
    yield from [*table_lines([*titles, *more], perplexity_lines(pair)), ""]
    more = ["dropped mass", "output error", "recall", "of the worst layer", "nothing dropped"]
    yield from [*table_lines([*titles, *more], attention_lines(pair)), ""]
    for name in names:
        yield f"Tasks that `exact` solves of 48 and a selector does not (and the reverse), {name}:"
        yield from ["", *task_lines(name, pair), ""]


def lost_and_won(
    name: str, pair: str = "trained"
) -> dict[tuple[str, int, str], tuple[int, int, int, float]]:
    """By task, context and selector: tasks that exact decoding solves, those of them that the
    selector does not, those that only the selector solves, and the share of pages read."""
    rows = of_model(name, "tasks", pair)[0]
    exact = {(r["task"], r["context"]): r["solved"] for r in rows if r["selector"] == "exact"}
    found = {}
    for row in rows:
        pairs = list(zip(exact[row["task"], row["context"]], row["solved"], strict=True))
        lost = sum(truth and not ours for truth, ours in pairs)
        won = sum(ours and not truth for truth, ours in pairs)
        place = row["task"], row["context"], row["selector"]
        found[place] = sum(truth for truth, _ in pairs), lost, won, row["pages_read"]
    return found


def task_lines(name: str, pair: str) -> list[str]:
    found = lost_and_won(name, pair)
    selectors = [s for s in dict.fromkeys(place[2] for place in found) if s != "exact"]
    lines = []
    for task, context in dict.fromkeys(place[:2] for place in found):
        solved = found[task, context, "exact"][0]
        row = [task, context, solved]
        for selector in selectors:
            place = found.get((task, context, selector))
            row.append("-" if place is None else f"{place[1]} ({place[2]}), {place[3]:.0%}")
        lines.append(row)
    titles = ["task", "context", "solved by `exact`", *(f"`{s}`, pages read" for s in selectors)]
    return table_lines(titles, lines)
