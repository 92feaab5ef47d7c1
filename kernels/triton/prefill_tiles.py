"""Tiles of prefill: which queries and keys they hold, and the scores between them."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import weights_and_slopes


@triton.jit
def find_tile(p_query_start_loc, i_tile, batch, BQ: tl.constexpr):
    """Sequence of a tile, and the tile's number in it, which may be out of range.

    A sequence has room for one tile more than its whole ones.
    """
    low, high = i_tile * 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(p_query_start_loc + middle).to(tl.int32) // BQ + middle
        low = tl.where(first <= i_tile, middle, low)
        high = tl.where(first <= i_tile, high, middle)
    return low, i_tile - (tl.load(p_query_start_loc + low).to(tl.int32) // BQ + low)


@triton.jit
def tile_bounds(
    p_query_start_loc, p_seq_lens, i_b, i_local, window, BQ: tl.constexpr, WINDOW: tl.constexpr
):
    """Of a tile: its first token in the batch, its tokens (none if out of range), the position of
    the first one, and the first position that it sees."""
    start = tl.load(p_query_start_loc + i_b).to(tl.int32)
    queries = tl.load(p_query_start_loc + i_b + 1).to(tl.int32) - start
    begin = i_local * BQ
    count = tl.where(i_local >= 0, tl.minimum(queries - begin, BQ), 0)
    position = tl.load(p_seq_lens + i_b).to(tl.int32) - queries + begin
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(position - window + 1, 0)
    return start + begin, count, position, lowest


@triton.jit
def key_tiles(position, count, lowest, window, BN: tl.constexpr, WINDOW: tl.constexpr):
    """Bounds of the key tiles of a tile: [first, whole) and [after, stop) need masks."""
    first = lowest // BN
    after = (position + 1) // BN
    stop = (position + count - 1) // BN + 1
    whole = first
    if WINDOW:
        whole = (tl.maximum(position + count - window, 0) + BN - 1) // BN
    return first, tl.minimum(whole, after), after, stop


@triton.jit
def load_pages(p_table, o_key, m_key, P: tl.constexpr):
    """Pages of key positions, 0 where masked."""
    return tl.load(p_table + o_key // P, mask=m_key, other=0)


@triton.jit
def load_tile_pages(p_table, i_tile, o_n, m_key, P: tl.constexpr, BN: tl.constexpr):
    """Pages of the keys of a key tile, with less arithmetic than from their positions."""
    if BN % P == 0:
        p_page = p_table + i_tile * (BN // P) + o_n // P
    else:
        p_page = p_table + i_tile // (P // BN) + o_n * 0
    return tl.load(p_page, mask=m_key, other=0)


@triton.jit
def load_tile_rows(
    p_rows, b_page, i_tile, o_n, o_d, s_page, D: tl.constexpr, P: tl.constexpr, BN: tl.constexpr
):
    """`load_rows` of the keys of a key tile, none of them masked."""
    if BN % P == 0:
        p_first = p_rows + (o_n % P * D)[:, None] + o_d[None, :]  # the same for all key tiles
    else:
        p_first = p_rows + i_tile % (P // BN) * (BN * D) + (o_n * D)[:, None] + o_d[None, :]
    p_tile = p_first + (b_page.to(tl.int64) * s_page)[:, None]
    if o_d.shape[0] == D:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def load_rows(
    p_rows, b_page, o_key, m_key, o_d, s_page, D: tl.constexpr, P: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The rows of keys at their pages, [BN, DP]; zeros past the head size and where masked."""
    o_row = b_page.to(tl.int64) * s_page + (o_key % P) * D
    p_tile = p_rows + o_row[:, None] + o_d[None, :]
    if MASKED:
        return tl.load(p_tile, mask=m_key[:, None] & (o_d < D)[None, :], other=0.0)
    elif o_d.shape[0] == D:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def score(
    b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
    ALIBI: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores z [BM, BN], -inf where not visible, up to a constant per row, which entmax ignores.

    b_base is taken off first: a score near it is exact, where the threshold may lie closer than
    the scores' own precision.

    fp8 keys become the queries' dtype, which is exact.
    """
    b_k = tl.trans(b_k.to(b_q.dtype))
    b_z = tl.dot(b_q, b_k, input_precision="ieee") * b_scale[:, None] - b_base[:, None]
    if ALIBI:
        b_z += b_slope[:, None] * (o_key - position).to(tl.float32)[None, :]
    if MASKED:
        m_visible = o_key[None, :] <= b_position[:, None]
        if WINDOW:
            m_visible &= o_key[None, :] > b_position[:, None] - window
        b_z = tl.where(m_visible, b_z, -float("inf"))
    return b_z


@triton.jit
def moments(b_z, b_tau, b_exponent, ORDER: tl.constexpr):
    """sum x ** b, NaN for a NaN, and sum x ** (b - 1) of each row, x = max(z - tau, 0)."""
    b_x = tl.maximum(b_z - b_tau[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ORDER == 0:
        # Sums of powers up to 2 ** 80 are finite. Scores that are clipped have a lower threshold,
        # so that steps stay below the true one.
        b_most = tl.exp2(80.0 / b_exponent)[:, None]
        b_x = tl.minimum(b_x, b_most, propagate_nan=tl.PropagateNan.ALL)
    b_weight, b_power = weights_and_slopes(b_x, b_exponent[:, None], ORDER)
    return tl.sum(b_weight, 1), tl.sum(b_power, 1)
