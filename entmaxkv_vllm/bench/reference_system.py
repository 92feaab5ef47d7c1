"""The decode kernels of the paper's own code, a checkout of github.com/deep-spin/entmaxkv.

It takes as many KV heads as query heads, one length, contiguous fp16 caches, and no CUDA graph,
since it synchronises with the host; its statistics are ready made and its new token is in the cache
already.
"""

import sys
from pathlib import Path

import torch

from entmaxkv_vllm.bench.peers import Unavailable
from entmaxkv_vllm.bench.timing import Step
from entmaxkv_vllm.bench.workload import ALPHA, Workload


def use_checkout(path: Path) -> None:
    """Import the reference system from there.

    Raises ValueError if it is not there.
    """
    if not (path / "entmaxkv").is_dir():
        raise ValueError(
            f"the reference system's package entmaxkv is not in {path}; "
            "give a checkout of github.com/deep-spin/entmaxkv"
        )
    sys.path.insert(0, str(path))


def reference_system(work: Workload, share: float) -> dict[str, list[Step]]:
    """Its dense entmax, top-k and Gaussian steps over the workload's first set.

    share: of the tokens, top-k's budget.

    Raises Unavailable for a workload that it does not take.
    """
    shape = work.shape
    if shape.device != "cuda":
        raise Unavailable("needs a GPU")
    if work.kind != "decode" or len(work.requests) > 1:
        raise Unavailable("decodes one sequence; give a batch such as 1q1s8k")
    if shape.query_heads != shape.kv_heads or shape.dtype != torch.float16:
        raise Unavailable(
            "takes as many KV heads as query heads, in float16; give --query-heads and --kv-heads "
            "the same number and --dtype float16"
        )
    key, value = work.gathered(0, 0)
    steps = decode_steps(key, value, work.queries[0, 0], shape.page_size, share)
    return {f"reference_{name}": [step] for name, step in steps.items()}


def decode_steps(
    key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, page_size: int, share: float
) -> dict[str, Step]:
    """Its `dense`, `topk` and `gaussian` steps.

    key, value: [heads, N, head_size]; query: [heads, head_size]; all fp16.
    """
    from entmaxkv import (
        PagedKVCache,
        sparse_attention_decode_gaussian_aware_entmax,
        sparse_attention_decode_paged,
    )
    from entmaxkv.kernels.adadecode import sparse_attention_decode_orchestrator

    heads, context, head_size = key.shape
    cache = PagedKVCache(page_size=page_size)
    cache.k_cache, cache.v_cache = key[None], value[None]
    paged = key.view(heads, -1, page_size, head_size)[None].float()
    cache.k_min, cache.k_max = (x.half() for x in (paged.amin(3), paged.amax(3)))
    cache.k_mean, cache.k_std = paged.mean(3).half(), paged.std(3, unbiased=False).half()
    q, new = query[None, :, None], key[None, :, -1:]
    lengths = torch.tensor([context], dtype=torch.int32, device="cuda")
    positions = torch.arange(context, dtype=torch.int32, device="cuda")
    positions = positions.expand(1, heads, -1).contiguous()
    budget = max(page_size, int(share * context) // page_size * page_size)
    read = torch.tensor([budget + page_size], dtype=torch.int32, device="cuda")
    common = {"q": q, "alpha": ALPHA, "out": torch.zeros_like(q), "q_seqlens": lengths}
    cached = common | {"kv_cache": cache, "k_new": new, "v_new": new, "append_cache": False}
    return {
        "dense": lambda: sparse_attention_decode_orchestrator(
            **common,
            k_cache=cache.k_cache,
            v_cache=cache.v_cache,
            cache_seqlens=lengths[:, None].expand(1, heads),
            token_positions=positions,
            niter=2,
        ),
        "topk": lambda: sparse_attention_decode_paged(
            **cached, token_budget=budget, cache_seqlens=read, niter=2
        ),
        "gaussian": lambda: sparse_attention_decode_gaussian_aware_entmax(**cached),
    }
