"""Checks of what the public functions are given. Each raises one error before any work is done,
naming the argument, what it was, and what was expected."""

import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .pages import FP8, NewTokens, PagedCache
from .report import Counter
from .selectors import Selector, needs_entmax

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FP8_INPUTS = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


def _require(condition: bool, name: str, was: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {was}; expected {expected}")


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes))


def _tensor(
    name: str,
    tensor: Any,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Strings in `shape` name dimensions of any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {_either(dtypes)}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == actual
        for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [{expected}]")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, where the cache is")


def check_cache(cache: PagedCache) -> None:
    if not isinstance(cache, PagedCache):
        raise TypeError(f"cache is a {type(cache).__name__}; expected a PagedCache")
    if cache.key.dtype not in (*_FLOATS, FP8):
        raise TypeError(f"cache has dtype {cache.key.dtype}; expected {_either((*_FLOATS, FP8))}")


def _inputs(cache: PagedCache) -> tuple[torch.dtype, ...]:
    """The dtypes of keys, values and queries that go with a cache."""
    return _FP8_INPUTS if cache.key.dtype == FP8 else (cache.key.dtype,)


def check_scales(cache: PagedCache, key_scale: float, value_scale: float) -> None:
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        # The number in a tensor on a GPU could not be read without waiting for the GPU.
        if not isinstance(scale, int | float):
            raise TypeError(f"{name} is a {type(scale).__name__}; expected a float")
        _require(scale > 0 and math.isfinite(scale), name, scale, "a finite number above 0")
        _require(
            scale == 1 or cache.key.dtype == FP8,
            name,
            scale,
            f"1 with a cache of dtype {cache.key.dtype}: only {FP8} is scaled",
        )


def check_append(
    cache: PagedCache, key: Tensor, value: Tensor, slot_mapping: Tensor, counters: Tensor | None
) -> None:
    check_cache(cache)
    device, dtypes = cache.key.device, _inputs(cache)
    _tensor("slot_mapping", slot_mapping, ("tokens",), (torch.int64,), device)
    shape = (len(slot_mapping), cache.key.shape[1], cache.layout.head_size)
    _tensor("key", key, shape, dtypes, device)
    _tensor("value", value, shape, dtypes, device)
    if counters is not None:
        _tensor("counters", counters, (len(Counter),), (torch.int64,), device)


def check_new_tokens(cache: PagedCache, new_tokens: NewTokens, seq_lens: Tensor) -> None:
    check_append(cache, *new_tokens, None)
    batch, tokens = len(seq_lens), len(new_tokens.slot_mapping)
    _require(tokens == batch, "new_tokens", f"{tokens} tokens", f"one for each of {batch} rows")


def check_attention(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    out: Tensor | None,
) -> None:
    """What prefill and decode have in common."""
    check_cache(cache)
    device, kv_heads = cache.key.device, cache.key.shape[1]
    shape = ("tokens", "query_heads", cache.layout.head_size)
    _tensor("query", query, shape, _inputs(cache), device)
    query_heads = query.shape[1]
    _require(
        query_heads > 0 and query_heads % kv_heads == 0,
        "the number of query heads",
        query_heads,
        f"a multiple of the cache's {kv_heads} KV heads",
    )
    _tensor("seq_lens", seq_lens, ("B",), _INTEGERS, device)
    _tensor("block_table", block_table, (len(seq_lens), "max_pages"), _INTEGERS, device)
    _require(scale > 0 and math.isfinite(scale), "scale", scale, "a finite number above 0")
    if alibi_slopes is not None:
        _tensor("alibi_slopes", alibi_slopes, (query_heads,), (torch.float32,), device)
    if sliding_window is not None:
        _require(sliding_window >= 1, "sliding_window", sliding_window, "None or at least 1 token")
    if out is not None:
        _tensor("out", out, tuple(query.shape), (query.dtype,), device)
    if device.type == "cpu" and len(seq_lens):
        longest = int(seq_lens.max())
        capacity = block_table.shape[1] * cache.layout.page_size
        _require(
            longest <= capacity,
            "block_table",
            f"{block_table.shape[1]} pages wide",
            f"at least {-(-longest // cache.layout.page_size)} pages of "
            f"{cache.layout.page_size} tokens for a sequence of {longest}",
        )
        _require(int(seq_lens.min()) >= 0, "seq_lens", seq_lens.tolist(), "no negative length")


def check_query_start_loc(query_start_loc: Tensor, query: Tensor, seq_lens: Tensor) -> None:
    shape = (len(seq_lens) + 1,)
    _tensor("query_start_loc", query_start_loc, shape, _INTEGERS, query.device)
    if query.device.type == "cpu":
        starts = query_start_loc.tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        _require(
            starts[0] >= 0 and min(lengths, default=0) >= 0 and starts[-1] <= len(query),
            "query_start_loc",
            starts,
            f"offsets that do not decrease, between 0 and the {len(query)} query tokens",
        )
        _require(
            all(n <= m for n, m in zip(lengths, seq_lens.tolist(), strict=True)),
            "seq_lens",
            seq_lens.tolist(),
            f"at least the query lengths {lengths}, which they include",
        )


def check_decode(
    query: Tensor,
    cache: PagedCache,
    seq_lens: Tensor,
    alphas: tuple[float, ...],
    selector: Selector,
    exact_rows: Tensor | None,
    counters: Tensor | None,
    certificate: Tensor | None = None,
) -> None:
    batch, device = len(seq_lens), query.device
    _require(len(query) == batch, "query", f"{len(query)} tokens", f"one for each of {batch} rows")
    if not isinstance(selector, Selector):
        expected = "an Exact, Gaussian, TopK or Adaptive"
        raise TypeError(f"selector is {selector!r}; expected {expected}")
    _require(
        selector.statistics in ((), cache.layout.statistics),
        "cache.layout.statistics",
        cache.layout.statistics,
        f"{selector.statistics}, which the {selector.name} selector reads",
    )
    if needs_entmax(selector):
        _require(
            1.0 not in alphas,
            "alpha",
            "1 (softmax) for some head",
            f"above 1 with the {selector.name} selector: softmax has no threshold to reach",
        )
    if exact_rows is not None:
        _tensor("exact_rows", exact_rows, (batch,), (torch.bool,), device)
    if counters is not None:
        _tensor("counters", counters, (len(Counter),), (torch.int64,), device)
    if certificate is not None:
        shape = (batch, query.shape[1])
        _tensor("certificate", certificate, shape, (torch.float32,), device)


def check_compiled(cache: PagedCache) -> None:
    """What the compiled kernels ask of a cache beyond what the reference does."""
    if cache.key.dtype == torch.float64:
        raise TypeError(
            "cache has dtype torch.float64; expected fp8, fp16, bf16 or fp32 for implementation "
            "'triton'"
        )
    if cache.key.dtype == FP8 and cache.key.is_cuda:
        capability = torch.cuda.get_device_capability(cache.key.device)
        _require(
            capability >= (8, 9),
            "cache",
            f"of dtype {FP8} on a GPU of compute capability {capability[0]}.{capability[1]}",
            "at least 8.9 for implementation 'triton'",
        )
    _require(
        cache.key.stride() == cache.value.stride()
        and cache.key.stride()[2:] == (cache.layout.head_size, 1),
        "cache",
        f"strided {cache.key.stride()} for keys and {cache.value.stride()} for values",
        "the views that split_pages gives for implementation 'triton'",
    )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    _require(
        cache.key.device.type != "cpu" or interpreted,
        "cache",
        "on the CPU",
        "on a GPU for implementation 'triton'",
    )


def check_workspace(workspace: Tensor, query: Tensor) -> None:
    _tensor("workspace", workspace, ("bytes",), (torch.uint8,), query.device)
    _require(workspace.is_contiguous(), "workspace", "strided", "contiguous memory")


def check_strides(**tensors: Tensor | None) -> None:
    """The compiled kernels take elements of the last dimension for neighbours in memory."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1:
            _require(
                tensor.stride(-1) == 1,
                name,
                f"strided by {tensor.stride(-1)} elements in its last dimension",
                "1 for implementation 'triton': make it contiguous",
            )


def check_alpha(alpha: float | Sequence[float] | Tensor, query_heads: int) -> tuple[float, ...]:
    """alpha as one number if all heads agree, else as one per query head."""
    if isinstance(alpha, int | float):
        values = [float(alpha)]
    elif isinstance(alpha, Tensor | Sequence) and not isinstance(alpha, str):
        values = torch.as_tensor(alpha, dtype=torch.float64).flatten().tolist()
        _require(len(values) == query_heads, "alpha", values, f"one number or {query_heads}")
    else:
        raise TypeError(f"alpha is {alpha!r}; expected one number or {query_heads}")
    _require(all(1 <= a <= 2 for a in values), "alpha", values, "within [1, 2]")
    return tuple(values[:1] if len(set(values)) == 1 else values)


@cache
def head_alpha(alphas: tuple[float, ...], device: torch.device) -> float | Tensor:
    """One number, or an fp64 tensor [query_heads], which is made once: a CUDA graph keeps it."""
    if len(alphas) == 1:
        return alphas[0]
    return torch.tensor(alphas, dtype=torch.float64, device=device)
