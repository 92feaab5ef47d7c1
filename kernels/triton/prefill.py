"""Prefill: the launches, how they are divided over the chip, and their scratch memory."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..pages import PagedCache
from ..reference.entmax import exponent, score_factor
from .prefill_kernels import prefill_entmax_kernel
from .prefill_softmax import prefill_softmax_kernel
from .workspace import processors

EXCESS_MASS = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Mass above one from which a Newton step is exact to the precision of the weights."""

_ALIGNMENT = 256
_LISTED = 1024
"""Key tiles that a program lists or filters at a time."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program's tiles.

    rows: queries times query heads of one KV head. keys: of a key tile. resident: programs that a
    multiprocessor runs at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    value_stages: int
    resident: int


def tiles_for(dtype: torch.dtype, padded_head_size: int) -> Tiles:
    """Tiles for queries of a dtype, whose accumulators stay in registers."""
    if dtype == torch.float32:
        rows = 32 if padded_head_size < 256 else 16
        return Tiles(rows, 32, warps=4, stages=2, value_stages=1, resident=2)
    if padded_head_size == 256:
        return Tiles(64, 64, warps=8, stages=2, value_stages=1, resident=1)
    return Tiles(128, 64, warps=8, stages=3, value_stages=2, resident=2)


def prefill_workspace_size(
    query_heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    max_tokens: int,
    *,
    device: torch.device | str = "cuda",
) -> int:
    """Bytes of a workspace with which every prefill of sequences up to max_tokens is fast.

    A program needs five bytes for each key tile of the longest sequence, and there are a few
    programs per multiprocessor, whatever the number of queries: 21 MB on an H200 for 2**20 tokens
    and bf16 heads of 128. As little as one program's share gives the same results.

    dtype: of the cache; torch.float32 for fp32 queries of an fp8 cache, which take twice as much.
    max_tokens: columns of the block table times page_size.
    """
    tiles = tiles_for(dtype, triton.next_power_of_2(head_size))
    programs = tiles.resident * processors(torch.device(device))
    return _ALIGNMENT + programs * 5 * _list_stride(max_tokens, tiles)


def _list_stride(max_tokens: int, tiles: Tiles) -> int:
    """Places for key tiles in the list of a program, whose flags are written eight at a time."""
    return -(-max_tokens // (tiles.keys * 16)) * 16


def prefill(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    alpha: float | Tensor,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    out: Tensor,
    value_scale: float = 1.0,
    workspace: Tensor | None = None,
) -> Tensor:
    """See `entmaxkv_kernels.prefill`; fp8, fp16, bf16 and fp32.

    alpha: one number, or [query_heads] fp64.
    query, out: contiguous in their last dimension.
    workspace: [bytes] uint8, contiguous; its content does not matter. `prefill_workspace_size`
        says how much is fast, and softmax alone needs none. Without it the call allocates one.

    Raises ValueError for a workspace that is too small.
    """
    (tokens, query_heads, head_size), batch = query.shape, len(seq_lens)
    kv_heads, page_size = cache.key.shape[1:3]
    if tokens == 0 or batch == 0:
        return out
    padded_head_size = max(16, triton.next_power_of_2(head_size))
    tiles = tiles_for(query.dtype, padded_head_size)
    group = query_heads // kv_heads
    rows = max(tiles.rows, triton.next_power_of_2(group))
    queries = rows // group
    # Upper bound of the tiles of any division of the tokens into sequences.
    tile_count = tokens // queries + batch
    b = 1.0 if isinstance(alpha, Tensor) or alpha == 1 else exponent(alpha)
    arguments = {
        "p_query": query,
        "p_key": cache.key,
        "p_value": cache.value,
        "p_block_table": block_table,
        "p_seq_lens": seq_lens,
        "p_query_start_loc": query_start_loc,
        "p_alpha": alpha if isinstance(alpha, Tensor) else None,
        "p_slopes": alibi_slopes,
        "p_out": out,
        "s_query_t": query.stride(0),
        "s_query_h": query.stride(1),
        "s_out_t": out.stride(0),
        "s_out_h": out.stride(1),
        "s_page": cache.key.stride(0),
        "s_head": cache.key.stride(1),
        "s_block_table": block_table.stride(0),
        "batch": batch,
        "tiles": tile_count,
        "window": sliding_window or 0,
        "scale": scale,
        "value_scale": value_scale,
        "factor": 1.0 if isinstance(alpha, Tensor) else score_factor(alpha),
        "exponent": b,
        "HKV": kv_heads,
        "G": group,
        "D": head_size,
        "DP": padded_head_size,
        "P": page_size,
        "BQ": queries,
        "BM": rows,
        "BN": tiles.keys,
    }
    per_head = isinstance(alpha, Tensor)
    options = {
        "ALPHA_PER_HEAD": per_head,
        "ALIBI": alibi_slopes is not None,
        "WINDOW": sliding_window is not None,
        "VALUE_STAGES": tiles.value_stages,
        "num_warps": tiles.warps,
    }
    if per_head or alpha == 1:
        _launch(prefill_softmax_kernel, (tile_count, kv_heads), arguments, **options)
    if per_head or alpha != 1:
        stride = _list_stride(block_table.shape[1] * page_size, tiles)
        programs = min(tile_count * kv_heads, tiles.resident * processors(query.device))
        if workspace is None:
            size = _ALIGNMENT + programs * 5 * stride
            workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        programs = min(programs, (workspace.numel() - _ALIGNMENT) // (5 * stride))
        if programs < 1:
            raise ValueError(
                f"workspace has {workspace.numel()} bytes; expected at least "
                f"{_ALIGNMENT + 5 * stride}"
            )
        ticket = workspace[:_ALIGNMENT].view(torch.int32).zero_()
        lists, flags = workspace[_ALIGNMENT:][: programs * 5 * stride].split(
            [programs * 4 * stride, programs * stride]
        )
        _launch(
            prefill_entmax_kernel,
            (programs,),
            arguments,
            **options,
            p_ticket=ticket,
            p_lists=lists.view(torch.int32),
            p_flags=flags,
            list_stride=stride,
            excess_mass=EXCESS_MASS[query.dtype],
            BC=_LISTED,
            ORDER=int(b) if not per_head and b in (1, 2, 3) else 0,
            STAGES=tiles.stages,
        )
    return out


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> None:
    """Launch a kernel with those of the arguments that it has."""
    names = {*kernel.arg_names, "num_warps"}
    given = {**arguments, **options}
    kernel[grid](**{name: value for name, value in given.items() if name in names})
