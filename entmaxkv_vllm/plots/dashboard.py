"""A picture of the dashboard's panels, from scripts/record_dashboard.py."""

import math
from collections.abc import Mapping
from typing import Any

from entmaxkv_vllm.plots.canvas import finish, provenance, pyplot

COLUMNS = 3
PALETTE = ("#1f6f8b", "#c8553d", "#7b9e42", "#e3b23c", "#7fb7be", "#8a6fa8", "#bbbbbb")


def panels(result: Mapping[str, Any]) -> Any:
    """Each panel over time, with lines where a phase begins; None for another result."""
    if not {"panels", "phases", "seconds"} <= result.keys():
        return None
    rows = math.ceil(len(result["panels"]) / COLUMNS)
    figure, axes = pyplot().subplots(
        rows, COLUMNS, figsize=(3.6 * COLUMNS, 2.2 * rows), squeeze=False, sharex=True
    )
    for axis, panel in zip(axes.flat, result["panels"], strict=False):
        _draw(axis, panel, result)
    for axis in axes.flat[len(result["panels"]) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    names = "; ".join(f"{i + 1}: {phase['name']}" for i, phase in enumerate(result["phases"]))
    caption = (
        f"model {result['model']}, {result['selector']}; {provenance(result)}\n"
        f"{names}\ndrawn from the dashboard's queries over scrapes of a running server, rates over "
        f"{result['rate_seconds']} s; not by Grafana"
    )
    finish(figure, "What the dashboard shows of a server under load", caption)
    return figure


def _draw(axis: Any, panel: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    for (name, values), color in zip(panel["series"].items(), PALETTE, strict=False):
        numbers = [math.nan if value is None else value for value in values]
        axis.plot(result["seconds"], numbers, color=color, linewidth=1.2, label=name)
    for i, phase in enumerate(result["phases"]):
        axis.axvline(phase["start"], color="#aaaaaa", linewidth=0.7, linestyle=":")
        axis.text(phase["start"], 1, f" {i + 1}", transform=axis.get_xaxis_transform(), size=6)
    axis.set_title(panel["title"], fontsize=8, loc="left", pad=9)
    axis.tick_params(labelsize=7)
    axis.locator_params(nbins=4)
    axis.set_ylim(0, 1.02 if panel["unit"] == "percentunit" else None)
    if panel["unit"] == "percentunit":
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    elif panel["unit"] == "s":
        axis.set_ylabel("seconds", fontsize=7)
    if len(panel["series"]) > 1:
        axis.legend(fontsize=6)
