"""The kernels of prefill: entmax heads by three phases over a tile's keys, softmax heads by one.

A tile is BQ neighbouring queries of one sequence with all G query heads of one KV head, packed
into BM rows, so that keys and values are read once for the group. Key tiles of BN positions that
every row sees whole need no masks; those at the diagonal and at the edge of the window do.

The threshold rises from a lower bound by Newton steps that never pass it (see `entmax`), so a key
tile that has no score above the bound has none above the threshold. The first pass reads all
keys, every later one only the key tiles that had such a score in the pass before.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import FP16_WEIGHT, head_parameters, newton_step, weigh_scores, weights_and_slopes

# Keys at the start of what a tile sees that the first lower bound is taken from; the others are
# its last ones.
FIRST_KEYS = tl.constexpr(32)
SEED_STEPS = tl.constexpr(4)
LEAST = tl.constexpr(-3e38)


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


@triton.jit
def keep_flagged(p_list, p_flags, count, BC: tl.constexpr):
    """Packs the entries of the list that have a flag to the front; returns how many they are."""
    o_c = tl.arange(0, BC)
    kept = count * 0
    # Flags and entries were stored by other threads.
    tl.debug_barrier()
    for i_c in tl.range(0, count, BC, num_stages=1):
        m_c = i_c + o_c < count
        m_kept = (tl.load(p_flags + i_c + o_c, mask=m_c, other=0) != 0).to(tl.int32)
        b_tile = tl.load(p_list + i_c + o_c, mask=m_c, other=0)
        tl.debug_barrier()
        tl.store(p_list + kept + tl.cumsum(m_kept, 0) - m_kept, b_tile, mask=m_kept > 0)
        kept += tl.sum(m_kept, 0)
    tl.debug_barrier()
    return kept


@triton.jit
def add_masked(
    rows, p_key, p_table, b_tau, first, whole, after, stop, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Moments of the key tiles that need masks, [BM] each."""
    b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, count, lowest, window = rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    b_mass, b_power = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for i_t in tl.range(first, stop - (after - whole), num_stages=1):
        o_key = tl.where(i_t < whole, i_t, i_t + after - whole) * BN + o_n
        m_key = (o_key >= lowest) & (o_key < position + count)
        b_page = load_pages(p_table, o_key, m_key, P)
        b_k = load_rows(p_key, b_page, o_key, m_key, o_d, s_page, D, P, MASKED=True)
        b_z = score(
            b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
            ALIBI, WINDOW, MASKED=True,
        )  # fmt: skip
        b_tile_mass, b_tile_power = moments(b_z, b_tau, b_exponent, ORDER)
        b_mass += b_tile_mass
        b_power += b_tile_power
    return b_mass, b_power


@triton.jit
def add_listed(
    rows, p_key, p_table, p_list, p_flags, b_tau, b_mass, b_power, listed, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the moments of the listed key tiles, and flags those with a score above the bound.

    The flag of an entry is a byte, the number of rows that have such a score; eight bytes go into
    one integer, so that rows meet only every eighth key tile.
    """
    b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, _count, _lowest, window = rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    b_flags = tl.zeros([BM], tl.int64)
    # What a load needs is loaded an iteration ahead: a load that waits for another one in the
    # same iteration would take the stages of the pipeline.
    next_tile = tl.load(p_list, mask=listed > 0, other=0)
    tile_after = tl.load(p_list + 1, mask=listed > 1, other=0)
    b_next = load_pages(p_table, next_tile * BN + o_n, o_n < listed * BN, P)
    for i_t in tl.range(0, listed, num_stages=STAGES):
        o_key, b_page = next_tile * BN + o_n, b_next
        # The value goes through an operation because a loop variable that is passed on as it is
        # silently turns the pipeline off (Triton 3.6).
        next_tile = tl.maximum(tile_after, 0)
        tile_after = tl.load(p_list + i_t + 2, mask=i_t + 2 < listed, other=0)
        m_next = o_n < (listed - i_t - 1) * BN
        b_next = load_pages(p_table, next_tile * BN + o_n, m_next, P)
        b_k = load_rows(p_key, b_page, o_key, m_next, o_d, s_page, D, P, MASKED=False)
        b_z = score(
            b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
            ALIBI, WINDOW, MASKED=False,
        )  # fmt: skip
        b_tile_mass, b_tile_power = moments(b_z, b_tau, b_exponent, ORDER)
        b_mass += b_tile_mass
        b_power += b_tile_power
        m_flag = (b_tile_power > 0.0) | (b_tile_mass != b_tile_mass)
        b_flags |= m_flag.to(tl.int64) << (i_t % 8 * 8)
        complete = (i_t % 8 == 7) | (i_t == listed - 1)
        if complete:
            tl.store(p_flags + i_t // 8, tl.sum(b_flags, 0))
        b_flags = tl.where(complete, 0, b_flags)
    return b_mass, b_power


@triton.jit
def weigh_values(b_z, b_tau, b_exponent, b_v, b_total, b_acc, ORDER: tl.constexpr):
    b_weight = weigh_scores(b_z, b_tau[:, None], b_exponent[:, None], ORDER)
    if b_v.dtype == tl.float16:
        b_weight *= FP16_WEIGHT
    b_total += tl.sum(b_weight, 1)
    return b_total, tl.dot(b_weight.to(b_v.dtype), b_v, b_acc, input_precision="ieee")


@triton.jit
def attend_masked(
    rows, p_key, p_value, p_table, b_tau, first, whole, after, stop, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Sums of weights [BM] and of weighted values [BM, DP] of the key tiles that need masks."""
    b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, count, lowest, window = rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    b_total, b_acc = tl.zeros([BM], tl.float32), tl.zeros([BM, DP], tl.float32)
    for i_t in tl.range(first, stop - (after - whole), num_stages=1):
        o_key = tl.where(i_t < whole, i_t, i_t + after - whole) * BN + o_n
        # Slots that hold no token of the sequence may hold anything, even NaN.
        m_key = (o_key >= lowest) & (o_key < position + count)
        b_page = load_pages(p_table, o_key, m_key, P)
        b_k = load_rows(p_key, b_page, o_key, m_key, o_d, s_page, D, P, MASKED=True)
        b_v = load_rows(p_value, b_page, o_key, m_key, o_d, s_page, D, P, MASKED=True)
        b_z = score(
            b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
            ALIBI, WINDOW, MASKED=True,
        )  # fmt: skip
        b_v = b_v.to(b_q.dtype)
        b_total, b_acc = weigh_values(b_z, b_tau, b_exponent, b_v, b_total, b_acc, ORDER)
    return b_total, b_acc


@triton.jit
def attend_listed(
    rows, p_key, p_value, p_table, p_list, b_tau, b_total, b_acc, listed, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds those of the listed key tiles; the loads as in `add_listed`."""
    b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, _count, _lowest, window = rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    next_tile = tl.load(p_list, mask=listed > 0, other=0)
    tile_after = tl.load(p_list + 1, mask=listed > 1, other=0)
    b_next = load_pages(p_table, next_tile * BN + o_n, o_n < listed * BN, P)
    for i_t in tl.range(0, listed, num_stages=STAGES):
        o_key, b_page = next_tile * BN + o_n, b_next
        # The value goes through an operation because a loop variable that is passed on as it is
        # silently turns the pipeline off (Triton 3.6).
        next_tile = tl.maximum(tile_after, 0)
        tile_after = tl.load(p_list + i_t + 2, mask=i_t + 2 < listed, other=0)
        m_next = o_n < (listed - i_t - 1) * BN
        b_next = load_pages(p_table, next_tile * BN + o_n, m_next, P)
        b_k = load_rows(p_key, b_page, o_key, m_next, o_d, s_page, D, P, MASKED=False)
        b_v = load_rows(p_value, b_page, o_key, m_next, o_d, s_page, D, P, MASKED=False)
        b_z = score(
            b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
            ALIBI, WINDOW, MASKED=False,
        )  # fmt: skip
        b_v = b_v.to(b_q.dtype)
        b_total, b_acc = weigh_values(b_z, b_tau, b_exponent, b_v, b_total, b_acc, ORDER)
    return b_total, b_acc


@triton.jit
def seed_threshold(
    rows, p_key, p_table, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A lower bound of the threshold of each row, from BM of the keys, and the base that it and
    all later scores are less than, [BM] each.

    They are the first keys and the last ones that the tile sees; with at most BM queries in a tile,
    every row sees one of them. The base is the largest score of the first BN of them.
    """
    b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, count, lowest, window = rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    recent = tl.maximum(position + count - BM, lowest)
    b_tau = tl.full([BM], -float("inf"), tl.float32)
    # The first tile twice: its scores are to be less the base in one rounding, as all later ones.
    for i in tl.range(-BN, BM, BN, num_stages=1):
        i_s = tl.maximum(i, 0)
        o_key = tl.where(i_s + o_n < FIRST_KEYS, lowest, recent) + i_s + o_n
        m_key = o_key < position + count
        b_page = load_pages(p_table, o_key, m_key, P)
        b_k = load_rows(p_key, b_page, o_key, m_key, o_d, s_page, D, P, MASKED=True)
        b_z = score(
            b_q, b_k, b_scale, b_base, b_slope, b_position, o_key, position, window,
            ALIBI, WINDOW, MASKED=True,
        )  # fmt: skip
        if i < 0:
            b_peak = tl.max(b_z, 1)
            b_base = tl.where(b_peak > -float("inf"), b_peak, 0.0)
        else:
            b_tau = tl.maximum(b_tau, tl.max(b_z, 1) - 1.0)
            for _ in range(SEED_STEPS):
                # No finite bound and no visible key make NaN of their difference.
                b_mass, b_power = moments(b_z, tl.maximum(b_tau, LEAST), b_exponent, ORDER)
                b_tau += newton_step(b_mass, b_power, 1.0, b_exponent, ORDER)
    return b_tau, b_base


@triton.jit(
    do_not_specialize=["batch", "tiles", "list_stride", "window"],
    do_not_specialize_on_alignment=["p_block_table", "p_seq_lens", "p_query_start_loc"],
)
def prefill_entmax_kernel(
    p_query,  # [tokens, HKV * G, D]
    p_key,  # [pages, HKV, P, D]
    p_value,  # [pages, HKV, P, D]
    p_block_table,  # [batch, max_pages]
    p_seq_lens,  # [batch]
    p_query_start_loc,  # [batch + 1]
    p_alpha,  # [HKV * G] float64
    p_slopes,  # [HKV * G] float32
    p_out,  # [tokens, HKV * G, D]
    p_ticket,  # [1] int32, zero
    p_lists,  # [programs, list_stride] int32
    p_flags,  # [programs, list_stride] uint8
    s_query_t, s_query_h, s_out_t, s_out_h, s_page, s_head, s_block_table,
    batch, tiles, list_stride, window, scale, factor, exponent, excess_mass, value_scale,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    ORDER: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, VALUE_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of all heads of alpha > 1. A program takes one (tile, KV head) after the other.

    Programs that run together have the same KV head, whose keys stay in L2; late tiles, which
    see the most keys, go first.
    """
    o_r, o_d, o_c = tl.arange(0, BM), tl.arange(0, DP), tl.arange(0, BC)
    p_list = p_lists + tl.program_id(0).to(tl.int64) * list_stride
    p_flag = p_flags + tl.program_id(0).to(tl.int64) * list_stride
    item = tl.atomic_add(p_ticket, 1, sem="relaxed")
    while item < tiles * HKV:
        i_h = item // tiles
        i_b, i_local = find_tile(p_query_start_loc, tiles - 1 - item % tiles, batch, BQ)
        token, count, position, lowest = tile_bounds(
            p_query_start_loc, p_seq_lens, i_b, i_local, window, BQ, WINDOW
        )
        if count > 0:
            o_q = o_r // G
            o_head = i_h * G + o_r % G
            m_row = o_q < count
            b_factor, b_exponent = head_parameters(
                p_alpha, factor, exponent, o_head, m_row, ALPHA_PER_HEAD
            )
            if ALPHA_PER_HEAD:
                m_row &= tl.load(p_alpha + o_head, mask=m_row, other=1.0) > 1.0
            b_slope = b_factor
            if ALIBI:
                b_slope = tl.load(p_slopes + o_head, mask=m_row, other=0.0) * b_factor
            m_q = m_row[:, None] & (o_d < D)[None, :]
            o_token = (token + o_q).to(tl.int64)
            o_query = (o_token * s_query_t + o_head * s_query_h)[:, None] + o_d[None, :]
            b_q = tl.load(p_query + o_query, mask=m_q, other=0.0)  # [BM, DP]
            p_k = p_key + i_h.to(tl.int64) * s_head
            p_v = p_value + i_h.to(tl.int64) * s_head
            p_table = p_block_table + i_b.to(tl.int64) * s_block_table
            b_scale, b_position = b_factor * scale, position + o_q
            rows = (
                b_q, b_scale, tl.zeros([BM], tl.float32), b_slope, b_exponent, b_position,
                position, count, lowest, window,
            )  # fmt: skip
            b_tau, b_base = seed_threshold(
                rows, p_k, p_table, s_page, D, DP, P, BM, BN, ORDER, ALIBI, WINDOW
            )
            rows = (
                b_q, b_scale, b_base, b_slope, b_exponent, b_position, position, count, lowest,
                window,
            )  # fmt: skip
            b_tau = tl.where(m_row, b_tau, float("inf"))

            first, whole, after, stop = key_tiles(position, count, lowest, window, BN, WINDOW)
            listed = after - whole
            for i_c in range(0, listed, BC):
                tl.store(p_list + i_c + o_c, whole + i_c + o_c, mask=i_c + o_c < listed)
            tl.debug_barrier()
            unfinished = 1
            while unfinished > 0:
                b_mass, b_power = add_masked(
                    rows, p_k, p_table, b_tau, first, whole, after, stop, s_page,
                    D, DP, P, BM, BN, ORDER, ALIBI, WINDOW,
                )  # fmt: skip
                b_mass, b_power = add_listed(
                    rows, p_k, p_table, p_list, p_flag.to(tl.pointer_type(tl.int64)), b_tau,
                    b_mass, b_power, listed, s_page,
                    D, DP, P, BM, BN, ORDER, ALIBI, WINDOW, STAGES,
                )  # fmt: skip
                b_raised = b_tau + newton_step(b_mass, b_power, 1.0, b_exponent, ORDER)
                m_unfinished = (b_mass > 1.0 + excess_mass) & (b_raised > b_tau)
                unfinished = tl.max(m_unfinished.to(tl.int32), 0)
                b_tau = b_raised
                listed = keep_flagged(p_list, p_flag, listed, BC)

            b_total, b_acc = attend_masked(
                rows, p_k, p_v, p_table, b_tau, first, whole, after, stop, s_page,
                D, DP, P, BM, BN, ORDER, ALIBI, WINDOW,
            )  # fmt: skip
            b_total, b_acc = attend_listed(
                rows, p_k, p_v, p_table, p_list, b_tau, b_total, b_acc, listed, s_page,
                D, DP, P, BN, ORDER, ALIBI, WINDOW, VALUE_STAGES,
            )  # fmt: skip
            o_out = (o_token * s_out_t + o_head * s_out_h)[:, None] + o_d[None, :]
            b_out = b_acc / tl.where(m_row, b_total, 1.0)[:, None] * value_scale
            tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q)
        # The list is the next tile's now.
        tl.debug_barrier()
        item = tl.atomic_add(p_ticket, 1, sem="relaxed")
