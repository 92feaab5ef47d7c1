"""Tables of docs/fidelity.md that compare selectors on synthetic and on recorded heads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import table_lines

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
STUDY = RESULTS / "fidelity-selectors.json"
CODES_STUDY = RESULTS / "fidelity-codes.json"
PAPER = "gaussian-paper"
CODED = "adaptive by codes, margin 1.25"
DEFAULT = "adaptive, margin 1.25"
NEEDLE_SELECTORS = [PAPER, DEFAULT, "adaptive, margin 1.1"]
NEEDLE_SELECTORS += [f"guard {guard}, margin 1.1" for guard in ("0", "1.1", "1.15", "1.3")]
NEEDLE_SELECTORS += ["topk, 12.50%"]

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
    adaptive = (row for row in rows if row["selector"].startswith("adaptive"))
    fitting = [row for row in adaptive if row["pages_read"] <= most]
    return max(fitting, key=lambda row: row["pages_read"], default=None)


def missed(row: Row | None) -> str:
    return "-" if row is None else f"{row['needles_missed']:.0%} ({row['pages_read']:.0%})"


def study_row(rows: list[Row]) -> tuple[str, ...]:
    by_name = {row["selector"]: row for row in rows}
    paper = by_name[PAPER]
    equal = at_equal_pages(rows, paper["pages_read"])
    margin = "-" if equal is None else equal["selector"].removeprefix("adaptive, margin ")
    return (*cells(paper), margin, *cells(equal), *cells(by_name[DEFAULT]))


def codes_tables() -> Iterator[str]:
    """What selectors drop that go by codes of keys."""
    result = load(CODES_STUDY)
    yield from ["### The same by codes of keys", "", made_on(result, CODES_STUDY), ""]
    lines: list[tuple[object, ...]] = []
    for keys, length in dict.fromkeys((r["keys"], r["length"]) for r in result["synthetic"]):
        here = [r for r in result["synthetic"] if (r["keys"], r["length"]) == (keys, length)]
        plain, needle = (
            {row["selector"]: row for row in here if row["needle"] == wanted}
            for wanted in (False, True)
        )
        equal = at_equal_pages(list(plain.values()), plain[PAPER]["pages_read"])
        lines.append(
            (
                keys,
                length,
                *cells(plain[PAPER])[:2],
                *cells(equal)[:2],
                *cells(plain[CODED]),
                missed(needle[PAPER]),
                missed(needle[CODED]),
                f"{plain['pruned by codes']['pages_read']:.1%}",
            )
        )
    titles = ["keys", "length", "`gaussian-paper` reads", "drops"]
    titles += ["`adaptive` at equal pages reads", "drops", "`adaptive` reads", "drops", "recall"]
    titles += ["needles missed by `gaussian-paper`", "by `adaptive`", "`prune` reads"]
    yield from table_lines(titles, lines)


STUDY_TITLES = ["`gaussian-paper` reads", "drops", "recall"]
STUDY_TITLES += ["margin", "`adaptive` reads", "drops", "recall"]
STUDY_TITLES += ["`adaptive` 1.25 reads", "drops", "recall"]


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
    titles += ["`adaptive` 1.25", "1.1", "1.1 without its guard", "guard 1.1", "1.15", "1.3"]
    titles += ["`topk` 12.5%"]
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
