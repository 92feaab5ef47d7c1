"""Compare page selectors by what they drop and what they read, on synthetic and on recorded heads.

Synthetic keys are of several kinds, some with one isolated needle: a key of which only the first
query head knows, made so large in that query's direction that it takes most of the head's weight.
Queries are scaled so that a given share of the keys is in the exact support. Recorded keys and
queries are what `entmaxkv evaluate --inputs` writes. Nothing but selection and exact weights is
computed, with alpha 1.5, by the reference.
"""

import argparse
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entmaxkv_kernels import (
    Adaptive,
    Exact,
    Gaussian,
    PagedCache,
    PageLayout,
    Selector,
    TopK,
    allocate_pages,
    append,
    split_pages,
)
from entmaxkv_kernels.reference.entmax import solve_entmax
from entmaxkv_kernels.reference.select import select_pages
from entmaxkv_vllm.bench.provenance import checked_out

ALPHA, HEAD_SIZE, GROUP, PAGE_SIZE = 1.5, 64, 4, 16
LENGTHS = (8192, 32768, 131072)
SUPPORTS = (0.0005, 0.002, 0.01)
"""Shares of the keys that are in the support; instances take turns."""
MARGINS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
CODED_MARGINS = (0.01, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
FIRST_PAGES = (4, 8, 32)
REACHES = (1.0, 1.5, 1.75, 2.0, 2.25)
QUANTILES = (0.1, 0.5, 0.9)
GUARDS = (0.0, 1.1, 1.15, 1.3)
TOPIC_LENGTH, TOPICS, RANK = 128, 64, 16
NEEDLE = 0.7
"""How far the needle's z lies above the largest other one; a distance of 1 takes all weight."""


class Head(NamedTuple):
    """One KV head at one position.

    key: [tokens, head_size]. query: [group, head_size], scaled so that its products are z.
    """

    key: Tensor
    query: Tensor


def independent(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random)


def heavy_channels(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, less its scale, in each number."""
    normal = torch.randn((4, *shape), generator=random)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def heavy_tokens(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    """The same for the length of each key."""
    normal = torch.randn((3, shape[0], 1), generator=random)
    return torch.randn(shape, generator=random) / normal.square().mean(0).sqrt()


def skewed(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    return torch.empty(shape).exponential_(generator=random) ** 1.5


def clustered(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    """Topics that recur, a tenth of the variance each token's own, 4 channels 6 times as wide."""
    count, size = shape
    topics = torch.randn(TOPICS, RANK, generator=random) @ torch.randn(RANK, size, generator=random)
    lengths = torch.empty(count).exponential_(1 / TOPIC_LENGTH, generator=random).ceil().long()
    topic = torch.randint(TOPICS, (count,), generator=random).repeat_interleave(lengths)[:count]
    own = torch.randn(shape, generator=random)
    widths = torch.ones(size)
    widths[:4] = 6
    key = 0.9**0.5 * topics[topic] / RANK**0.5 + 0.1**0.5 * own
    return key * widths + torch.randn(size, generator=random)


def rotated(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    """The same, rotated by position as RoPE does."""
    key = clustered(shape, random)
    half = shape[1] // 2
    angle = torch.arange(shape[0])[:, None] * 5e5 ** (-torch.arange(half) / half)
    cosine, sine = angle.cos(), angle.sin()
    first, second = key[:, :half], key[:, half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), 1)


Compared = Callable[[int], dict[str, Selector]]

KINDS: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "independent": independent,
    "heavy-tailed channels": heavy_channels,
    "heavy-tailed tokens": heavy_tokens,
    "skewed": skewed,
    "clustered": clustered,
    "clustered, rotated": rotated,
}


def scaled_to_support(query: Tensor, key: Tensor, share: float) -> Tensor:
    """The query [group, head_size] times what puts a share of the keys into each head's support."""
    scores = query @ key.mT
    low, high = torch.full((len(query), 1), 1e-3), torch.full((len(query), 1), 1e4)
    for _ in range(30):
        middle = (low * high).sqrt()
        weights = solve_entmax(scores * middle, ALPHA)[0]
        few = (weights > 0).double().mean(1, keepdim=True) < share
        high, low = torch.where(few, middle, high), torch.where(few, low, middle)
    return query * middle


def synthetic(kind: str, length: int, needle: bool, seed: int) -> Head:
    """Keys of a kind, and queries that resemble keys where these are clustered."""
    random = torch.Generator().manual_seed(seed)
    key = KINDS[kind]((length, HEAD_SIZE), random)
    query = torch.randn(GROUP, HEAD_SIZE, generator=random)
    if kind.startswith("clustered"):
        like = key[torch.randint(length, (GROUP,), generator=random)] - key.mean(0)
        query = like / key.std(0) ** 2 + 0.5 * query / key.std(0)
    query = query / query.norm(dim=1, keepdim=True)
    query = scaled_to_support(query, key, SUPPORTS[seed % len(SUPPORTS)])
    if needle:
        place = int(torch.randint(length - PAGE_SIZE, (1,), generator=random))
        scores = key @ query[0]
        lacking = scores.max() + NEEDLE - scores[place]
        key[place] += query[0] * lacking / query[0].square().sum()
    return Head(key, query)


def cache_of(head: Head, statistics: tuple[str, ...]) -> PagedCache:
    length, size = head.key.shape
    layout = PageLayout(PAGE_SIZE, size, statistics)
    cache = split_pages(allocate_pages(-(-length // PAGE_SIZE), 1, layout), layout)
    key = head.key[:, None]
    append(cache, key, torch.zeros_like(key), torch.arange(length))
    return cache


def measure(head: Head, selectors: dict[str, Selector]) -> dict[str, dict[str, list[float]]]:
    """By selector: the share of pages read, and dropped mass and support recall by query head."""
    length = len(head.key)
    weights = solve_entmax(head.query @ head.key.mT, ALPHA)[0]
    pages = -(-length // PAGE_SIZE)
    padded = torch.nn.functional.pad(weights, (0, pages * PAGE_SIZE - length))
    by_page = padded.unflatten(1, (pages, PAGE_SIZE))
    mass, support = by_page.sum(2), (by_page > 0).sum(2)
    table = torch.arange(pages)[None]
    found = {}
    kept = {selector.statistics for selector in selectors.values()}
    caches = {statistics: cache_of(head, statistics) for statistics in kept}
    for name, selector in selectors.items():
        selection = select_pages(
            head.query[None],
            caches[selector.statistics],
            table,
            torch.tensor([length]),
            scale=1 / (ALPHA - 1),
            alpha=ALPHA,
            selector=selector,
            alibi_slopes=None,
            sliding_window=None,
            exact_rows=None,
            exact_below=0,
        )
        read = selection.selected[0, 0]
        found[name] = {
            "pages_read": [read.double().mean().item()],
            "dropped_mass": mass[:, ~read].sum(1).tolist(),
            "support_recall": (support[:, read].sum(1) / support.sum(1)).tolist(),
        }
    return found


def selectors_for(length: int) -> dict[str, Selector]:
    """Those that are compared; the paper's also with lower quantiles, which read less."""
    found: dict[str, Selector] = {
        "gaussian": Gaussian(),
        "gaussian-paper": Gaussian(shared_spread=True),
    }
    for q in QUANTILES:
        found[f"gaussian, quantile {q:g}"] = Gaussian(quantile=q, narrow_quantile=q)
    for margin in MARGINS:
        found[f"adaptive, margin {margin:g}"] = Adaptive(margin=margin)
    for reach in REACHES:
        found[f"fixed reach, {reach:g}"] = Adaptive(reach=reach)
    for guard in GUARDS:
        found[f"guard {guard:g}, margin 1.1"] = Adaptive(margin=1.1, guard=guard)
    for share in (0.03, 0.0625, 0.125, 0.25, 0.5):
        found[f"topk, {share:.2%}"] = TopK(int(share * length))
    return found


def by_codes(length: int) -> dict[str, Selector]:
    """Those that go by codes of keys, and the paper's."""
    found: dict[str, Selector] = {"gaussian-paper": Gaussian(shared_spread=True)}
    for margin in CODED_MARGINS:
        found[f"adaptive by codes, margin {margin:g}"] = Adaptive(margin=margin, codes=True)
    for pages in FIRST_PAGES:
        name = f"adaptive by codes, {pages} first pages"
        found[name] = Adaptive(first_pages=pages, codes=True)
    for share in (0.015, 0.03, 0.0625, 0.125, 0.25):
        found[f"topk by codes, {share:.2%}"] = TopK(int(share * length), codes=True)
    found["pruned by codes"] = Exact(prune=True, codes=True)
    return found


def joined(parts: list[dict[str, dict[str, list[float]]]]) -> Iterator[dict[str, Any]]:
    """One row for each selector, over all heads."""
    for name in parts[0]:
        values = {
            key: torch.tensor([x for part in parts for x in part[name][key]], dtype=torch.float64)
            for key in parts[0][name]
        }
        dropped = values["dropped_mass"]
        yield {
            "selector": name,
            "heads": len(dropped),
            "pages_read": round(values["pages_read"].mean().item(), 5),
            "dropped_mass": float(f"{dropped.mean().item():.4g}"),
            "dropped_mass_p99": float(f"{dropped.quantile(0.99).item():.4g}"),
            "dropped_mass_worst": float(f"{dropped.max().item():.4g}"),
            "support_recall": round(values["support_recall"].mean().item(), 5),
        }


def study_synthetic(
    kind: str, length: int, needle: bool, instances: int, compared: Compared
) -> list[dict[str, Any]]:
    parts, needles = [], []
    for seed in range(instances):
        found = measure(synthetic(kind, length, needle, seed), compared(length))
        needles.append({name: one["dropped_mass"][0] for name, one in found.items()})
        parts.append(found)
    rows = list(joined(parts))
    for row in rows:
        row |= {"keys": kind, "length": length, "needle": needle}
        if needle:
            missed = sum(one[row["selector"]] > 0.3 for one in needles)
            row["needles_missed"] = missed / instances
    return rows


def study_recorded(path: Path, stride: int, compared: Compared) -> Iterator[dict[str, Any]]:
    """Every layer of a recorded sequence, at every stride-th position of those recorded."""
    saved = torch.load(path)
    everything = []
    for layer, (keys, queries) in enumerate(zip(saved["keys"], saved["queries"], strict=True)):
        parts = []
        heads = queries.shape[1] // len(keys)
        for index in range(0, len(saved["positions"]), stride):
            length = int(saved["positions"][index]) + 1
            for kv_head, key in enumerate(keys):
                own = queries[index, kv_head * heads : (kv_head + 1) * heads]
                query = own.float() * (ALPHA - 1) * key.shape[-1] ** -0.5
                parts.append(measure(Head(key[:length].float(), query), compared(length)))
        everything += parts
        yield from ({"layer": layer, **row} for row in joined(parts))
    yield from ({"layer": "all", **row} for row in joined(everything))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--instances", type=int, default=12, help="of each kind and length")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--recorded", nargs="*", default=[], help="NAME=FILE, recorded inputs")
    parser.add_argument("--stride", type=int, default=4, help="of recorded positions")
    parser.add_argument("--codes", action="store_true", help="selectors that go by codes of keys")
    arguments = parser.parse_args()
    compared = by_codes if arguments.codes else selectors_for
    result: dict[str, Any] = {
        "gpu": "CPU",
        "versions": {"torch": torch.__version__},
        "commit": checked_out(),
        "date": datetime.date.today().isoformat(),
        "synthetic": [],
        "recorded": [],
    }
    for length in arguments.lengths:
        for kind in KINDS:
            for needle in (False, True):
                rows = study_synthetic(kind, length, needle, arguments.instances, compared)
                result["synthetic"] += rows
                print(length, kind, needle, rows[0], flush=True)
        arguments.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    for name, _, file in (entry.partition("=") for entry in arguments.recorded):
        for row in study_recorded(Path(file), arguments.stride, compared):
            result["recorded"].append({"model": name, **row})
            if row["layer"] == "all":
                print(result["recorded"][-1], flush=True)
        arguments.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
