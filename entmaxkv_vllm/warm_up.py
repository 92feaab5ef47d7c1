"""Compile the kernels in vLLM's own first step, so that no request waits for them.

Where vLLM takes none with attention before it serves (`enforce_eager`, or graphs of pieces of the
model alone), the first request is that step.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionLayer

from entmaxkv_kernels import NewTokens, PagedCache
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
    heads = (impl.num_heads, impl.num_kv_heads)
    table = (rows.block_table.shape[1], rows.block_table.stride(0))
    model = (impl.selector, impl.sliding_window, impl.alpha)
    # Kernels are compiled for how far pages lie apart, too, which need not follow from the layout.
    kind = (*heads, query.dtype, pages.layout, pages.key.stride(), *model, *table)
    if kind not in _compiled:
        with compile_ahead(impl.local_workers):
            _append_and_decode(impl, layer, query, pages, rows, options)
            _prefill(impl, query, pages, rows, options)
        # Triton loads a kernel where it is first launched, which must not be in a graph. Prefill
        # is in none.
        _append_and_decode(impl, layer, query, pages, rows, options)
        _compiled.add(kind)
    return True


def _empty_tables(rows: DecodeRows | PrefillRows, count: int) -> torch.Tensor:
    """Block tables [count, max_pages] of no pages, as far apart as those that are served: kernels
    are compiled for what divides the distance."""
    table = rows.block_table
    return table.new_zeros(count, table.stride(0))[:, : table.shape[1]]


def _append_and_decode(
    impl: "EntmaxKVImpl",
    layer: AttentionLayer,
    query: torch.Tensor,
    pages: PagedCache,
    rows: DecodeRows | PrefillRows,
    options: dict[str, Any],
) -> None:
    """Tokens that have no slot, and sequences of length 0, with such a token and without.

    The chip is divided for the next power of two of the sequences, which `most` need not be.
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
    table = _empty_tables(rows, most)
    lengths = rows.seq_lens.new_zeros(most)
    inputs = query.new_zeros(most, *query.shape[1:])
    outputs = torch.empty_like(inputs)
    for exponent in range((most - 1).bit_length() + 1):
        count = min(1 << exponent, most)
        exact = None if flags is None else flags[:count]
        empty = DecodeRows(count, table[:count], lengths[:count], exact)
        new = query.new_zeros(count, impl.num_kv_heads, impl.head_size)
        new_tokens = NewTokens(new, new, empty.seq_lens.new_full((count,), -1, dtype=torch.int64))
        for given in (new_tokens, None) if impl.decode_appends(pages, empty) else (None,):
            impl.decode_rows(impl.index_of(layer), inputs, pages, empty, outputs, options, given)


def _prefill(
    impl: "EntmaxKVImpl",
    query: torch.Tensor,
    pages: PagedCache,
    rows: DecodeRows | PrefillRows,
    options: dict[str, Any],
) -> None:
    """A prompt of two tokens."""
    inputs = query.new_zeros(2, *query.shape[1:])
    table = _empty_tables(rows, 1)
    ends = torch.tensor([0, 2], dtype=torch.int32, device=query.device)
    prompt = PrefillRows(2, table, rows.seq_lens.new_full((1,), 2), ends)
    impl.prefill_rows(inputs, pages, prompt, torch.empty_like(inputs), options)
