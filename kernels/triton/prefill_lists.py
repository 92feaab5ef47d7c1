"""The key units that a tile of prefill still reads, in one list.

The units that every row sees whole come first, so that all full key tiles of them need no masks;
then those at the edge of the window and at the diagonal.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .prefill_tiles import (
    UNIT,
    load_rows,
    places,
    row_offsets,
    score,
    spread_offsets,
    spread_units,
)


@triton.jit
def keep_flagged(
    lists, p_words, p_table, start, count, certain, s_page,
    D: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Packs those of `count` units that are flagged, or at `certain` or later, to the front of the
    lists, and returns how many they are.

    FIRST: they are not listed yet, but all those from unit `start` on.
    """
    p_units, p_offsets = lists
    o_c = tl.arange(0, BC)
    kept = count * 0
    # Flags and entries were stored by other threads.
    tl.debug_barrier()
    for i_c in tl.range(0, count, BC, num_stages=1):
        o_e = i_c + o_c
        b_word = tl.load(p_words + o_e // 32, mask=o_e < count, other=0)
        m_kept = ((b_word >> (o_e % 32)) & 1) | (o_e >= certain).to(tl.int32)
        m_kept = tl.where(o_e < count, m_kept, 0)
        b_unit = start + o_e
        if not FIRST:
            b_unit = tl.load(p_units + o_e, mask=o_e < count, other=0)
            tl.debug_barrier()
        o_kept = kept + tl.cumsum(m_kept, 0) - m_kept
        b_offset = row_offsets(p_table, b_unit * UNIT, m_kept > 0, s_page, D, P)
        tl.store(p_units + o_kept, b_unit, mask=m_kept > 0)
        tl.store(p_offsets + o_kept, b_offset, mask=m_kept > 0)
        kept += tl.sum(m_kept, 0)
    return kept


@triton.jit
def append_masked(lists, kept, first, whole, after, stop, BC: tl.constexpr):
    """Lists units [first, whole) and [after, stop) behind those kept; returns how many are listed
    now."""
    p_units, _ = lists
    o_c = tl.arange(0, BC)
    edge = whole - first
    count = edge + stop - after
    for i_c in tl.range(0, count, BC, num_stages=1):
        o_e = i_c + o_c
        b_unit = tl.where(o_e < edge, first + o_e, after + o_e - edge)
        tl.store(p_units + kept + o_e, b_unit, mask=o_e < count)
    tl.debug_barrier()
    return kept + count


@triton.jit
def masked_keys(rows, p_units, i_t, listed, BN: tl.constexpr):
    """Positions [BN] of a listed key tile, and which of them are of the sequence."""
    position, count, lowest = rows[5], rows[6], rows[7]
    o_e = i_t * (BN // UNIT) + tl.arange(0, BN // UNIT)
    # Negative ones for none.
    b_first = tl.load(p_units + o_e, mask=o_e < listed, other=-1) * UNIT
    o_key = spread_units(b_first, BN) + places(BN)
    m_key = (o_key >= lowest) & (o_key < position + count)
    return tl.where(m_key, o_key, position + count), m_key  # one that no row sees


@triton.jit
def masked_scores(
    rows, b_base, p_key, p_table, o_key, m_key, s_page, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores of any keys, and where their rows are."""
    # Slots that hold no token of the sequence may hold anything, even NaN.
    b_offset = row_offsets(p_table, o_key, m_key, s_page, D, P)
    b_k = load_rows(p_key, b_offset, m_key, tl.arange(0, DP), D, MASKED=True)
    return score(rows, b_base, b_k, o_key, ALIBI, WINDOW, MASKED=True), b_offset


@triton.jit
def next_rows(lists, i_t, count, BN: tl.constexpr, ALIBI: tl.constexpr):
    """Offsets of the units of a listed key tile [BN / UNIT], and with ALiBi their positions."""
    p_units, p_offsets = lists
    o_e = i_t * (BN // UNIT) + tl.arange(0, BN // UNIT)
    m_e = i_t + tl.zeros_like(o_e) < count
    b_offset = tl.load(p_offsets + o_e, mask=m_e, other=0)
    b_first = o_e
    if ALIBI:
        b_first = tl.load(p_units + o_e, mask=m_e, other=0) * UNIT
    return b_offset, b_first


@triton.jit
def listed_rows(b_offset, b_first, BN: tl.constexpr, D: tl.constexpr):
    """Of those [BN / UNIT] the offsets and, with ALiBi, the positions of all rows [BN]."""
    return spread_offsets(b_offset, BN, D), spread_units(b_first, BN) + places(BN)
