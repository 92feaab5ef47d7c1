"""One decode step: the launches, in their order."""

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..pages import NewTokens, PagedCache
from ..reference.entmax import exponent, score_factor
from ..selectors import Adaptive, Exact, Selector, TopK
from .adaptive import first_kernel, wanted_kernel
from .append import append
from .attend import attend_kernel
from .attend_short import attend_short_kernel
from .certificate import BOUNDED, PROVED
from .collect import collect_kernel, guess_kernel, sample_kernel
from .entmax import order_of
from .filter import filter_kernel
from .gaussian import cut_kernel, model_kernel, reach_kernel
from .launch import launch
from .nearest import choose_kernel
from .nearest_long import distance_kernel, list_nearest_kernel
from .newest import NOTHING_NEW, can_append, newest_arguments
from .pages import list_kernel
from .softmax import softmax_combine_kernel, softmax_kernel
from .topk import box_kernel
from .workspace import (
    Shape,
    budget_of,
    can_chain,
    first_pages_of,
    power_of_two,
    processors,
    shape_of,
)

NO_CHOICE: dict[str, Any] = dict.fromkeys(
    (
        *("p_listed", "p_listed_count", "p_reach", "p_page_extreme", "p_near_place"),
        *("p_spread", "p_page_sample", "p_member_count", "p_candidates"),
        *("budget", "BL", "BR", "PS", "PSP"),
    )
)
"""What the kernels are given of a choice of pages where there is none."""

NO_BOUNDS: dict[str, Any] = dict.fromkeys(("p_bound", "p_span", "p_unread_mass"))
"""What they are given of bounds where nothing is certified by any."""


def decode(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    alpha: float | Tensor,
    selector: Selector,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    exact_rows: Tensor | None,
    exact_below: int,
    counters: Tensor | None,
    out: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    new_tokens: NewTokens | None = None,
    certificate: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """See `entmaxkv_kernels.decode`; fp8, fp16, bf16 and fp32. `scale` is multiplied by `key_scale`
    already.

    workspace: [bytes] uint8, contiguous, at least what `decode_workspace_size` says for speed; its
        content does not matter. Without it the step allocates one.

    Raises ValueError for a workspace that is too small.
    """
    if len(query) == 0:
        return out
    if sliding_window is not None:
        selector = Exact()  # every page inside the window is read
    certified = certificate is not None
    shape = step_shape(query, cache, block_table, selector, exact_below, certified)
    # Memory that is taken only after an append can be what that still reads.
    early = new_tokens is not None and workspace is not None
    if workspace is None:
        workspace = torch.empty(shape.good_size, dtype=torch.uint8, device=query.device)
    if workspace.numel() < shape.least_size:
        raise ValueError(
            f"workspace has {workspace.numel()} bytes; expected at least {shape.least_size}"
        )
    capacity = shape.capacity(workspace.numel())
    tile, splits = shape.tile, shape.splits
    store_below = min(shape.store_below, capacity // tile * tile * splits)
    softmax, guessed = isinstance(alpha, Tensor) or alpha == 1, shape.max_read > store_below
    newest = NOTHING_NEW
    # The sample of a row of more pages than two reads none that is written.
    unsure = guessed and (shape.listed or store_below < 2 * shape.page_size)
    if new_tokens is not None and can_append(shape, cache, softmax or unsure):
        newest = newest_arguments(cache, new_tokens, key_scale)
    elif new_tokens is not None:
        append(cache, *new_tokens, key_scale=key_scale, value_scale=value_scale, counters=counters)
    b = 1.0 if isinstance(alpha, Tensor) or alpha == 1 else exponent(alpha)
    arguments = {
        **{f"p_{name}": part for name, part in shape.divide(workspace, capacity).items()},
        "p_query": query,
        "p_key": cache.key,
        "p_value": cache.value,
        "p_block_table": block_table,
        "p_seq_lens": seq_lens,
        "p_exact_rows": exact_rows,
        "p_alpha": alpha if isinstance(alpha, Tensor) else None,
        "p_slopes": alibi_slopes,
        "p_out": out,
        "p_counters": counters,
        "p_certificate": certificate,
        "p_scales": cache.scales,
        "s_scales_page": cache.scales.stride(0),
        "s_scales_head": cache.scales.stride(1),
        "s_query_b": query.stride(0),
        "s_query_h": query.stride(1),
        "s_out_b": out.stride(0),
        "s_out_h": out.stride(1),
        "s_certificate": 0 if certificate is None else certificate.stride(0),
        "s_page": cache.key.stride(0),
        "s_head": cache.key.stride(1),
        "s_block_table": block_table.stride(0),
        "list_stride": shape.page_stride,
        "page_stride": shape.page_stride,
        "window": sliding_window or 0,
        "exact_below": exact_below,
        "early": int(early and not newest["APPENDS"]),
        "capacity": capacity,
        "limit": shape.near,
        "rows": shape.batch * shape.kv_heads,
        "store_below": store_below,
        "scale": scale,
        "value_scale": value_scale,
        "factor": 1.0 if isinstance(alpha, Tensor) else score_factor(alpha),
        "exponent": b,
        "HKV": shape.kv_heads,
        "G": shape.group,
        "GP": shape.padded_group,
        "GW": shape.group_width,
        "D": shape.head_size,
        "DP": shape.padded_head_size,
        "P": shape.page_size,
        "S": splits,
        "SP": power_of_two(splits),
        "FP": shape.filter_parts,
        "DS": shape.value_parts,
        "BN": tile,
        "CLASSES": shape.classes,
        "M": shape.sample,
        "GUESSED": guessed,
        "BK": max(32, shape.page_size),
        "SHARES": shape.processors,
        "WINDOW": sliding_window is not None,
        "LISTED": shape.listed,
        # Rows of whose pages none can be left out keep little of them.
        "SLOTS_FIRST": shape.listed and not shape.first_pages,
        "ALIBI": alibi_slopes is not None,
        "EXACT_ROWS": exact_rows is not None,
        "OVERFULL": exact_rows is not None and shape.max_read < shape.max_tokens,
        "CERTIFY": _certify(selector, shape) if certified else 0,
        **_certificate_tiles(shape, 4, 1),
        "COUNT": counters is not None,
        "ALPHA_PER_HEAD": isinstance(alpha, Tensor),
        "CHAINED": can_chain(query.device),
        "ORDER": 0 if isinstance(alpha, Tensor) else order_of(b),
    }
    # Where nothing else reads the list, it is made by those who read the pages.
    alone = not softmax and not guessed
    choosing = isinstance(selector, TopK) and shape.ranked_by_readers and alone
    choice = {"CHOOSING": choosing, "OVERLAPPED": choosing and shape.overlapped}
    arguments = NO_CHOICE | NO_BOUNDS | arguments | choice | newest
    if shape.listed:
        arguments |= _ranking(shape, selector)
        _list_pages(shape, cache, selector, arguments)
        arguments["early"] = 0
    if softmax:
        _attend_softmax(shape, arguments)
    if isinstance(alpha, Tensor) or alpha > 1:
        _attend(shape, arguments)
    return out


def step_shape(
    query: Tensor,
    cache: PagedCache,
    block_table: Tensor,
    selector: Selector,
    exact_below: int,
    certified: bool = False,
) -> Shape:
    """What the launches of a step depend on."""
    kv_heads, page_size = cache.key.shape[1:3]
    return shape_of(
        len(query),
        query.shape[1],
        kv_heads,
        query.shape[2],
        page_size,
        cache.key.dtype,
        block_table.shape[1] * page_size,
        processors(query.device),
        selector.name,
        budget_of(selector, page_size, exact_below),
        certified and isinstance(selector, TopK | Adaptive),
        first_pages_of(selector, block_table.shape[1], page_size),
        cache.layout.coded,
    )


def _certify(selector: Selector, shape: Shape) -> int:
    """What the kernels are told of unread pages for a certificate."""
    if isinstance(selector, Exact):
        return PROVED.value
    return BOUNDED.value if shape.certified else 1


def _certificate_tiles(shape: Shape, warps: int, parts: int) -> dict[str, int]:
    """Bounds that a program of so many warps, one of `parts` of a head, weighs first, and at once
    of the others: 0 if there are none."""
    first = shape.certificate_tile(warps, parts)
    others = power_of_two(max(-(-shape.max_pages // parts) - first, 32 * warps))
    # Who makes up for a head weighs all of its bounds, whatever parts share them elsewhere.
    return {"BC": first, "BU": min(4 * first, others) if shape.max_pages > first else 0}


def _ranking(shape: Shape, selector: Selector) -> dict[str, Any]:
    """How the ranking of the pages is divided."""
    return {
        "budget": selector.token_budget // shape.page_size if isinstance(selector, TopK) else None,
        "PS": shape.page_splits,
        "PSP": power_of_two(shape.page_splits),
        "BP": shape.page_tile,
        "BL": shape.list_tile,
        "BR": shape.rest_tile,
        "ALONE": shape.ranked_alone,
        "BM": shape.most_members,
        "BF": shape.most_candidates,
        "NT": power_of_two(shape.list_tiles),
        "LONG": shape.long_rows,
        "STEP": shape.page_step,
        "CODES": shape.coded,
        "SHORTER": shape.coded and isinstance(selector, Exact),
        "SPREAD": shape.first_pages > 0,
        "ROUNDED": shape.certified or isinstance(selector, Exact),
    }


def _list_pages(
    shape: Shape, cache: PagedCache, selector: Selector, arguments: dict[str, Any]
) -> None:
    """Choose the pages of every row and list them."""
    arguments = arguments | {
        "p_statistics": cache.statistics,
        "s_page": cache.statistics.stride(0),
        "s_head": cache.statistics.stride(1),
        # Of 16 bytes that end with the scales, from the statistics.
        "o_scales": 4 * cache.scales.storage_offset() - 4 - cache.statistics.storage_offset(),
    }
    rows = (shape.page_splits, shape.kv_heads, shape.batch)
    tiles = (shape.list_tiles, *rows[1:])
    most: dict[str, Any] = {"STAGES": shape.page_stages}
    if shape.coded:
        # A head has two columns of products of which there are at least 8.
        most["GP"] = max(4, shape.group_width)
    elif shape.certified:
        # Registers of which there are enough for four programs on a multiprocessor.
        most["maxnreg"] = 128
    if isinstance(selector, TopK):
        _chain(box_kernel, rows, arguments, **most)
        if shape.long_rows:
            _chain(distance_kernel, tiles, arguments, num_warps=8)
            if not shape.most_candidates:
                _chain(list_nearest_kernel, tiles, arguments, num_warps=8)
        elif not arguments["CHOOSING"]:
            _chain(choose_kernel, rows[1:], arguments, num_warps=max(4, arguments["BL"] // 256))
    elif isinstance(selector, Adaptive | Exact):
        bounded = {"CERTIFY": BOUNDED.value if shape.certified else 0}
        _chain(box_kernel, rows, arguments | bounded, **most)
        _list_reaching(shape, cache, selector, arguments)
    else:
        normal, root = NormalDist(), 1 / shape.page_size
        precision = "ieee" if arguments["p_query"].dtype == torch.float32 else "tf32"
        options = {"PRECISION": precision, "STAGES": 2, "num_warps": _warps(shape)}
        _launch(model_kernel, rows, arguments, **options)
        _launch(
            cut_kernel,
            (shape.query_heads, shape.batch),
            arguments,
            narrow_spread=selector.narrow_spread,
            safety=selector.safety,
            narrow_safety=selector.narrow_safety,
            quantile=normal.inv_cdf(selector.quantile**root),
            narrow_quantile=normal.inv_cdf(selector.narrow_quantile**root),
            excess_fraction=selector.excess_fraction,
            excess_deviations=selector.excess_deviations,
            SHARED=selector.shared_spread,
            num_warps=8 if arguments["ALIBI"] else 1,
        )
        _launch(reach_kernel, tiles, arguments, BR=256)
        _chain(list_kernel, tiles, arguments)


def _list_reaching(
    shape: Shape, cache: PagedCache, selector: Adaptive | Exact, arguments: dict[str, Any]
) -> None:
    """List the pages of every row that reach the threshold of those read first."""
    tiles, pages = (shape.list_tiles, shape.kv_heads, shape.batch), shape.tile // shape.page_size
    members = -(-shape.max_pages // (selector.first_pages - 1))
    arguments = arguments | {
        "FIRST": selector.first_pages,
        "MOST": shape.first_pages,
        "FT": shape.first_tiles,
        "FP": shape.first_tiles * pages,
        "FPP": power_of_two(shape.first_tiles * pages),
        "FN": power_of_two(shape.first_tiles * shape.tile),
        "BJ": min(power_of_two(members), 2048 // pages),
    }
    keys = {"s_page": cache.key.stride(0), "s_head": cache.key.stride(1)}
    programs = (shape.first_tiles * shape.group, *tiles[1:])
    _chain(first_kernel, programs, arguments | keys, num_warps=_warps(shape))
    _chain(
        wanted_kernel,
        tiles,
        arguments,
        PROVE=isinstance(selector, Exact),
        **_estimate(selector),
        num_warps=8 if shape.group_width * arguments["FN"] <= 1 << 14 else 16,
    )
    _chain(list_kernel, tiles, arguments)


def _estimate(selector: Adaptive | Exact) -> dict[str, Any]:
    """How the reach of scores is estimated, for those who estimate it."""
    if isinstance(selector, Exact):
        unused = {"margin": 1.0, "reach": 1.0, "guard": 1.0}
        return {**unused, "OWN_REACH": False, "GUARDED": False}
    reach = selector.fixed_reach
    return {
        "margin": float(selector.margin),
        "reach": 1.0 if reach is None else float(reach),
        "guard": float(selector.guard_in_force),
        "OWN_REACH": reach is None,
        "GUARDED": selector.guard_in_force > 0,
    }


def _attend(shape: Shape, arguments: dict[str, Any]) -> None:
    """Entmax attention over the pages of the block table, or over those that were listed."""
    rows = (shape.splits, shape.kv_heads, shape.batch)
    guessed, splits, capacity = (arguments[name] for name in ("GUESSED", "SP", "capacity"))
    if guessed:
        tiles = (shape.sample // shape.tile, *rows[1:])
        _chain(sample_kernel, tiles, arguments, num_warps=_warps(shape))
        _chain(guess_kernel, (shape.query_heads, shape.batch), arguments, num_warps=8)
    parts = (shape.value_parts, shape.query_heads, shape.batch)
    anywhere = guessed or shape.near < shape.most_near
    arguments = arguments | {
        "MAKE_UP": anywhere or arguments["OVERFULL"],
        "FLAGGED": not anywhere,
    }
    # One more writes statistics.
    collects = (shape.splits + int(bool(arguments["STATISTICS"])), *rows[1:])
    _chain(collect_kernel, collects, arguments, STAGES=2, num_warps=shape.collect_warps)
    warps = _attend_warps(shape)
    sharing = shape.certificate_parts(warps)
    values = {
        **_certificate_tiles(shape, warps, sharing),
        "DC": sharing,
        "BV": warps * 1024 // (shape.padded_head_size // shape.value_parts),
        "num_warps": warps,
    }
    whole = not guessed and capacity >= shape.most_capacity and shape.near >= shape.most_near
    if shape.held and whole:
        held = {"TILES": capacity // shape.tile, "R": shape.held}
        _chain(attend_short_kernel, parts, arguments, **held, **values)
        return
    filters, threads = shape.filter_parts, 128
    places = min(power_of_two(capacity), max(32, 16 * threads * filters // splits))
    places = max(places, threads * filters // splits)
    _chain(
        filter_kernel,
        (filters, shape.query_heads, shape.batch),
        arguments,
        JC=places,
        WIDTH=threads,
        num_warps=threads // 32,
    )
    block = 512 if shape.max_read > 1 << 18 or warps == 4 else 256
    if arguments["MAKE_UP"] and warps < 16:
        # A multiprocessor holds no fewer of them than of those that never make up for anything.
        values["maxnreg"] = 128
    _chain(attend_kernel, parts, arguments, R=block * warps, **values)


def _attend_softmax(shape: Shape, arguments: dict[str, Any]) -> None:
    """The same for heads of alpha = 1."""
    rows = (shape.splits, shape.kv_heads, shape.batch)
    tile = max(64, shape.page_size)
    _launch(softmax_kernel, rows, arguments, BN=tile, STAGES=2, num_warps=_warps(shape))
    _launch(softmax_combine_kernel, (shape.query_heads, shape.batch), arguments)


def _attend_warps(shape: Shape) -> int:
    """Warps that solve the threshold of one query head: as few as hold what it can read."""
    if shape.max_read <= 2048:
        return 4
    return 8 if shape.crowded or shape.max_read <= 8192 else 16


def _warps(shape: Shape) -> int:
    """Warps of a program that holds tiles of rows: rows of more than 512 bytes take more."""
    return 8 if shape.row_size > 512 else 4


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> None:
    """Launch a kernel with those of the arguments that it has."""
    own = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    launch(kernel, grid, **{**own, **options})


def _chain(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> None:
    """Launch a kernel while the one before it ends; it awaits that one by itself.

    One that streams keys goes after kernels of few programs, or of none that lets it start early:
    placed beside many that still run, its own would be spread unevenly.
    """
    chained = {"launch_pdl": True} if arguments["CHAINED"] else {}
    _launch(kernel, grid, arguments, **options, **chained)
