"""Compare the pages that boxes of 8-bit numbers choose with those that the keys' extremes choose.

For keys of several kinds and random queries with the wanted support: the share of the pages within
the budget that both choose, and the exact entmax weight (alpha 1.5) on tokens of the pages that
either leaves out. Prints the table of docs/kernels.md.
"""

import argparse
import math

import torch
from torch import Tensor

from entmaxkv_kernels import TopK
from entmaxkv_kernels.reference.append import box_between
from entmaxkv_kernels.reference.candidates import Candidates
from entmaxkv_kernels.reference.entmax import entmax_threshold_sort
from entmaxkv_kernels.reference.quest import quest_pages

PAGE_SIZE, KV_HEADS, GROUP, HEAD_SIZE = 16, 8, 4, 128


def make_keys(kind: str, tokens: int) -> Tensor:
    """[tokens, KV_HEADS, HEAD_SIZE], bf16 numbers in fp32."""
    key = torch.randn(tokens, KV_HEADS, HEAD_SIZE)
    order = torch.rand(KV_HEADS, HEAD_SIZE).argsort(1)
    if kind == "in topics":
        # Topics last 128 tokens on average and are half of the variance.
        topics = torch.randn(64, KV_HEADS, HEAD_SIZE)
        segment = (torch.rand(tokens) < 1 / 128).cumsum(0)
        topic = torch.randint(64, (int(segment[-1]) + 1,))
        key = (topics[topic[segment]] + key) * 0.5**0.5
    elif kind == "normal, 4 channels 10 times as wide":
        key *= torch.where(order < 4, 10.0, 1.0)
    elif kind == "normal, 2 channels 100 times as wide":
        key *= torch.where(order < 2, 100.0, 1.0)
    elif kind == "normal, 4 channels 20 deviations off zero":
        key += torch.where(order < 4, 20 * torch.randn(KV_HEADS, HEAD_SIZE).sign(), 0.0)
    return key.bfloat16().float()


KINDS = (
    "normal",
    "in topics",
    "normal, 4 channels 10 times as wide",
    "normal, 2 channels 100 times as wide",
    "normal, 4 channels 20 deviations off zero",
)


def scores_of(key: Tensor, query: Tensor, support: float) -> tuple[Tensor, float]:
    """z of all keys [GROUP, tokens], and what the query was scaled by for the wanted support."""
    z = query.double() @ key.double().T
    low, high = 1e-4, 1e2
    for _ in range(24):
        middle = math.sqrt(low * high)
        scaled = z * middle
        share = (scaled > entmax_threshold_sort(scaled, 1.5)[:, None]).double().mean().item()
        low, high = (middle, high) if share > support else (low, middle)
    return z * low, low


def best_pages(query: Tensor, center: Tensor, half_width: Tensor, budget: int) -> Tensor:
    """[pages] bool: those that `topk` chooses, and the last page."""
    pages = len(center)
    candidates = Candidates(
        query=query[None, None],
        statistics=torch.stack((center, half_width))[:, None, None],
        ranked=torch.arange(pages)[None] < pages - 1,
        seq_lens=torch.tensor([pages * PAGE_SIZE]),
        page_size=PAGE_SIZE,
        scale=1.0,
        alpha=1.5,
        alibi_slopes=None,
    )
    chosen = quest_pages(candidates, TopK(budget * PAGE_SIZE))[0, 0]
    chosen[-1] = True
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 16)
    parser.add_argument("--support", type=float, default=0.005, help="share of tokens with weight")
    parser.add_argument("--share", type=float, default=0.05, help="share of pages to choose")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    budget = int(arguments.share * arguments.tokens) // PAGE_SIZE
    print("| keys | same pages | weight left out, 8 bits | exact extremes |\n|---|---|---|---|")
    for kind in KINDS:
        keys = make_keys(kind, arguments.tokens)
        same, left_out = [], []
        for h in range(KV_HEADS):
            key, query = keys[:, h], torch.randn(GROUP, HEAD_SIZE)
            z, length = scores_of(key, query, arguments.support)
            weight = (z - entmax_threshold_sort(z, 1.5)[:, None]).clamp_min(0).square()
            mass = (weight / weight.sum(1, keepdim=True)).unflatten(1, (-1, PAGE_SIZE)).sum(2)
            pages = key.unflatten(0, (-1, PAGE_SIZE))
            low, high = pages.amin(1), pages.amax(1)
            statistics, scales = box_between(low, high)
            boxes, query = statistics * scales[..., None], query * length
            chosen = (
                best_pages(query, boxes[:, 0], boxes[:, 1], budget),
                best_pages(query, (low + high) / 2, (high - low) / 2, budget),
            )
            same.append(((chosen[0] & chosen[1]).sum() - 1).item() / budget)
            left_out.append([(mass * ~read).sum(1).mean().item() for read in chosen])
        by_boxes, by_extremes = torch.tensor(left_out).mean(0).tolist()
        mean, worst = sum(same) / KV_HEADS, min(same)
        print(f"| {kind} | {mean:.1%} ({worst:.1%}) | {by_boxes:.3f} | {by_extremes:.3f} |")


if __name__ == "__main__":
    main()
