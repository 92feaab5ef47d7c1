"""Many values in few numbers: means, quantiles, and the worst."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

QUANTILES = (0.5, 0.9, 0.99, 0.999)
POSITION_BINS = 8


def summary(values: Tensor, worst: str) -> dict[str, float]:
    """Mean, quantiles and worst of all values; quantiles are of what is worse than most."""
    flat = values.flatten().double()
    bad = flat if worst == "max" else -flat
    sign = 1 if worst == "max" else -1
    order = bad.sort().values
    at = [min(len(order) - 1, math.ceil(q * len(order)) - 1) for q in QUANTILES]
    found = {"mean": flat.mean().item()}
    found |= {f"p{100 * q:g}": sign * order[i].item() for q, i in zip(QUANTILES, at, strict=True)}
    found["worst"] = sign * order[-1].item()
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def place_summaries(values: Tensor, worst: str) -> dict[str, Any]:
    """Of values [positions, heads]: all together, and lists by head and by position."""

    def short(parts: Sequence[Tensor]) -> dict[str, list[float]]:
        wholes = [summary(part, worst) for part in parts]
        return {key: [whole[key] for whole in wholes] for key in ("mean", "p99", "worst")}

    return {
        **summary(values, worst),
        "by_head": short(values.unbind(1)),
        "by_position": short(values.chunk(POSITION_BINS)),
    }
