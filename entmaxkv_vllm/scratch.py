"""Scratch memory of the compiled kernels: one block for all layers of a worker.

It comes from vLLM's workspace manager and is asked for while vLLM profiles its memory, so that the
cache is planned beside it.
"""

from functools import cache

import torch
from vllm.v1.worker.workspace import current_workspace_manager

from entmaxkv_kernels import Selector

DECODE_ROWS = 128
"""Sequences that one decode call takes: more of them fill a GPU no better, and scratch grows."""

MOST_BYTES = 1 << 29
"""What the lists of candidates may grow to; with shorter ones keys are read again more often."""


@cache
def plan(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
    cache_dtype: torch.dtype,
    query_dtype: torch.dtype,
    max_tokens: int,
    max_sequences: int,
    selector: Selector,
    exact_below: int,
    certificate: bool,
    device: torch.device,
) -> int:
    """Bytes that decode and prefill of one layer need, whichever is more.

    max_tokens: columns of the block table times page_size.
    """
    from entmaxkv_kernels.triton import decode_workspace_size, prefill_workspace_size

    decode = decode_workspace_size(
        min(max_sequences, DECODE_ROWS),
        num_heads,
        num_kv_heads,
        head_size,
        page_size,
        cache_dtype,
        max_tokens,
        selector=selector,
        exact_below=exact_below,
        certificate=certificate,
        device=device,
        most=MOST_BYTES,
    )
    prefill_dtype = torch.float32 if query_dtype == torch.float32 else cache_dtype
    prefill = prefill_workspace_size(
        num_heads, num_kv_heads, head_size, prefill_dtype, max_tokens, device=device
    )
    return max(decode, prefill)


def take(size: int, device: torch.device) -> torch.Tensor:
    """[size] uint8 of the worker's scratch memory; its content is anyone's."""
    if device.type == "cpu":
        return torch.empty(size, dtype=torch.uint8)
    return current_workspace_manager().get_simultaneous(((size,), torch.uint8))[0]


@cache
def certificates(num_heads: int, device: torch.device) -> torch.Tensor:
    """[DECODE_ROWS, num_heads] that every layer writes its certificates to: the counters keep what
    there is to know of them."""
    return torch.empty(DECODE_ROWS, num_heads, dtype=torch.float32, device=device)
