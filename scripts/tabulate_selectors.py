"""Tables of docs/fidelity.md that compare selectors: on one model, synthetic and recorded heads."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import table_lines

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
STUDY = RESULTS / "fidelity-selectors.json"
PAPER = "gaussian-paper"
DEFAULT = "adaptive, margin 1.1"
NEEDLE_SELECTORS = [PAPER, DEFAULT, "guard 0.00%, margin 1.1", "guard 6.25%, margin 1.1"]
NEEDLE_SELECTORS += ["guard 12.50%, margin 1.1", "topk, 12.50%"]
MODEL_PARTS = ("perplexity", "attention", "tasks")

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def made_on(result: dict[str, Any], path: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = f", commit {result['commit'][:12]}" if "commit" in result else ""
    where = result["gpu"] or "CPU"
    return f"[{path.name}](results/{path.name}): {where}, {versions}{commit}, {result['date']}."


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def cells(row: Row | None) -> tuple[str, ...]:
    """Pages read, dropped mass and support recall."""
    if row is None:
        return "-", "-", "-"
    recall = f"{row['support_recall']:.4f}"
    return f"{row['pages_read']:.1%}", number(row["dropped_mass"]), recall


def at_equal_pages(rows: list[Row], pages: float) -> Row | None:
    """Of the adaptive rows the one that reads most, but at most 5% more pages, if any does."""
    most = 1.05 * pages
    fitting = [r for r in rows if r["selector"].startswith("adaptive") and r["pages_read"] <= most]
    return max(fitting, key=lambda row: row["pages_read"], default=None)


def missed(row: Row | None) -> str:
    return "-" if row is None else f"{row['needles_missed']:.0%} ({row['pages_read']:.0%})"


def study_row(rows: list[Row]) -> tuple[str, ...]:
    by_name = {row["selector"]: row for row in rows}
    paper = by_name[PAPER]
    equal = at_equal_pages(rows, paper["pages_read"])
    margin = "-" if equal is None else equal["selector"].removeprefix("adaptive, margin ")
    return (*cells(paper), margin, *cells(equal), *cells(by_name[DEFAULT]))


STUDY_TITLES = ["`gaussian-paper` reads", "drops", "recall"]
STUDY_TITLES += ["margin", "`adaptive` reads", "drops", "recall"]
STUDY_TITLES += ["`adaptive` 1.1 reads", "drops", "recall"]


def study_tables() -> Iterator[str]:
    result = load(STUDY)
    yield from ["### Selectors on synthetic and recorded heads", "", made_on(result, STUDY), ""]
    places = dict.fromkeys((r["keys"], r["length"]) for r in result["synthetic"])
    rows: list[tuple[object, ...]] = []
    needles: list[tuple[object, ...]] = []
    for keys, length in places:
        here = [r for r in result["synthetic"] if (r["keys"], r["length"]) == (keys, length)]
        rows.append((keys, length, *study_row([r for r in here if not r["needle"]])))
        with_needle = [r for r in here if r["needle"]]
        by_name = {r["selector"]: r for r in with_needle}
        shown: list[Row | None] = [by_name[name] for name in NEEDLE_SELECTORS]
        shown.insert(1, at_equal_pages(with_needle, by_name[PAPER]["pages_read"]))
        needles.append((keys, length, *map(missed, shown)))
    yield from table_lines(["keys", "length", *STUDY_TITLES], rows)
    titles = ["keys and a needle", "length", "`gaussian-paper`", "`adaptive` at equal pages"]
    titles += ["`adaptive` 1.1", "without its guard", "guard of 6.25%", "of 12.5%", "`topk` 12.5%"]
    yield from ["", "Share of needles missed, and of pages read:"]
    yield from ["", *table_lines(titles, needles), ""]
    recorded = dict.fromkeys((row["model"], row["layer"]) for row in result["recorded"])
    rows = [
        (
            model,
            layer,
            *study_row(
                [r for r in result["recorded"] if (r["model"], r["layer"]) == (model, layer)]
            ),
        )
        for model, layer in recorded
    ]
    yield from table_lines(["recorded from", "layer", *STUDY_TITLES], rows)


def of_model(part: str) -> tuple[list[Row], str]:
    """The rows of one part of the evaluation of one trained model, and what they were made on."""
    path = RESULTS / f"fidelity-entmax-{part}.json"
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


def attention_by_selector(context: int) -> dict[str, dict[str, float]]:
    """Means over layers, and worst layers, of what each selector drops at one context."""
    found: dict[str, list[Row]] = {}
    for row in of_model("attention")[0]:
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


def selector_tables() -> Iterator[str]:
    """Of one trained model: perplexity and attention by selector, and needles that were missed."""
    made = {part: of_model(part)[1] for part in MODEL_PARTS}
    yield from ["### Selectors on a trained model", "", *made.values(), ""]
    rows = of_model("perplexity")[0]
    exact = {row["context"]: row for row in rows if row["selector"] == "exact"}
    titles = ["context", "selector", "pages read", "perplexity per byte", "more than `exact`"]
    lines: list[tuple[object, ...]] = [
        (
            row["context"],
            f"`{row['selector']}`",
            f"{row['pages_read']:.1%}",
            f"{math.exp(row['nats_per_byte']):.4f}",
            more_than_exact(row, exact[row["context"]]) if row["selector"] != "exact" else "",
        )
        for row in rows
    ]
    yield from [*table_lines(titles, lines), ""]
    contexts = sorted({row["context"] for row in of_model("attention")[0]}, reverse=True)
    lines = [
        (
            context,
            f"`{name}`",
            f"{found['pages_read']:.1%}",
            number(found["dropped_mass"]),
            number(found["output_error"]),
            f"{found['support_recall']:.4f}",
            f"{found['least_recall']:.4f}",
            f"{found['nothing_dropped']:.1%}",
        )
        for context in contexts
        for name, found in sorted(
            attention_by_selector(context).items(), key=lambda item: item[1]["pages_read"]
        )
    ]
    titles = ["context", "selector", "pages read", "dropped mass", "output error", "recall"]
    titles += ["of the worst layer", "nothing dropped"]
    yield from [*table_lines(titles, lines), ""]
    yield from ["Tasks that `exact` solves and a selector does not (and the reverse):", ""]
    yield from [*needle_lines(), ""]


def lost_and_won() -> dict[tuple[str, int, str], tuple[int, int, int, float]]:
    """By task, context and selector: tasks that exact decoding solves, those of them that the
    selector does not, those that only the selector solves, and the share of pages read."""
    rows = of_model("tasks")[0]
    exact = {(r["task"], r["context"]): r["solved"] for r in rows if r["selector"] == "exact"}
    found = {}
    for row in rows:
        pairs = list(zip(exact[row["task"], row["context"]], row["solved"], strict=True))
        lost = sum(truth and not ours for truth, ours in pairs)
        won = sum(ours and not truth for truth, ours in pairs)
        place = row["task"], row["context"], row["selector"]
        found[place] = sum(truth for truth, _ in pairs), lost, won, row["pages_read"]
    return found


def needle_lines() -> list[str]:
    found = lost_and_won()
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
