"""Appending the newest token of every sequence by the launch that reads keys first.

A launch less than with `append` before: whoever reads a new key writes it first. Statistics of the
last pages, which nothing in the step ranks, are written beside by programs of their own.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

from typing import Any

import triton
import triton.language as tl

from ..pages import STATISTICS, NewTokens, PagedCache
from .append import count_page, store_statistics, to_stored, write_row
from .scores import may_be_fresh
from .workspace import Shape

# Sequences of a batch in which one looks for a page that another one fills.
MOST_SEQUENCES = tl.constexpr(128)

NOTHING_NEW: dict[str, Any] = dict.fromkeys(
    (
        *("p_new_key", "p_new_value", "p_slot_mapping", "p_statistics"),
        *("s_new_key_b", "s_new_key_h", "s_new_value_b", "s_new_value_h"),
        *("s_statistics_page", "s_statistics_head", "key_scale", "batch", "STATISTICS"),
    )
) | {"APPENDS": False}
"""What the kernels are given of new tokens where they append none."""

HELD_BY_THREAD = 16
"""Elements of a page's keys that a thread holds at most where it finds their statistics."""


@triton.jit
def write_newest(
    p_new_key, p_new_value, p_slot_mapping, p_key, p_value, p_block_table, p_counters,
    i_b, i_h, i_s, n, entries, batch, s_new_key_b, s_new_key_h, s_new_value_b, s_new_value_h,
    s_page, s_head, s_block_table, key_scale, value_scale,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PAGES: tl.constexpr, S: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Writes the new rows among those that split i_s of a row reads: of S splits every S-th PAGES
    of its `entries`, the last page of the sequence being the last of them.

    The page before it may be filled by another sequence of the batch, if the row is read whole. All
    splits write that key, too, so that none reads what only another program writes.
    """
    i_h = i_h.to(tl.int64)
    slot = tl.load(p_slot_mapping + i_b)
    if (slot >= 0) & ((entries - 1) // PAGES % S == i_s):
        write_row(
            p_new_key, p_key, i_b, i_h, slot, s_new_key_b, s_new_key_h, s_page, s_head, key_scale,
            D, DP, P,
        )  # fmt: skip
        write_row(
            p_new_value, p_value, i_b, i_h, slot, s_new_value_b, s_new_value_h, s_page, s_head,
            value_scale, D, DP, P,
        )  # fmt: skip
        if COUNT:
            count_page(p_counters)
    if may_be_fresh(n, P) & (n > 1) & (batch > 1):
        page = tl.load(p_block_table + i_b.to(tl.int64) * s_block_table + (n - 1) // P - 1)
        full = page.to(tl.int64) * P + P - 1
        o_b = tl.arange(0, MOST_SEQUENCES)
        b_slot = tl.load(p_slot_mapping + o_b, mask=o_b < batch, other=-1)
        i_other = tl.max(tl.where(b_slot == full, o_b, -1), 0)
        if i_other >= 0:
            write_row(
                p_new_key, p_key, i_other, i_h, full, s_new_key_b, s_new_key_h, s_page, s_head,
                key_scale, D, DP, P,
            )  # fmt: skip
    # The program's other threads wrote some of what a thread reads.
    tl.debug_barrier()


@triton.jit
def write_last_statistics(
    p_new_key, p_slot_mapping, p_key, p_statistics, p_scales, i_b, i_h,
    s_new_key_b, s_new_key_h, s_page, s_head, s_statistics_page, s_statistics_head, key_scale,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Writes the statistics of a sequence's last page: of older rows, which are in the cache, and
    of the new one, which another program may not have written yet."""
    i_h = i_h.to(tl.int64)
    slot = tl.load(p_slot_mapping + i_b)
    if slot >= 0:
        o_r, o_d = tl.arange(0, P), tl.arange(0, DP)
        m_d = o_d < D
        last = (slot % P).to(tl.int32)
        p_page = p_key + (slot // P) * s_page + i_h * s_head
        m_old = (o_r < last)[:, None] & m_d[None, :]
        b_old = tl.load(p_page + o_r[:, None] * D + o_d[None, :], mask=m_old, other=0.0)
        p_new = p_new_key + i_b.to(tl.int64) * s_new_key_b + i_h * s_new_key_h
        b_new = to_stored(tl.load(p_new + o_d, mask=m_d, other=0.0), key_scale, b_old.dtype)
        b_new = tl.where((o_r == last)[:, None], b_new.to(tl.float32)[None, :], 0.0)
        b_key = tl.where((o_r < last)[:, None], b_old.to(tl.float32), b_new)  # [P, DP]
        o_page = (slot // P) * s_statistics_page + i_h * s_statistics_head
        store_statistics(
            p_statistics, p_scales, o_page, b_key, (o_r <= last)[:, None], last + 1, o_d, D,
            STATISTICS,
        )  # fmt: skip


def can_append(shape: Shape, cache: PagedCache, others: bool) -> bool:
    """Whether those who score keys append the new ones: where no other launch reads keys that may
    be new (`others`) or what is known of a sequence's last page.

    Nor where a sequence that is not flagged may rank a page that another one fills: `exact` that
    prunes waits for `append` there.
    """
    if others or shape.selector not in ("exact", "topk"):
        return False
    elements = shape.page_size * shape.padded_head_size if cache.layout.statistics else 0
    held = HELD_BY_THREAD * 32 * shape.collect_warps
    return elements <= held and shape.batch <= MOST_SEQUENCES.value


def newest_arguments(cache: PagedCache, new_tokens: NewTokens, key_scale: float) -> dict[str, Any]:
    """What the kernels are given of new tokens that they append."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in new_tokens[:2])
    return {
        "p_new_key": key,
        "p_new_value": value,
        "p_slot_mapping": new_tokens.slot_mapping,
        "p_statistics": cache.statistics,
        "s_new_key_b": key.stride(0),
        "s_new_key_h": key.stride(1),
        "s_new_value_b": value.stride(0),
        "s_new_value_h": value.stride(1),
        "s_statistics_page": cache.statistics.stride(0),
        "s_statistics_head": cache.statistics.stride(1),
        "key_scale": key_scale,
        "batch": len(key),
        "APPENDS": True,
        "STATISTICS": STATISTICS.index(cache.layout.statistics),
    }
