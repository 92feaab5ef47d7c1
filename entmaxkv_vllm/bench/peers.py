"""Other attention kernels over the same workload: softmax, and every key and value read.

A step gives its output [query tokens, query_heads, head_size]; PyTorch's a list of them for each
request, [1, query_heads, its query tokens, head_size].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from entmaxkv_vllm.bench.options import PEERS
from entmaxkv_vllm.bench.timing import Step
from entmaxkv_vllm.bench.workload import Workload


class Unavailable(RuntimeError):
    """This peer cannot run here; the message says why."""


def flash_attention(work: Workload) -> dict[str, list[Step]]:
    """FlashAttention-3 as vLLM ships it, over a cache in its own order (tokens outside heads).

    Called plainly and, where all decode, with its schedule made beforehand, as vLLM does for all
    layers at once.
    """
    if work.shape.device != "cuda":
        raise Unavailable("needs a GPU")
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    shape = work.shape
    key, value = work.pool.paged

    def step(index: int, scheduler_metadata: torch.Tensor | None) -> Step:
        out = torch.empty_like(work.queries[index])
        return lambda: flash_attn_varlen_func(
            work.queries[index],
            key,
            value,
            max_seqlen_q=work.longest_query,
            cu_seqlens_q=work.starts,
            max_seqlen_k=work.longest,
            seqused_k=work.lengths,
            softmax_scale=shape.scale,
            causal=True,
            block_table=work.tables[index],
            out=out,
            fa_version=3,
            scheduler_metadata=scheduler_metadata,
        )

    arms = {"fa3_plain": [step(index, None) for index in range(work.sets)]}
    if work.kind == "decode":
        schedule = get_scheduler_metadata(
            batch_size=len(work.requests),
            max_seqlen_q=1,
            max_seqlen_k=work.longest,
            num_heads_q=shape.query_heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=work.lengths,
            qkv_dtype=key.dtype,
            cu_seqlens_q=work.starts,
            page_size=shape.page_size,
            causal=True,
        )
        arms["fa3_scheduled"] = [step(index, schedule) for index in range(work.sets)]
    return arms


def triton_attention(work: Workload) -> dict[str, list[Step]]:
    """vLLM's TRITON_ATTN, with the scratch that its metadata builder makes."""
    if work.shape.device != "cuda":
        raise Unavailable("needs a GPU")
    from vllm.v1.attention.backends.triton_attn import (
        MIN_LAUNCH_GRID_SIZE_2D,
        NUM_PAR_SOFTMAX_SEGMENTS,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    shape = work.shape
    key, value = work.pool.paged
    threshold = MIN_LAUNCH_GRID_SIZE_2D // shape.kv_heads
    segments = threshold, shape.query_heads, NUM_PAR_SOFTMAX_SEGMENTS
    padded = 1 << (shape.head_size - 1).bit_length()
    scratch = torch.empty(*segments, padded, dtype=torch.float32, device=shape.device)
    largest, sums = (
        torch.empty(segments, dtype=torch.float32, device=shape.device) for _ in range(2)
    )
    ones = torch.ones(1, dtype=torch.float32, device=shape.device)
    ones = ones.expand(len(work.requests), shape.kv_heads)

    def step(index: int) -> Step:
        out = torch.empty_like(work.queries[index])

        def call() -> torch.Tensor:
            unified_attention(
                q=work.queries[index],
                k=key,
                v=value,
                out=out,
                cu_seqlens_q=work.starts,
                max_seqlen_q=work.longest_query,
                seqused_k=work.lengths,
                max_seqlen_k=work.longest,
                softmax_scale=shape.scale,
                causal=True,
                window_size=(-1, -1),
                block_table=work.tables[index],
                softcap=0,
                q_descale=None,
                k_descale=ones,
                v_descale=ones,
                seq_threshold_3D=threshold,
                num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
                softmax_segm_output=scratch,
                softmax_segm_max=largest,
                softmax_segm_expsum=sums,
            )
            return out

        return call

    return {"triton_attn": [step(index) for index in range(work.sets)]}


def torch_attention(work: Workload) -> dict[str, list[Step]]:
    """PyTorch's scaled_dot_product_attention, request by request over contiguous copies of keys and
    values: it knows no pages."""
    from torch.nn.attention.bias import causal_lower_right

    attend = torch.nn.functional.scaled_dot_product_attention
    starts = work.starts.tolist()

    def call(index: int, request: int) -> Step:
        key, value = (x[None] for x in work.gathered(index, request))
        query = work.queries[index, starts[request] : starts[request + 1]].transpose(0, 1)[None]
        new, tokens = work.requests[request].query, work.requests[request].tokens
        visible: dict[str, Any] = {}
        if new == tokens:
            visible = {"is_causal": True}
        elif new > 1:
            visible = {"attn_mask": causal_lower_right(new, tokens)}
        options = visible | {"scale": work.shape.scale, "enable_gqa": True}
        return partial(attend, query, key, value, **options)

    def step(index: int) -> Step:
        calls = [call(index, request) for request in range(len(work.requests))]
        return lambda: [each() for each in calls]

    return {"sdpa": [step(index) for index in range(work.sets)]}


def flashinfer(work: Workload) -> dict[str, list[Step]]:
    """FlashInfer's paged decode, planned beforehand; decode only."""
    if work.shape.device != "cuda":
        raise Unavailable("needs a GPU")
    if work.kind != "decode":
        raise Unavailable("is timed in batches that decode only")
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError as error:
        raise Unavailable("is not installed") from error

    shape = work.shape
    counts = [-(-request.tokens // shape.page_size) for request in work.requests]
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    last = [
        request.tokens - (n - 1) * shape.page_size
        for request, n in zip(work.requests, counts, strict=True)
    ]
    scratch = torch.empty(1 << 28, dtype=torch.uint8, device=shape.device)

    def step(index: int) -> Step:
        # With four query heads a KV head or more, tensor cores are faster: vLLM's rule.
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            scratch, "NHD", use_tensor_cores=shape.query_heads // shape.kv_heads >= 4
        )
        tables = zip(work.tables[index], counts, strict=True)
        wrapper.plan(
            ends.to(shape.device),
            torch.cat([table[:count] for table, count in tables]),
            torch.tensor(last, dtype=torch.int32, device=shape.device),
            shape.query_heads,
            shape.kv_heads,
            shape.head_size,
            shape.page_size,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )
        out = torch.empty_like(work.queries[index])
        return lambda: wrapper.run(work.queries[index], work.pool.paged, out=out)

    return {"flashinfer": [step(index) for index in range(work.sets)]}


ARMS: dict[str, Callable[[Workload], dict[str, list[Step]]]] = dict(
    zip(PEERS, (flash_attention, triton_attention, torch_attention, flashinfer), strict=True)
)
"""Arms by the peer's name; FlashAttention-3 has two, of which the faster counts."""
