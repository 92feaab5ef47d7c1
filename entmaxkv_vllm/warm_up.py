"""Compile the kernels before the first request, so that none waits for them."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionLayer

from entmaxkv_kernels import PagedCache
from entmaxkv_vllm import scratch
from entmaxkv_vllm.metadata import DecodeRows, EntmaxKVMetadata, PrefillRows

if TYPE_CHECKING:
    from entmaxkv_vllm.impl import EntmaxKVImpl

_compiled: set[tuple[Any, ...]] = set()
"""Kinds of layers whose kernels this process has compiled."""


def compile_kernels(
    impl: "EntmaxKVImpl",
    layer: AttentionLayer,
    query: torch.Tensor,
    pages: PagedCache,
    metadata: EntmaxKVMetadata,
    options: dict[str, Any],
) -> bool:
    """Compile what a layer launches for batches of any size, several kernels at a time.

    Returns whether that is done: vLLM takes its own first steps outside any CUDA graph, and while
    one is captured nothing can be compiled.
    """
    from entmaxkv_kernels.triton.launch import compile_ahead

    rows = metadata.decode or metadata.prefill
    if rows is None or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    heads, width = (impl.num_heads, impl.num_kv_heads), rows.block_table.shape[1]
    model = (impl.selector, impl.sliding_window, impl.alpha)
    kind = (*heads, query.dtype, pages.layout, *model, width)
    if kind not in _compiled:
        _compiled.add(kind)
        with compile_ahead():
            _append_and_decode(impl, layer, query, pages, rows, options)
            _prefill(impl, query, pages, rows, options)
        # Triton loads a kernel where it is first launched.
        _append_and_decode(impl, layer, query, pages, rows, options)
    return True


def _append_and_decode(
    impl: "EntmaxKVImpl",
    layer: AttentionLayer,
    query: torch.Tensor,
    pages: PagedCache,
    rows: DecodeRows | PrefillRows,
    options: dict[str, Any],
) -> None:
    """Tokens that have no slot, and sequences of length 0.

    The chip is divided for powers of two of sequences.
    """
    from entmaxkv_kernels.triton.append import LONG_PROMPT

    for tokens in (1, LONG_PROMPT + 1):
        if tokens <= impl.max_batched_tokens:
            new = query.new_zeros(tokens, impl.num_kv_heads, impl.head_size)
            slots = rows.seq_lens.new_full((tokens,), -1, dtype=torch.int64)
            impl.append_tokens(layer, new, new, pages, slots)
    most = min(impl.max_sequences, scratch.DECODE_ROWS)
    # The metadata of every selector but `exact` have flags.
    flags = None if impl.config.selector == "exact" else rows.seq_lens.new_zeros(most).bool()
    table = rows.block_table.new_zeros(most, rows.block_table.shape[1])
    lengths = rows.seq_lens.new_zeros(most)
    inputs = query.new_zeros(most, *query.shape[1:])
    outputs = torch.empty_like(inputs)
    count = 1
    while count <= most:
        exact = None if flags is None else flags[:count]
        empty = DecodeRows(count, table[:count], lengths[:count], exact)
        impl.decode_rows(impl.index_of(layer), inputs, pages, empty, outputs, options)
        count *= 2


def _prefill(
    impl: "EntmaxKVImpl",
    query: torch.Tensor,
    pages: PagedCache,
    rows: DecodeRows | PrefillRows,
    options: dict[str, Any],
) -> None:
    """A prompt of two tokens."""
    inputs = query.new_zeros(2, *query.shape[1:])
    table = rows.block_table.new_zeros(1, rows.block_table.shape[1])
    ends = torch.tensor([0, 2], dtype=torch.int32, device=query.device)
    prompt = PrefillRows(2, table, rows.seq_lens.new_full((1,), 2), ends)
    impl.prefill_rows(inputs, pages, prompt, torch.empty_like(inputs), options)
