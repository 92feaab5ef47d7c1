"""Compare the pages that `topk` chooses by its boxes with those that other rules choose.

For keys of several kinds and random queries with the wanted support: the exact entmax weight (alpha
1.5) on tokens of the pages that each rule leaves out, with the same budget, and the share of the
pages that `topk` chooses by boxes that are not rounded to 8 bits, too. Prints the table of
docs/kernels.md.

"2-bit codes" is what codes of keys were before they were served: keys less the center of their
page's box, rotated by a Hadamard matrix, as two bits a channel and one step a page. "Weight" knows
what each page holds: no rule leaves out less.
"""

import argparse
import math

import torch
from torch import Tensor

from entmaxkv_kernels.reference.boxes import box_around
from entmaxkv_kernels.reference.candidates import Candidates
from entmaxkv_kernels.reference.entmax import entmax_threshold_sort
from entmaxkv_kernels.reference.quest import choose_pages, page_reaches, quest_bounds

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
    elif kind == "heavy-tailed":
        # Student's t with 3 degrees of freedom, each page with a scale of its own.
        key /= torch.randn(3, *key.shape).square().mean(0).sqrt()
        scale = torch.randn(tokens // PAGE_SIZE, KV_HEADS, 1).mul(0.5).exp()
        key *= scale.repeat_interleave(PAGE_SIZE, 0)
    elif kind == "normal, 4 channels 20 deviations off zero":
        key += torch.where(order < 4, 20 * torch.randn(KV_HEADS, HEAD_SIZE).sign(), 0.0)
    return key.bfloat16().float()


KINDS = (
    "normal",
    "in topics",
    "heavy-tailed",
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


DEVIATIONS = 3.4
"""Of a page's scores that the rule by means and deviations adds to their mean."""


def reaches(key: Tensor, query: Tensor) -> dict[str, Tensor]:
    """What each rule ranks the pages of one KV head by, [GROUP, pages]: key [pages, PAGE_SIZE,
    HEAD_SIZE], query [GROUP, HEAD_SIZE]."""
    statistics, scales = box_around(key, torch.ones(PAGE_SIZE, 1, dtype=torch.bool))
    mean, deviation = key.mean(1), key.std(1, correction=0)
    low, high = key.amin(1), key.amax(1)
    box = (statistics * scales[..., :2, None]).unbind(1)
    ours = candidates_of(query, *box)
    whole = candidates_of(query, mean, torch.maximum(high - mean, mean - low))
    quest = candidates_of(query, (low + high) / 2, (high - low) / 2)
    normal = candidates_of(query, mean, DEVIATIONS * deviation)
    return {
        "topk": page_reaches(ours),
        "not rounded": page_reaches(whole),
        "by bounds": quest_bounds(ours),
        "Quest": quest_bounds(quest),
        f"mean + {DEVIATIONS} deviations": page_reaches(normal),
        "2-bit codes": coded_reaches(key, box[0], query)[None, None],
    }


def rotated(x: Tensor) -> Tensor:
    """x [..., HEAD_SIZE] times the Hadamard matrix of Sylvester's construction, orthonormal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < HEAD_SIZE:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return x @ (matrix * HEAD_SIZE**-0.5)


STEP = 0.9957
"""Of four levels that are equally far apart, in standard deviations: best for normal numbers."""


def coded_reaches(key: Tensor, center: Tensor, query: Tensor) -> Tensor:
    """The largest score in each page by a center and two bits of every channel, [GROUP, pages]."""
    rest = rotated(key - center[:, None])
    step = STEP * rest.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-30)
    coded = ((rest / step).floor().clamp(-2, 1) + 0.5) * step
    scores = torch.einsum("gd,ptd->gpt", rotated(query), coded)
    return scores.amax(2) + query @ center.T


def candidates_of(query: Tensor, center: Tensor, half_width: Tensor) -> Candidates:
    pages = len(center)
    return Candidates(
        query=query[None, None],
        statistics=torch.stack((center, half_width))[:, None, None],
        ranked=torch.arange(pages)[None] < pages - 1,
        seq_lens=torch.tensor([pages * PAGE_SIZE]),
        page_size=PAGE_SIZE,
        scale=1.0,
        alpha=1.5,
        alibi_slopes=None,
        query_dtype=query.dtype,
    )


def best_pages(reach: Tensor, budget: int) -> Tensor:
    """[pages] bool: those that a group chooses by reaches [1, 1, GROUP, pages], and the last."""
    chosen = choose_pages(
        reach[..., :-1], torch.ones(1, reach.shape[-1] - 1, dtype=torch.bool), budget
    )
    return torch.cat((chosen[0, 0], torch.ones(1, dtype=torch.bool)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 16)
    parser.add_argument("--support", type=float, default=0.005, help="share of tokens with weight")
    parser.add_argument("--share", type=float, default=0.05, help="share of pages to choose")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    budget = int(arguments.share * arguments.tokens) // PAGE_SIZE
    for i_kind, kind in enumerate(KINDS):
        keys = make_keys(kind, arguments.tokens)
        same, left_out = [], []
        for h in range(KV_HEADS):
            key, query = keys[:, h], torch.randn(GROUP, HEAD_SIZE)
            z, length = scores_of(key, query, arguments.support)
            weight = (z - entmax_threshold_sort(z, 1.5)[:, None]).clamp_min(0).square()
            mass = (weight / weight.sum(1, keepdim=True)).unflatten(1, (-1, PAGE_SIZE)).sum(2)
            by_rule = reaches(key.unflatten(0, (-1, PAGE_SIZE)), query * length)
            chosen = [best_pages(reach, budget) for reach in by_rule.values()]
            held = mass.sum(0)
            held[-1] = torch.inf
            chosen.append(held >= held.topk(budget + 1).values[-1])
            same.append(((chosen[0] & chosen[1]).sum() - 1).item() / budget)
            left_out.append([(mass * ~read).sum(1).mean().item() for read in chosen])
        if i_kind == 0:
            print("| keys", "same pages", *by_rule, "weight", sep=" | ", end=" |\n")
            print("|---" * (3 + len(by_rule)) + "|")
        shares = f"{sum(same) / KV_HEADS:.1%} ({min(same):.1%})"
        means = [f"{x:.3f}" for x in torch.tensor(left_out).mean(0).tolist()]
        print(f"| {kind}", shares, *means, sep=" | ", end=" |\n", flush=True)


if __name__ == "__main__":
    main()
