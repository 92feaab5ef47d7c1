"""Prefill: the launches, how they are divided over the chip, and their scratch memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pages import PagedCache
from ..reference.entmax import exponent, score_factor
from .entmax import order_of
from .launch import launch
from .prefill_softmax import prefill_softmax_kernel
from .prefill_thresholds import prefill_thresholds_kernel
from .prefill_tiles import UNIT
from .prefill_values import prefill_values_kernel
from .workspace import power_of_two, processors

EXCESS_MASS = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Mass above one that is within the precision of the weights, which are divided by their sum."""

LEFT_MASS = {torch.float32: 1e-8, torch.float16: 2e-4, torch.bfloat16: 1e-3}
"""Mass above one that may be left after the last step: the output is off by as much of how the
values differ, at most."""

SAMPLED = 16
"""Of so many keys about one is in the sample that gives the first bound or guess."""

GUESSED_MASS = 1.75
"""Mass above the guess that the sample is made to show: more makes tiles read more units, and less
makes more of them read all keys twice."""

_ALIGNMENT = 256
_LISTED = 1024
"""Key units that a program lists or filters at a time."""
_WAVES = 16
"""Tiles of all KV heads that the two kernels divide up at a time, for each program that runs."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of programs.

    rows: queries times query heads of one KV head. keys: of a key tile. resident: programs that a
    multiprocessor runs at a time. registers: of a thread at most; None for as many as it takes.
    Those with value_ are of the kernels that read values.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int
    value_keys: int
    value_warps: int
    value_stages: int
    value_resident: int
    registers: int | None = None


def tiles_for(dtype: torch.dtype, padded_head_size: int) -> Tiles:
    """Tiles for queries of a dtype, whose accumulators stay in registers."""
    if dtype == torch.float32:
        rows = 32 if padded_head_size < 256 else 16
        return Tiles(rows, 64, 4, 2, 2, 32, 4, 1, 2)
    if padded_head_size == 256:
        return Tiles(64, 64, 4, 2, 2, 64, 8, 1, 1)
    # Small enough that two programs run at a time, one of which multiplies while the other adds.
    return Tiles(128, 128, 8, 2, 2, 64, 8, 3, 1, registers=128)


@dataclass(frozen=True)
class _Division:
    """How the entmax kernels divide their work and a workspace. Units: bytes.

    rows: of a tile. max_tokens: of a sequence. base: whether rows have a base.
    """

    tiles: Tiles
    rows: int
    kv_heads: int
    max_tokens: int
    base: bool

    @property
    def entries(self) -> int:
        """Places in a list of key units, which are flagged by whole words."""
        return -(-self.max_tokens // (UNIT.value * 32)) * 32

    @property
    def list_size(self) -> int:
        return 12 * self.entries

    @property
    def tile_size(self) -> int:
        """Of the thresholds and flags of a tile with all KV heads."""
        return self.kv_heads * (4 * self.rows * (1 + self.base) + self.entries // 8)

    def programs(self, device: torch.device) -> int:
        return max(self.tiles.resident, self.tiles.value_resident) * processors(device)

    def good_size(self, device: torch.device, tile_count: int | None = None) -> int:
        """With which every call is fast, or one of so many tiles."""
        programs = self.programs(device)
        slab = max(1, _WAVES * programs // self.kv_heads)
        if tile_count is not None:
            slab, programs = min(slab, tile_count), min(programs, tile_count * self.kv_heads)
        return _ALIGNMENT + programs * self.list_size + slab * self.tile_size

    def divide(self, size: int, tile_count: int, device: torch.device) -> tuple[int, int]:
        """Programs with a list each, and tiles at a time, for a workspace of this size.

        Raises ValueError if there is no room for one of each.
        """
        least = _ALIGNMENT + self.list_size + self.tile_size
        if size < least:
            raise ValueError(f"workspace has {size} bytes; expected at least {least}")
        programs = min(self.programs(device), tile_count * self.kv_heads)
        free = size - _ALIGNMENT
        # Where it is too small, a half for each.
        programs = min(programs, max(1, free // 2 // self.list_size))
        slab = min(tile_count, (free - programs * self.list_size) // self.tile_size)
        if slab < 1:
            programs, slab = 1, 1
        return programs, slab


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

    It does not grow with the number of queries, which are worked on in portions: 32 MB on an H200
    for 2**17 tokens and bf16 heads of 128, 244 MB for 2**20. A smaller one gives the same results
    with fewer programs or in more portions.

    dtype: of the cache; torch.float32 for fp32 queries of an fp8 cache, which take more.
    max_tokens: columns of the block table times page_size.
    """
    tiles = tiles_for(dtype, power_of_two(head_size))
    rows = max(tiles.rows, power_of_two(query_heads // kv_heads))
    division = _Division(tiles, rows, kv_heads, max_tokens, dtype == torch.float32)
    return division.good_size(torch.device(device))


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
    padded_head_size = max(16, power_of_two(head_size))
    tiles = tiles_for(query.dtype, padded_head_size)
    group = query_heads // kv_heads
    rows = max(tiles.rows, power_of_two(group))
    queries = rows // group
    # Upper bound of the tiles of any division of the tokens into sequences.
    tile_count = tokens // queries + batch
    b = 1.0 if isinstance(alpha, Tensor) or alpha == 1 else exponent(alpha)
    arguments: dict[str, Any] = {
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
    }
    per_head = isinstance(alpha, Tensor)
    options = {
        "ALPHA_PER_HEAD": per_head,
        "ALIBI": alibi_slopes is not None,
        "WINDOW": sliding_window is not None,
        "BN": tiles.value_keys,
        "STAGES": tiles.value_stages,
        "num_warps": tiles.value_warps,
    }
    if per_head or alpha == 1:
        _launch(prefill_softmax_kernel, (tile_count, kv_heads), arguments, **options)
    if per_head or alpha != 1:
        max_tokens = block_table.shape[1] * page_size
        base = query.dtype == torch.float32
        division = _Division(tiles, rows, kv_heads, max_tokens, base)
        if workspace is None:
            size = division.good_size(query.device, tile_count)
            workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        programs, slab = division.divide(workspace.numel(), tile_count, query.device)
        order = 0 if per_head else order_of(b)
        entries, pairs = division.entries, slab * kv_heads
        sizes = [_ALIGNMENT, programs * 8 * entries, programs * 4 * entries]
        sizes += [pairs * rows * 4, pairs * rows * 4 * base, pairs * entries // 8]
        words = workspace[: sum(sizes)].view(torch.int32)
        tickets, offsets, units, tau, bases, words = words.split([size // 4 for size in sizes])
        arguments |= {
            "p_tickets": tickets,
            "p_offsets": offsets.view(torch.int64),
            "p_units": units,
            "p_tau": tau.view(torch.float32),
            "p_base": bases.view(torch.float32),
            "p_words": words,
            "s_words": entries // 32,
            "s_list": entries,
            "excess_mass": EXCESS_MASS[query.dtype],
            "left_mass": LEFT_MASS[query.dtype],
            "FLAGGED_BN": tiles.keys,
            "BC": _LISTED,
            "ORDER": order,
        }
        thresholds = options | {
            "BN": tiles.keys,
            "STAGES": tiles.stages,
            "SAMPLED": SAMPLED,
            "GUESSED": GUESSED_MASS,
            "num_warps": tiles.warps,
            # Powers of any exponent need more.
            "maxnreg": tiles.registers if order else None,
        }
        for first in range(0, tile_count, slab):
            tickets.zero_()
            arguments |= {"first_tile": first, "slab": min(slab, tile_count - first)}
            pairs = arguments["slab"] * kv_heads
            grids = [
                (min(programs, pairs, resident * processors(query.device)),)
                for resident in (tiles.resident, tiles.value_resident)
            ]
            _launch(prefill_thresholds_kernel, grids[0], arguments, **thresholds)
            _launch(prefill_values_kernel, grids[1], arguments, **options)
    return out


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> None:
    """Launch a kernel with those of the arguments that it has."""
    given = arguments | options
    names = [*kernel.arg_names, "num_warps", "maxnreg"]
    launch(kernel, grid, **{name: given[name] for name in names if name in given})
