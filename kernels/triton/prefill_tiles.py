"""Tiles of prefill: which queries and keys they hold, the scores between them, and their sums.

A tile is BQ neighbouring queries of one sequence with all G query heads of one KV head, packed
into BM rows, so that keys and values are read once for the group. Key tiles of BN positions that
every row sees whole need no masks; those at the diagonal and at the edge of the window do.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import head_parameters, weights_and_slopes

# Positions that share a flag, of one page each.
UNIT = tl.constexpr(16)
# Keys that L2 holds beside all else.
NEAR_BYTES = tl.constexpr(1 << 25)


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
def page_offsets(b_page, s_page):
    """Where pages start; products of what is not negative take one instruction."""
    return (b_page.to(tl.uint32).to(tl.uint64) * s_page.to(tl.uint32)).to(tl.int64)


@triton.jit
def row_offsets(p_table, o_key, m_key, s_page, D: tl.constexpr, P: tl.constexpr):
    """Where the rows of keys at any positions are in the pages of a head; masked ones at 0."""
    o_key = o_key.to(tl.uint32)
    b_page = tl.load(p_table + o_key // P, mask=m_key, other=0)
    return page_offsets(b_page, s_page) + (o_key % P) * D


@triton.jit
def spread_units(b_unit, BN: tl.constexpr):
    """What each unit [BN / UNIT] has, for the rows [BN] of a key tile: first the first keys of all
    units, then their second ones, and so on.

    In this order a thread of a wgmma accumulator has scores of two units only, and those that load
    rows load all of theirs from one unit.
    """
    units: tl.constexpr = BN // UNIT.value
    return tl.reshape(tl.broadcast_to(b_unit[None, :], [UNIT.value, units]), [BN])


@triton.jit
def places(BN: tl.constexpr):
    """Of the rows of a key tile: which key of their unit they are."""
    units: tl.constexpr = BN // UNIT.value
    o_u = tl.arange(0, UNIT)
    return tl.reshape(tl.broadcast_to(o_u[:, None], [UNIT.value, units]), [BN])


@triton.jit
def spread_offsets(b_offset, BN: tl.constexpr, D: tl.constexpr):
    """Offsets of the rows of a key tile from those of its units."""
    # Rows are loaded element by element unless their offsets are seen to be multiples.
    return (spread_units(b_offset >> 4, BN) << 4) + places(BN) * D


@triton.jit
def tile_keys(i_t, BN: tl.constexpr):
    """Positions of the rows of key tile i_t."""
    return i_t * BN + spread_units(tl.arange(0, BN // UNIT) * UNIT, BN) + places(BN)


@triton.jit
def next_pages(p_table, first, i_t, count, BN: tl.constexpr, P: tl.constexpr):
    """Pages of the units [BN / UNIT] of tile i_t of `count` from the multiple `first` of BN on."""
    o_u = tl.arange(0, BN // UNIT) * UNIT
    if BN % P == 0:
        p_page = p_table + first // P + i_t * (BN // P) + o_u // P
    else:
        p_page = p_table + (first + i_t * BN + o_u).to(tl.uint32) // P
    return tl.load(p_page, mask=i_t + tl.zeros_like(o_u) < count, other=0)


@triton.jit
def tile_offsets(
    b_page, first, i_t, s_page, BN: tl.constexpr, D: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Where the rows of the keys of such a tile are."""
    o_u = tl.arange(0, BN // UNIT) * UNIT
    # Where units are in their pages is mostly the same for all tiles.
    if BN % P != 0:
        o_u = (first + i_t * BN + o_u).to(tl.int32)
    b_in = (o_u.to(tl.uint32) % P).to(tl.int32)
    return spread_offsets(page_offsets(b_page, s_page) + b_in * D, BN, D)


@triton.jit
def load_rows(p_rows, b_offset, m_key, o_d, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows at their offsets, [BN, DP]; zeros past the head size and where masked."""
    p_tile = p_rows + b_offset[:, None] + o_d[None, :]
    if MASKED:
        return tl.load(p_tile, mask=m_key[:, None] & (o_d < D)[None, :], other=0.0)
    elif o_d.shape[0] == D:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def heads_in_turn(p_key, p_seq_lens, batch, HKV: tl.constexpr, D: tl.constexpr):
    """How many KV heads take turns: all if L2 holds the keys of the longest sequence for all of
    them, so that no head's tiles alone keep few programs busy at the end; else one."""
    o_b = tl.arange(0, 128)
    longest = tl.full([], 0, tl.int32)
    for i_b in range(0, batch, 128):
        b_n = tl.load(p_seq_lens + i_b + o_b, mask=i_b + o_b < batch, other=0)
        longest = tl.maximum(longest, tl.max(b_n, 0).to(tl.int32))
    BYTES: tl.constexpr = HKV * D * p_key.dtype.element_ty.primitive_bitwidth // 8
    return tl.where(longest <= NEAR_BYTES // BYTES, HKV, 1)


@triton.jit
def tile_of(item, slab, together):
    """KV head and tile of the slab of a program's next piece of work.

    `together` heads take turns, and then the next ones. Late tiles, which see the most keys, go
    first.
    """
    i_group, rest = item // (slab * together), item % (slab * together)
    return i_group * together + rest % together, slab - 1 - rest // together


@triton.jit
def load_tile(
    p_query, p_alpha, p_slopes, p_query_start_loc, p_seq_lens, i_h, i_tile, s_query_t, s_query_h,
    batch, window, scale, factor, exponent, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ALIBI: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """A tile of one KV head: its sequence, its queries (none if out of range) and first token in
    the batch, query and head of each row, whether the row is used, and what `score` needs."""
    o_r, o_d = tl.arange(0, BM), tl.arange(0, DP)
    i_b, i_local = find_tile(p_query_start_loc, i_tile, batch, BQ)
    token, count, position, lowest = tile_bounds(
        p_query_start_loc, p_seq_lens, i_b, i_local, window, BQ, WINDOW
    )
    o_q = o_r // G
    o_head = i_h * G + o_r % G
    m_row = o_q < count
    b_factor, b_exponent = head_parameters(p_alpha, factor, exponent, o_head, m_row, ALPHA_PER_HEAD)
    if ALPHA_PER_HEAD:
        m_row &= tl.load(p_alpha + o_head, mask=m_row, other=1.0) > 1.0
    b_slope = b_factor
    if ALIBI:
        b_slope = tl.load(p_slopes + o_head, mask=m_row, other=0.0) * b_factor
    o_query = ((token + o_q).to(tl.int64) * s_query_t + o_head * s_query_h)[:, None] + o_d[None, :]
    b_q = tl.load(p_query + o_query, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    rows = (
        b_q, b_factor * scale, b_slope, b_exponent, position + o_q, position, count, lowest,
        window,
    )  # fmt: skip
    return i_b, count, token, o_q, o_head, m_row, rows


@triton.jit
def score(
    rows, b_base, b_k, o_key, ALIBI: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Scores z [BM, BN], -inf where not visible, up to a constant per row, which entmax ignores.

    b_base is taken off first: a score near it is exact, where the threshold may lie closer than
    the scores' own precision.

    fp8 keys become the queries' dtype, which is exact.
    """
    b_q, b_scale, b_slope, _exponent, b_position, position, _count, _lowest, window = rows
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
def partial_sums(b_x, FP32: tl.constexpr):
    """Sums over every eighth column of [BM, BN], [BM, 8]; no two units have a column in common.

    A wgmma accumulator has neighbouring pairs of columns in four threads: these sums need no
    exchange between threads.

    FP32: whether the columns are of fp32 queries and keys. Their products are not of wgmma, and
    threads have one term each of a sum.
    """
    if FP32:
        # Two threads add their terms, each to what it gets from the other one. Where terms are
        # products, each would fuse its own one with the sum, unrounded, and the other's would be
        # rounded: they would go on with different sums of the same row. A choice is not fused.
        b_x = tl.where(b_x == b_x, b_x, float("nan"))
    BM: tl.constexpr = b_x.shape[0]
    BN: tl.constexpr = b_x.shape[1]
    return tl.sum(tl.reshape(b_x, [BM, BN // 8, 8]), 1)


@triton.jit
def flag_units(b_part, units: tl.constexpr):
    """The units of a key tile that have a positive part or NaN, as bits, [BM / 16, 8, 4] int32.

    Of the sixteen rows that wgmma gives to a warp, those eight apart are in the same thread.
    """
    BM: tl.constexpr = b_part.shape[0]
    b_any = tl.sum(tl.reshape(b_part, [BM // 16, 2, 8, 8]), 1)
    o_bit = tl.arange(0, 8)[None, None, :] % units
    b_bits = (~(b_any <= 0.0)).to(tl.int32) << o_bit
    return tl.sum(tl.reshape(b_bits, [BM // 16, 8, 4, 2]), 3)


@triton.jit
def moments(rows, b_z, b_tau, b_margin, ORDER: tl.constexpr):
    """Of x = max(z - tau, 0): its sums of x ** b, NaN for a NaN, and of x ** (b - 1), and for b = 2
    how many z are not below tau - margin, [BM, 8] each as `partial_sums`, and `flag_units` of it.

    b_margin: [BM], zero unless b is 2 and queries are of two bytes; units that have a counted z are
        flagged. None where no z is counted, and units that have one above tau are flagged.
    """
    b_exponent = rows[3]
    fp32: tl.constexpr = rows[0].dtype == tl.float32
    # Above a margin x is added up with it, one instruction less than without.
    margin: tl.constexpr = ORDER == 2 and not fp32 and b_margin is not None
    if margin:
        b_y = b_z - (b_tau - b_margin)[:, None]
        b_x = tl.maximum(b_y, b_margin[:, None], propagate_nan=tl.PropagateNan.ALL)
    else:
        b_y = b_z - b_tau[:, None]
        b_x = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ORDER == 0:
        # Sums of powers up to 2 ** 80 are finite. Scores that are clipped have a lower threshold,
        # so that steps stay below the true one.
        b_most = tl.exp2(80.0 / b_exponent)[:, None]
        b_x = tl.minimum(b_x, b_most, propagate_nan=tl.PropagateNan.ALL)
    b_weight, b_power = weights_and_slopes(b_x, b_exponent[:, None], ORDER)
    b_weight, b_power = partial_sums(b_weight, fp32), partial_sums(b_power, fp32)
    # Powers of two are NaN for a NaN themselves.
    units: tl.constexpr = b_x.shape[1] // UNIT
    b_count = b_weight
    b_any = b_power if ORDER == 2 else b_weight + b_power
    if ORDER == 2:
        # A shift of the sign and a sum are one instruction.
        b_count = partial_sums(b_y.to(tl.int32, bitcast=True) >> 31, False)
        b_count = (b_count + b_x.shape[1] // 8).to(tl.float32)
    if margin:
        b_any = tl.where(b_power == b_power, b_count, b_power)
        # Without one, sums may be infinite.
        m_margin = b_margin[:, None] > 0.0
        b_all = b_margin[:, None] * (b_x.shape[1] // 8)
        b_much = b_margin[:, None] * (2.0 * b_power - b_all)
        b_weight = tl.where(m_margin, b_weight - b_much, b_weight)
        b_power = tl.where(m_margin, b_power - b_all, b_power)
    return b_weight, b_power, b_count, flag_units(b_any, units)


@triton.jit
def either(first, second):
    return first | second


@triton.jit
def any_flag(b_flags):
    """The bits that are set anywhere."""
    return tl.reduce(tl.reshape(b_flags, [b_flags.numel]), 0, either)
