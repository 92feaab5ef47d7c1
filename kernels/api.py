"""The public kernels: validate, then hand over to an implementation.

`implementation` is `"reference"` (plain PyTorch, anywhere) or `"triton"` (compiled, fp8, fp16, bf16
and fp32; on a CPU only in Triton's interpreter). The reference is the default.

A torch.float8_e4m3fn cache holds keys and values divided by `key_scale` and `value_scale`, which
have to be the same numbers in every call on it, and takes and gives fp16, bf16 or fp32. No other
cache is scaled.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import reference
from .pages import NewTokens, PagedCache
from .report import DecodeReport
from .selectors import Selector
from .validation import (
    check_alpha,
    check_append,
    check_attention,
    check_compiled,
    check_decode,
    check_new_tokens,
    check_query_start_loc,
    check_scales,
    check_strides,
    check_workspace,
    head_alpha,
)

IMPLEMENTATIONS = ("reference", "triton")


def _load(implementation: str, cache: PagedCache, **tensors: Tensor | None) -> Any:
    """The module that computes for this cache, and takes the other tensors as they are strided."""
    if implementation not in IMPLEMENTATIONS:
        expected = " or ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r}; expected {expected}")
    if implementation == "reference":
        return reference
    check_compiled(cache)
    check_strides(**tensors)
    # Triton is not needed, and not imported, by those who do not use it.
    return import_module(".triton", __package__)


def _scratch(implementation: str, workspace: Tensor | None, query: Tensor) -> dict[str, Tensor]:
    """The workspace as an argument of an implementation that takes one."""
    if workspace is None:
        return {}
    if implementation == "reference":
        raise ValueError("workspace is given; expected None, the reference needs no scratch memory")
    check_workspace(workspace, query)
    return {"workspace": workspace}


def append(
    cache: PagedCache,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    counters: Tensor | None = None,
    implementation: str = "reference",
) -> None:
    """Write new tokens into their slots and refresh the statistics of the pages they touch.

    The statistics of a touched page are recomputed from the page's own rows, from 0 to the last
    one written by this call, and never accumulated: pages are reused without being cleared, and
    a sequence fills its pages in order, so rows after the last one written are not its own.

    cache: pages of one layer, fp8 (torch.float8_e4m3fn), fp16, bf16, fp32 or fp64. Written in
        place.
    key, value: [tokens, kv_heads, head_size], dtype of the cache; fp16, bf16 or fp32 if that is
        fp8.
    slot_mapping: [tokens] int64, page * page_size + offset; a negative slot skips its token.
    key_scale, value_scale: what a number in an fp8 cache is multiplied by to give the key or the
        value, finite and above 0; 1 for any other cache. A quotient out of range is stored as the
        nearest number in range, +-448. The statistics are those of the stored numbers, not
        multiplied.
    counters: [len(Counter)] int64, added to in place: how many pages this call wrote to.

    Raises TypeError or ValueError for arguments of the wrong type, dtype, shape or device, and for
    a scale out of range or of a cache that is not fp8.
    """
    check_append(cache, key, value, slot_mapping, counters)
    check_scales(cache, key_scale, value_scale)
    compute = _load(implementation, cache, slot_mapping=slot_mapping)
    compute.append(
        cache,
        key,
        value,
        slot_mapping,
        key_scale=float(key_scale),
        value_scale=float(value_scale),
        counters=counters,
    )


def prefill(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    alpha: float | Sequence[float] | Tensor,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Dense causal attention of chunks of new tokens over everything before them.

    The keys and values of the chunks have already been appended. Query i of sequence b stands at
    position seq_len - query_len + i and sees the keys at positions up to its own. Its weights are
    the alpha-entmax of scale * q.k + slope * (key position - query position).

    query: [tokens, query_heads, head_size], packed by query_start_loc, dtype of the cache; fp16,
        bf16 or fp32 if that is fp8. query_heads is a multiple of kv_heads, and query heads of one
        KV head are neighbours.
    block_table: [B, max_pages] int32 or int64, physical page of each page of a sequence; entries
        past its last page are never read.
    seq_lens: [B] int32 or int64, tokens of each sequence with its chunk.
    query_start_loc: [B + 1] int32 or int64, where each chunk starts in query, and the end.
    scale: factor of q.k, usually head_size ** -0.5.
    alpha: within [1, 2], one number or one per query head; 1 is softmax, 2 sparsemax. The host
        reads it, so a tensor on a GPU is waited for.
    alibi_slopes: [query_heads] fp32.
    sliding_window: tokens a query sees, the last ones up to and with its own.
    key_scale, value_scale: those that the cache was appended to with.
    out: [tokens, query_heads, head_size] to write to, dtype of the query; tokens outside every
        chunk are left alone.
    workspace: [bytes] uint8, scratch memory of the compiled kernels, as much as
        `prefill_workspace_size` says; without it they allocate.

    Returns out, or a new tensor with zeros in tokens outside every chunk. Computed in fp32, or in
    fp64 for an fp64 cache. Raises TypeError or ValueError as `append` does, and for an alpha out
    of range or a block table too narrow for the lengths.
    """
    check_attention(query, cache, block_table, seq_lens, scale, alibi_slopes, sliding_window, out)
    check_query_start_loc(query_start_loc, query, seq_lens)
    check_scales(cache, key_scale, value_scale)
    alphas = check_alpha(alpha, query.shape[1])
    compute = _load(
        implementation,
        cache,
        query=query,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        alibi_slopes=alibi_slopes,
        out=out,
    )
    return compute.prefill(
        query,
        cache,
        block_table,
        seq_lens,
        query_start_loc,
        scale=scale * key_scale,
        alpha=head_alpha(alphas, query.device),
        alibi_slopes=alibi_slopes,
        sliding_window=sliding_window,
        out=torch.zeros_like(query) if out is None else out,
        value_scale=float(value_scale),
        **_scratch(implementation, workspace, query),
    )


def decode(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    alpha: float | Sequence[float] | Tensor,
    selector: Selector,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    exact_rows: Tensor | None = None,
    exact_below: int = 0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    counters: Tensor | None = None,
    out: Tensor | None = None,
    new_tokens: NewTokens | None = None,
    certificate: Tensor | None = None,
    workspace: Tensor | None = None,
    implementation: str = "reference",
) -> Tensor:
    """Attention of one new token per sequence over the pages that a selector chooses.

    The token's key and value are in the cache or in `new_tokens`; it stands at position
    seq_len - 1. The last page is always read. The weights are the exact entmax of what is read and
    sum to one. All query heads of a KV head read the same pages.

    query: [B, query_heads, head_size], dtype as in `prefill`.
    block_table, seq_lens, scale, alpha, alibi_slopes, key_scale, value_scale: as in `prefill`; a
        sequence of length 0 is padding and gives zeros. The gaussian and adaptive selectors need
        every alpha above 1.
    selector: Exact(), Gaussian(...), TopK(...) or Adaptive(...); the cache has to hold the
        statistics it reads.
    sliding_window: as in `prefill`; every page inside the window is read, whatever the selector.
    exact_rows: [B] bool, sequences to decode exactly.
    exact_below: sequences of at most this many tokens are decoded exactly.
    counters: [len(Counter)] int64, added to in place; see `Counter`.
    out: [B, query_heads, head_size] to write to, dtype of the query.
    new_tokens: keys and values to `append` first, in the same launches where that can be. Other
        rows of a sequence are complete; only where it is decoded exactly may another sequence of
        the batch fill the page before its last one.
    certificate: [B, query_heads] fp32 to write to how much exact attention weighs unread tokens at
        most, in [0, 1]: 0 proves that the output is the exact one, 1 says nothing. The gaussian
        selector bounds nothing: it gives 1 unless every page was read. 0 for padding.
    workspace: [bytes] uint8, scratch memory of the compiled kernels, as much as
        `decode_workspace_size` says; without it they allocate.

    Returns out, or a new tensor. Computed in fp32, or in fp64 for an fp64 cache. Raises TypeError
    or ValueError as `prefill` does, and for a selector that the cache has no statistics for.
    """
    check_attention(query, cache, block_table, seq_lens, scale, alibi_slopes, sliding_window, out)
    alphas = check_alpha(alpha, query.shape[1])
    check_decode(query, cache, seq_lens, alphas, selector, exact_rows, counters, certificate)
    if new_tokens is not None:
        check_new_tokens(cache, new_tokens, seq_lens)
    check_scales(cache, key_scale, value_scale)
    compute = _load(
        implementation,
        cache,
        query=query,
        block_table=block_table,
        seq_lens=seq_lens,
        alibi_slopes=alibi_slopes,
        exact_rows=exact_rows,
        counters=counters,
        out=out,
        certificate=certificate,
        slot_mapping=None if new_tokens is None else new_tokens.slot_mapping,
    )
    return compute.decode(
        query,
        cache,
        block_table,
        seq_lens,
        scale=scale * key_scale,
        alpha=head_alpha(alphas, query.device),
        selector=selector,
        alibi_slopes=alibi_slopes,
        sliding_window=sliding_window,
        exact_rows=exact_rows,
        exact_below=exact_below,
        counters=counters,
        out=torch.empty_like(query) if out is None else out,
        key_scale=float(key_scale),
        value_scale=float(value_scale),
        new_tokens=new_tokens,
        certificate=certificate,
        **_scratch(implementation, workspace, query),
    )


def analyze_decode(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    alpha: float | Sequence[float] | Tensor,
    selector: Selector,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    exact_rows: Tensor | None = None,
    exact_below: int = 0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> DecodeReport:
    """How far `decode` with the same arguments is from exact, per sequence and query head.

    Computes both, so it costs more than exact decoding; see `DecodeReport`.
    """
    check_attention(query, cache, block_table, seq_lens, scale, alibi_slopes, sliding_window, None)
    alphas = check_alpha(alpha, query.shape[1])
    check_decode(query, cache, seq_lens, alphas, selector, exact_rows, None)
    check_scales(cache, key_scale, value_scale)  # no number of the report depends on value_scale
    return reference.analyze_decode(
        query,
        cache,
        block_table,
        seq_lens,
        scale=scale * key_scale,
        alpha=head_alpha(alphas, query.device),
        selector=selector,
        alibi_slopes=alibi_slopes,
        sliding_window=sliding_window,
        exact_rows=exact_rows,
        exact_below=exact_below,
    )
