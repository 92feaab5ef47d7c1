"""The key units that a tile of prefill still reads, in one list.

The units that every row sees whole come first, so that all full key tiles of them need no masks;
then those at the edge of the window and at the diagonal.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .prefill_tiles import UNIT, row_offsets

# A position that no row sees.
PAST = tl.constexpr(1 << 30)


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
def append_masked(
    lists, kept, p_table, edges, s_page, D: tl.constexpr, P: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Lists units [first, whole) and [after, stop) behind those kept; returns how many are listed.

    edges: first, whole, after, stop.
    """
    p_units, p_offsets = lists
    first, whole, after, stop = edges
    o_c = tl.arange(0, BC)
    edge = whole - first
    count = edge + stop - after
    for i_c in tl.range(0, count, BC, num_stages=1):
        o_e = i_c + o_c
        b_unit = tl.where(o_e < edge, first + o_e, after + o_e - edge)
        b_offset = row_offsets(p_table, b_unit * UNIT, o_e < count, s_page, D, P)
        tl.store(p_units + kept + o_e, b_unit, mask=o_e < count)
        tl.store(p_offsets + kept + o_e, b_offset, mask=o_e < count)
    tl.debug_barrier()
    return kept + count


@triton.jit
def listed_count(listed, edges, stop):
    """Listed keys up to position `stop`, in the last unit."""
    return (listed - edges[3]) * UNIT + stop


@triton.jit
def listed_keys(p_units, i_t, BN: tl.constexpr):
    """Positions [BN] of a listed key tile; anything past the list."""
    b_unit = tl.load(p_units + i_t * (BN // UNIT) + tl.arange(0, BN // UNIT))
    return tl.reshape(b_unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :], [BN])


@triton.jit
def listed_rows(p_offsets, i_t, keys, BN: tl.constexpr):
    """Where the rows of a listed key tile start, by units; 0 from `keys` on."""
    o_n = tl.arange(0, BN)
    b_offset = tl.load(
        p_offsets + i_t * (BN // UNIT) + o_n // UNIT, mask=i_t * BN + o_n < keys, other=0
    )
    # Without the hint rows are loaded element by element.
    return tl.multiple_of(b_offset, 16)
