"""The key units that a tile of prefill still reads.

Those that every row sees whole are in a list, which fills whole key tiles that need no masks. Those
at the edge of the window and at the diagonal are few, and always read.
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

# A unit past all positions.
NEVER = tl.constexpr(1 << 26)


@triton.jit
def unit_flags(p_words, o_unit, count):
    """One for each of the units o_unit that is below `count` and flagged, else zero."""
    b_word = tl.load(p_words + o_unit // 32, mask=o_unit < count, other=0)
    return (b_word >> (o_unit % 32)) & 1


@triton.jit
def keep_flagged(
    lists, p_words, p_table, start, count, s_page,
    EACH: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Packs those of `count` units that are flagged to the front of the lists, and as many of the
    others, which weigh nothing, as make a multiple of EACH; returns how many they are.

    FIRST: they are not listed yet, but all those from unit `start` on. count: a multiple of EACH.
    """
    p_units, p_offsets = lists
    o_c = tl.arange(0, BC)
    flagged = count * 0
    # Flags and entries were stored by other threads.
    tl.debug_barrier()
    if EACH > 1:
        for i_c in tl.range(0, count, BC, num_stages=1):
            flagged += tl.sum(unit_flags(p_words, i_c + o_c, count), 0)
    spare = (EACH - flagged % EACH) % EACH
    flagged = count * 0
    for i_c in tl.range(0, count, BC, num_stages=1):
        o_e = i_c + o_c
        b_flag = unit_flags(p_words, o_e, count)
        b_unit = start + o_e
        if not FIRST:
            b_unit = tl.load(p_units + o_e, mask=o_e < count, other=0)
            tl.debug_barrier()
        b_flagged = flagged + tl.cumsum(b_flag, 0)
        b_others = o_e + 1 - b_flagged
        m_kept = (o_e < count) & ((b_flag > 0) | (b_others <= spare))
        o_kept = b_flagged + tl.minimum(b_others, spare) - 1
        b_offset = row_offsets(p_table, b_unit * UNIT, m_kept, s_page, D, P)
        tl.store(p_units + o_kept, b_unit, mask=m_kept)
        tl.store(p_offsets + o_kept, b_offset, mask=m_kept)
        flagged += tl.sum(b_flag, 0)
    tl.debug_barrier()
    return flagged + spare


@triton.jit
def masked_units(edges):
    """How many units are seen by some rows only: [first, whole) and [after, stop) of edges."""
    first, whole, after, stop = edges
    return whole - first + stop - after


@triton.jit
def masked_keys(rows, edges, i_t, BN: tl.constexpr):
    """Positions [BN] of the masked key tile i_t, and which of them are of the sequence."""
    position, count, lowest = rows[5], rows[6], rows[7]
    first, whole, after, _stop = edges
    o_e = i_t * (BN // UNIT) + tl.arange(0, BN // UNIT)
    b_unit = tl.where(o_e < whole - first, first + o_e, after + o_e - (whole - first))
    # Those past the last one are at positions that no row sees.
    b_first = tl.where(o_e < masked_units(edges), b_unit, NEVER) * UNIT
    o_key = spread_units(b_first, BN) + places(BN)
    return o_key, (o_key >= lowest) & (o_key < position + count)


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
