"""A picture of what selectors drop, from the results of fidelity measurements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entmaxkv_vllm.plots.canvas import COLORS, finish, provenance, pyplot, thousands

SMALLEST = 1e-8
"""Dropped mass below which the axis is linear, so that it has a place for 0."""


BUDGETS = ("token_budget", "margin")
"""Settings whose names go without saying."""


@dataclass(frozen=True)
class Drop:
    """Shares, of one selector in one layer (and at one context, if known)."""

    selector: str
    layer: int
    context: int | None
    pages_read: float
    mean: float
    p99: float
    worst: float

    @property
    def kind(self) -> str:
        """The selector without its budget, the first of its settings."""
        name, _, settings = self.selector.partition(":")
        budget, *others = settings.split(",")
        of, named, _ = budget.partition("=")
        by = f" by {of}" if named and of not in BUDGETS else ""
        return ", ".join([name + by, *others])


def drops_of(result: Mapping[str, Any]) -> list[Drop]:
    """What a result says of dropped mass; nothing if it is of something else.

    Rows are `layers` of one selector with flat names, or `attention` of several with one object a
    measure.
    """
    drops = []
    for row in result.get("layers", ()):
        if "dropped_mass_mean" in row:
            measured = (row[f"dropped_mass_{name}"] for name in ("mean", "p99", "worst"))
            place = result["selector"], row["layer"], None, row["pages_read_mean"]
            drops.append(Drop(*place, *measured))
    for row in result.get("attention", ()):
        mass = row.get("dropped_mass")
        if isinstance(mass, Mapping) and row["selector"] != "exact":
            place = row["selector"], row["layer"], row["context"], row["pages_read"]["mean"]
            drops.append(Drop(*place, *(mass[name] for name in ("mean", "p99", "worst"))))
    return drops


def dropped_mass(result: Mapping[str, Any]) -> Any:
    """Dropped mass against the share of pages read; None without any.

    Of one selector a point for each layer; of several the mean over layers, with a line for each
    context through the budgets of one kind. Of a study of selectors a panel for each kind of heads.
    """
    if study := study_of(result):
        return _panels(study, result)
    drops = drops_of(result)
    if not drops:
        return None
    figure, axis = pyplot().subplots(figsize=(5.6, 4.0))
    if len({drop.selector for drop in drops}) == 1:
        _by_layer(axis, drops)
    else:
        _by_budget(axis, drops)
    _set_up(axis)
    axis.set_ylabel("dropped mass: exact weight on unread tokens")
    columns = 1 + (len(axis.get_legend_handles_labels()[0]) > 6)
    axis.legend(fontsize=7 if columns == 1 else 6, ncols=columns)
    model = f"model {result.get('model', 'unknown')}"
    finish(figure, "Dropped mass against budget", f"{model}; {provenance(result)}")
    return figure


def _set_up(axis: Any) -> None:
    axis.set_yscale("symlog", linthresh=SMALLEST)
    axis.set_yticks([0, 1e-8, 1e-6, 1e-4, 1e-2, 1])
    axis.minorticks_off()
    axis.set_ylim(-SMALLEST / 4, 1.5)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_xlabel("pages read, share of those held")


Study = dict[str, dict[str, list[tuple[float, float]]]]


def study_of(result: Mapping[str, Any]) -> Study:
    """Points (pages read, mean dropped mass) of a study of selectors, by kind of heads and family.

    A selector is named `FAMILY, SETTING`. Synthetic heads are the longest ones without a needle,
    recorded ones all layers together. Families with a number in their name are variants of others.
    """
    synthetic, recorded = result.get("synthetic", ()), result.get("recorded", ())
    longest = max((row["length"] for row in synthetic), default=0)
    rows = [
        (f"{row['keys']} keys, {thousands(row['length'])}", row)
        for row in synthetic
        if row["length"] == longest and not row["needle"]
    ]
    rows += [(f"recorded: {row['model']}", row) for row in recorded if row["layer"] == "all"]
    study: Study = {}
    for place, row in rows:
        family = row["selector"].partition(",")[0]
        if not any(letter.isdigit() for letter in family):
            points = study.setdefault(place, {}).setdefault(family, [])
            points.append((row["pages_read"], row["dropped_mass"]))
    return study


def _panels(study: Study, result: Mapping[str, Any]) -> Any:
    columns = min(3, len(study))
    rows = -(-len(study) // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(max(6.4, 3.6 * columns), 2.9 * rows), squeeze=False, sharey=True
    )
    for axis, (place, families) in zip(axes.flat, study.items(), strict=False):
        for family, points in families.items():
            reads, masses = zip(*sorted(points), strict=True)
            color = COLORS.get(family)
            axis.plot(reads, masses, "o-", markersize=3, linewidth=1, color=color, label=family)
        _set_up(axis)
        axis.set_title(place, fontsize=9, loc="left")
    for axis in axes.flat[len(study) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean dropped mass")
    axes[0][0].legend(fontsize=7)
    finish(figure, "Dropped mass against budget", provenance(result))
    return figure


def _by_layer(axis: Any, drops: list[Drop]) -> None:
    color = COLORS.get(drops[0].kind)
    read = [drop.pages_read for drop in drops]
    for name, marker in (("mean", "o"), ("p99", "s"), ("worst", "x")):
        masses = [getattr(drop, name) for drop in drops]
        label = f"{drops[0].selector}, {'99th percentile' if name == 'p99' else name}"
        axis.plot(read, masses, marker, markersize=5, color=color, label=label, alpha=0.85)
    for drop in drops:
        axis.annotate(
            f"layer {drop.layer}",
            (drop.pages_read, drop.worst),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=7,
        )


def _by_budget(axis: Any, drops: list[Drop]) -> None:
    markers = dict(zip(sorted({drop.context or 0 for drop in drops}), "osD^v<>P", strict=False))
    lines: dict[tuple[str, int], dict[str, list[Drop]]] = {}
    for drop in drops:
        line = lines.setdefault((drop.kind, drop.context or 0), {})
        line.setdefault(drop.selector, []).append(drop)
    for (kind, context), budgets in lines.items():
        points = sorted(
            (
                sum(drop.pages_read for drop in own) / len(own),
                sum(drop.mean for drop in own) / len(own),
            )
            for own in budgets.values()
        )
        axis.plot(
            *zip(*points, strict=True),
            marker=markers.get(context, "o"),
            markersize=4.5,
            color=COLORS.get(kind),
            label=f"{kind}, {thousands(context)} tokens" if context else kind,
        )
