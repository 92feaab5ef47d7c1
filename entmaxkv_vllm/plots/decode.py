"""Pictures of decode's speed, from rows of scripts/benchmark_decode.py and of `entmaxkv bench`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entmaxkv_vllm.bench.batch import parse_batch
from entmaxkv_vllm.bench.report import READING_LIMIT, yardstick
from entmaxkv_vllm.plots.canvas import (
    COLORS,
    NAMES,
    contexts_below,
    finish,
    provenance,
    pyplot,
    thousands,
)

STAGES: Mapping[str, tuple[str, ...]] = {
    "page scores": ("box", "model"),
    "page choice": (
        *("choose", "distance", "list_nearest", "cut", "reach", "list"),
        *("first", "wanted"),
    ),
    "keys": ("sample", "guess", "collect", "filter"),
    "threshold and values": ("attend", "attend_short", "fallback", "softmax", "softmax_combine"),
}
"""Launches by what they do; names without `_kernel`."""
STAGE_COLORS = {
    "page scores": "#e3b23c",
    "page choice": "#c8553d",
    "keys": "#1f6f8b",
    "threshold and values": "#7fb7be",
    "other": "#bbbbbb",
}


@dataclass(frozen=True)
class Point:
    """One arm of one shape at one context.

    us, spread: microseconds of a step.
    bytes: what a step cannot do without.
    support, pages_read: shares of the tokens with weight and of the pages held; None for a peer.
    kernels: microseconds of each launch by itself.
    """

    group: str
    context: int
    arm: str
    us: float
    spread: float
    bytes: int | None = None
    support: float | None = None
    pages_read: float | None = None
    kernels: Mapping[str, float] | None = None


def points_of(result: Mapping[str, Any]) -> list[Point]:
    """What a result file says of decode; nothing if it is of something else.

    The group names the shape: heads, head size, batch, and room of the block table if that is more.
    """
    rows = result.get("rows")
    if not isinstance(rows, list) or not rows:
        return []
    if result.get("benchmark") == "kernels":
        return _bench_points(result, rows)
    if all({"kernel", "context", "fa3_us", "selector"} <= row.keys() for row in rows):
        return _decode_points(rows)
    return []


def _group(row: Mapping[str, Any], batch: int, room: int) -> str:
    heads = f"{row['query_heads']}/{row['kv_heads']} heads of {row['head_size']}"
    sequences = "one sequence" if batch == 1 else f"{batch} sequences"
    table = f", block table for {room} tokens" if room else ""
    return f"{heads}, {sequences}{table}"


def _decode_points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    rooms = {row["table_tokens"] for row in rows}
    wide = len(rooms) == 1 and any(row["context"] < row["table_tokens"] for row in rows)
    points: list[Point] = []
    for row in rows:
        group = _group(row, row["batch"], row["table_tokens"] if wide else 0)
        place = group, row["context"]
        details = row["bytes"], row["support"], row["pages_read"], row.get("kernels_us")
        points.append(Point(*place, row["selector"], row["us"], row["us_spread"], *details))
        # Each row has a FlashAttention-3 of its own, timed in turn with it: the first stands.
        if not any((p.group, p.context, p.arm) == (*place, "fa3") for p in points):
            points.append(Point(*place, "fa3", row["fa3_us"], row["fa3_us_spread"]))
    return points


def _bench_points(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    points = []
    for row in rows:
        requests = parse_batch(row["batch"])
        contexts = {request.tokens for request in requests}
        if row["kind"] != "decode" or len(contexts) > 1:
            continue
        group = _group(result, len(requests), result["table_tokens"])
        if row["arm"].startswith("fa3"):
            if row["us"] > (yardstick(rows, row["batch"]) or 0):
                continue
            arm = "fa3"
        else:
            arm = row["arm"]
        counted = (row.get(name) for name in ("bytes", "support", "pages_read", "kernels_us"))
        place = group, contexts.pop(), arm
        points.append(Point(*place, row["us"], row["us_spread"], *counted))
    return points


def _caption(result: Mapping[str, Any], points: Sequence[Point]) -> str:
    supports = [point.support for point in points if point.support]
    keys = {"random": "random keys", "clustered": "keys in topics"}.get(result.get("data", ""), "")
    weight = f"{min(supports):.2%} to {max(supports):.2%} of tokens with weight" if supports else ""
    return "; ".join(filter(None, (keys, weight, provenance(result))))


def _groups(points: Sequence[Point], least: int) -> dict[str, list[Point]]:
    """Points by shape, of shapes with at least so many contexts."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return {
        name: own for name, own in groups.items() if len({point.context for point in own}) >= least
    }


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by arm, in the order of contexts."""
    arms: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.context):
        arms.setdefault(point.arm, []).append(point)
    return arms


def _label(arm: str, line: Sequence[Point]) -> str:
    """The arm, and how much of its pages it reads if that is not all."""
    shares = sorted(f"{p.pages_read:.0%}" for p in line if p.pages_read and p.pages_read < 1)
    name = NAMES.get(arm, arm)
    if not shares:
        return name
    return f"{name}, {' to '.join(dict.fromkeys((shares[0], shares[-1])))} of pages"


def latency(result: Mapping[str, Any]) -> Any:
    """Microseconds of a step against context, a panel for each shape; None without such rows."""
    points = points_of(result)
    groups = _groups(points, 3)
    if not groups:
        return None
    figure, axes = pyplot().subplots(
        1, len(groups), figsize=(max(6.4, 4.6 * len(groups)), 3.6), squeeze=False, sharey=True
    )
    for axis, (name, own) in zip(axes[0], groups.items(), strict=True):
        for arm, line in _lines(own).items():
            axis.errorbar(
                [p.context for p in line],
                [p.us for p in line],
                yerr=[p.spread / 2 for p in line],
                color=COLORS.get(arm),
                label=_label(arm, line),
                marker="o",
                markersize=3.5,
                linewidth=1.5,
                linestyle="--" if arm in NAMES else "-",
            )
        axis.set_yscale("log")
        axis.set_title(name, fontsize=9, loc="left")
        contexts_below(axis, sorted({p.context for p in own}))
    axes[0][0].set_ylabel("microseconds of a decode step")
    axes[0][0].legend()
    finish(figure, "Decode latency", _caption(result, points))
    return figure


def step_time(result: Mapping[str, Any]) -> Any:
    """Stacked bars of where a step's time goes, relative to FlashAttention-3.

    A bar is as high as the step of the graph; its parts are in the proportion of the launches,
    which were timed one by one. None for results without launches.
    """
    profiled = [point for point in points_of(result) if point.kernels]
    if not profiled:
        return None
    # One shape: the first that was profiled.
    group = profiled[0].group
    points = [point for point in points_of(result) if point.group == group]
    contexts = sorted({point.context for point in profiled if point.group == group})
    arms = [arm for arm in _lines(points) if arm == "fa3" or any(p.arm == arm for p in profiled)]
    arms.sort(key=lambda arm: arm != "fa3")
    flash = {p.context: p.us for p in points if p.arm == "fa3"}
    figure, axis = pyplot().subplots(figsize=(max(6.4, 1.2 + 1.9 * len(contexts)), 3.8))
    width = 0.8 / len(arms)
    for i, context in enumerate(contexts):
        for j, arm in enumerate(arms):
            point = next(p for p in points if (p.context, p.arm) == (context, arm))
            x, whole = i + (j - (len(arms) - 1) / 2) * width, point.us / flash[context]
            if point.kernels is None:
                axis.bar(x, whole, 0.92 * width, color=COLORS["fa3"])
            else:
                _stack(axis, x, 0.92 * width, whole, point.kernels)
            label = f"{'FA3' if arm == 'fa3' else arm}\n{point.us:.0f} us"
            axis.text(x, whole + 0.01, label, ha="center", va="bottom", size=7)
    for stage in ("fa3", *STAGES):
        color = STAGE_COLORS.get(stage, COLORS["fa3"])
        axis.bar(0, 0, color=color, label=NAMES.get(stage, stage))
    axis.set_xticks(range(len(contexts)), list(map(thousands, contexts)))
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("time of a step, FlashAttention-3 = 1")
    axis.set_ylim(0, 1.25)
    axis.grid(axis="x", visible=False)
    axis.legend(ncols=len(STAGES) + 1, loc="upper center", fontsize=7, bbox_to_anchor=(0.5, 1.1))
    caption = _caption(result, points)
    caption += "\nparts of a bar are in the proportion of its launches, timed one by one"
    finish(figure, f"Where a decode step's time goes ({group})", caption)
    return figure


def _stack(axis: Any, x: float, width: float, whole: float, kernels: Mapping[str, float]) -> None:
    stages = dict.fromkeys((*STAGES, "other"), 0.0)
    for name, us in kernels.items():
        launch = name.removesuffix("_kernel")
        stage = next((s for s, launches in STAGES.items() if launch in launches), "other")
        stages[stage] += us
    below, total = 0.0, sum(kernels.values())
    for stage, us in stages.items():
        height = whole * us / total
        axis.bar(x, height, width, bottom=below, color=STAGE_COLORS[stage])
        below += height


def bytes_read(result: Mapping[str, Any]) -> Any:
    """Bytes that a step cannot do without over its time, beside what reading reaches; None without
    such rows."""
    points = [point for point in points_of(result) if point.bytes]
    groups = _groups(points, 3)
    if not groups:
        return None
    figure, axes = pyplot().subplots(
        1, len(groups), figsize=(max(6.4, 4.6 * len(groups)), 3.4), squeeze=False, sharey=True
    )
    limit = READING_LIMIT.get(result["gpu"])
    for axis, (name, own) in zip(axes[0], groups.items(), strict=True):
        for arm, line in _lines(own).items():
            rates = [(p.bytes or 0) / p.us / 1e6 for p in line]
            contexts = [p.context for p in line]
            axis.plot(
                contexts,
                rates,
                "o-",
                markersize=3.5,
                color=COLORS.get(arm),
                label=_label(arm, line),
            )
        if limit:
            label = f"reading alone reaches {limit / 1e12:.2f} TB/s"
            axis.axhline(limit / 1e12, color="#222222", linestyle=":", label=label)
        axis.set_ylim(0)
        axis.set_title(name, fontsize=9, loc="left")
        contexts_below(axis, sorted({p.context for p in own}))
    axes[0][0].set_ylabel("TB/s of what a step has to read")
    axes[0][0].legend(fontsize=7)
    finish(figure, "Bytes read against the limit", _caption(result, points))
    return figure
