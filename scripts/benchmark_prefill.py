"""Time prefill beside FlashAttention-3 and AdaSplash-2 on one GPU, and write its JSON.

One sequence, causal, bf16, 32 query heads over 8 KV heads of 128, alpha 1.5, pages of 16 in a
shuffled block table. Keys are topics that last some 256 tokens, and queries ask for the topic of
their own position as well as for their own key, at a scale that is searched for so that the
wanted share of 64 x 64 blocks of the causal half holds no weight, measured exactly on a sample of
query blocks and heads.

Arms take turns, each with so many calls in a row that the GPU does not wait for the host, as in a
model, whose layers follow each other.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from entmaxkv_kernels import PageLayout, allocate_pages, append, prefill, split_pages
from entmaxkv_kernels.reference.entmax import entmax_threshold_sort
from entmaxkv_kernels.triton import prefill_workspace_size
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.timing import Step, per_step

QUERY_HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE, ALPHA = 32, 8, 128, 16, 1.5
GROUP, BLOCK = QUERY_HEADS // KV_HEADS, 64
CALL_TOKENS = 1 << 16
"""Tokens of the calls of a turn, at least."""
SCALE = HEAD_SIZE**-0.5


def make_inputs(context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query [n, 32, 128], unscaled, key and value [n, 8, 128]."""
    segment = (torch.rand(context, device="cuda") < 1 / 256).cumsum(0)
    topics = torch.randn(64, KV_HEADS, HEAD_SIZE, device="cuda")
    topic_of = torch.randint(64, (int(segment[-1]) + 1,), device="cuda")
    key = topics[topic_of[segment]] + torch.randn(context, KV_HEADS, HEAD_SIZE, device="cuda")
    query = key.repeat_interleave(GROUP, 1) + torch.randn(
        context, QUERY_HEADS, HEAD_SIZE, device="cuda"
    )
    value = torch.randn_like(key)
    return query, key.bfloat16(), value.bfloat16()


def exact_rows(
    query: torch.Tensor, key: torch.Tensor, head: int, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [BLOCK, n] in fp64 of a block of queries of one head, and which are visible."""
    position = torch.arange(start, start + BLOCK, device="cuda")
    z = query[position, head].double() @ key[:, head // GROUP].double().T * (0.5 * SCALE)
    visible = torch.arange(len(key), device="cuda") <= position[:, None]
    z = z.masked_fill(~visible, -torch.inf)
    weights = (z - entmax_threshold_sort(z, ALPHA)[:, None]).clamp_min(0).square()
    return weights / weights.sum(-1, keepdim=True), visible


def sparsity(query: torch.Tensor, key: torch.Tensor) -> tuple[float, float]:
    """Shares of causal blocks without weight, and of visible tokens with weight, on a sample."""
    empty = blocks = kept = tokens = 0
    count = len(key) // BLOCK
    # Later rows have more blocks: a sample that is even in blocks takes the square root.
    for i, head in enumerate((0, 5, 10, 15, 19, 23, 27, 31)):
        for j in range(2):
            block = int(count * math.sqrt((2 * i + j + 0.5) / 16))
            weights, visible = exact_rows(query, key, head, block * BLOCK)
            held = (weights > 0).view(BLOCK, -1, BLOCK).any(2).any(0)[: block + 1]
            empty += int((~held).sum())
            blocks += len(held)
            kept += int((weights > 0).sum())
            tokens += int(visible.sum())
    return empty / blocks, kept / tokens


def scaled_queries(query: torch.Tensor, key: torch.Tensor, wanted: float) -> torch.Tensor:
    """Queries at the scale that gives the wanted block sparsity, found by bisection."""
    low, high = 1e-2, 1e2
    for _ in range(12):
        middle = math.sqrt(low * high)
        found, _ = sparsity((query * middle).bfloat16(), key)
        low, high = (middle, high) if found < wanted else (low, middle)
    return (query * high).bfloat16()


def measure(context: int, wanted: float, adasplash: bool, repeats: int) -> dict[str, Any]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query, key, value = make_inputs(context)
    query = scaled_queries(query, key, wanted)
    measured, support = sparsity(query, key)
    layout = PageLayout(PAGE_SIZE, HEAD_SIZE)
    pages_each = context // PAGE_SIZE
    raw = allocate_pages(pages_each, KV_HEADS, layout, torch.bfloat16, "cuda")
    pages = split_pages(raw, layout)
    table = torch.randperm(pages_each, dtype=torch.int32, device="cuda")[None]
    slots = table[0].long().repeat_interleave(PAGE_SIZE) * PAGE_SIZE
    slots += torch.arange(context, device="cuda") % PAGE_SIZE
    append(pages, key, value, slots, implementation="triton")
    lengths = torch.tensor([context], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, context], dtype=torch.int32, device="cuda")
    size = prefill_workspace_size(QUERY_HEADS, KV_HEADS, HEAD_SIZE, torch.bfloat16, context)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    out, flash_out = torch.empty_like(query), torch.empty_like(query)
    flash_key, flash_value = (x.transpose(1, 2).contiguous() for x in (pages.key, pages.value))

    def ours() -> None:
        prefill(
            query,
            pages,
            table,
            lengths,
            starts,
            scale=SCALE,
            alpha=ALPHA,
            out=out,
            workspace=workspace,
            implementation="triton",
        )

    def flash() -> None:
        flash_attn_varlen_func(
            query,
            flash_key,
            flash_value,
            max_seqlen_q=context,
            cu_seqlens_q=starts,
            max_seqlen_k=context,
            seqused_k=lengths,
            softmax_scale=SCALE,
            causal=True,
            block_table=table,
            out=flash_out,
            fa_version=3,
        )

    arms: dict[str, Step] = {"entmax": ours, "fa3": flash}
    if adasplash:
        from adasplash import adasplash as adasplash_attention

        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (query, key, value))
        arms["adasplash"] = lambda: adasplash_attention(q, k, v, alpha=ALPHA, is_causal=True)
    calls = max(1, CALL_TOKENS // context)

    times = per_step(
        {name: [step] for name, step in arms.items()},
        repeats,
        graphs=False,
        calls=calls,
        warm_up=2,
    )
    us = {name: statistics.median(values) for name, values in times.items()}
    worst = 0.0
    for head, block in ((0, 0), (13, context // BLOCK // 2), (31, context // BLOCK - 1)):
        weights, _ = exact_rows(query, key, head, block * BLOCK)
        exact = weights @ value[:, head // GROUP].double()
        error = out[block * BLOCK : (block + 1) * BLOCK, head].double() - exact
        worst = max(worst, (error.norm() / exact.norm()).item())
    row: dict[str, Any] = {
        "kernel": "prefill",
        "context": context,
        "block_sparsity": measured,
        "support": support,
        "us": us["entmax"],
        "us_spread": max(times["entmax"]) - min(times["entmax"]),
        "fa3_us": us["fa3"],
        "fa3_us_spread": max(times["fa3"]) - min(times["fa3"]),
        "time_over_fa3": us["entmax"] / us["fa3"],
        "error": worst,
    }
    if adasplash:
        row["adasplash_us"] = us["adasplash"]
        row["ratio_adasplash"] = us["adasplash"] / us["entmax"]
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**n for n in range(13, 18)])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.85])
    parser.add_argument("--adasplash", type=int, nargs="*", default=[], help="its contexts")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        measure(context, wanted, context in arguments.adasplash, arguments.repeats)
        for context in arguments.contexts
        for wanted in arguments.sparsities
    ]
    result = about(arguments.commit) | {"rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
