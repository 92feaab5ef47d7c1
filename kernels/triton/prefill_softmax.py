"""Prefill of the heads of alpha = 1: one pass with a running maximum."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .prefill_tiles import (
    find_tile,
    key_tiles,
    load_rows,
    next_pages,
    row_offsets,
    score,
    tile_bounds,
    tile_keys,
    tile_offsets,
)


@triton.jit
def accumulate(b_z, b_maximum, b_total, b_acc, b_v):
    """Adds a key tile to sums that are relative to a maximum, which it may raise."""
    b_raised = tl.maximum(b_maximum, tl.max(b_z, 1))
    # Of a row that has seen no key yet, the maximum is -inf.
    b_base = tl.where(b_raised > -float("inf"), b_raised, 0.0)
    b_weight = tl.exp(b_z - b_base[:, None])
    b_shrink = tl.exp(b_maximum - b_base)
    b_total = b_total * b_shrink + tl.sum(b_weight, 1)
    b_acc *= b_shrink[:, None]
    b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_raised, b_total, b_acc


@triton.jit(
    do_not_specialize=["batch", "tiles", "window"],
    do_not_specialize_on_alignment=["p_block_table", "p_seq_lens", "p_query_start_loc"],
)
def prefill_softmax_kernel(
    p_query,  # [tokens, HKV * G, D]
    p_key,  # [pages, HKV, P, D]
    p_value,  # [pages, HKV, P, D]
    p_block_table,  # [batch, max_pages]
    p_seq_lens,  # [batch]
    p_query_start_loc,  # [batch + 1]
    p_alpha,  # [HKV * G] float64
    p_slopes,  # [HKV * G] float32
    p_out,  # [tokens, HKV * G, D]
    s_query_t, s_query_h, s_out_t, s_out_h, s_page, s_head, s_block_table,
    batch, tiles, window, scale, value_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one tile (see `prefill_tiles`), for those heads whose alpha is 1."""
    i_h = tl.program_id(1)
    o_r, o_d, o_n = tl.arange(0, BM), tl.arange(0, DP), tl.arange(0, BN)
    o_q = o_r // G
    o_head = i_h * G + o_r % G
    if ALPHA_PER_HEAD:
        b_alpha = tl.load(p_alpha + o_head)
        if tl.min(b_alpha, 0) > 1.0:
            return
    i_b, i_local = find_tile(p_query_start_loc, tiles - 1 - tl.program_id(0), batch, BQ)
    token, count, position, lowest = tile_bounds(
        p_query_start_loc, p_seq_lens, i_b, i_local, window, BQ, WINDOW
    )
    if count <= 0:
        return
    m_row = o_q < count
    if ALPHA_PER_HEAD:
        m_row &= b_alpha == 1.0
    b_scale = tl.zeros([BM], tl.float32) + scale
    b_slope = b_scale
    if ALIBI:
        b_slope = tl.load(p_slopes + o_head, mask=m_row, other=0.0)
    b_base = tl.zeros([BM], tl.float32)
    b_position = position + o_q
    m_q = m_row[:, None] & (o_d < D)[None, :]
    o_token = (token + o_q).to(tl.int64)
    o_query = (o_token * s_query_t + o_head * s_query_h)[:, None] + o_d[None, :]
    b_q = tl.load(p_query + o_query, mask=m_q, other=0.0)  # [BM, DP]
    rows = (b_q, b_scale, b_slope, b_scale, b_position, position, count, lowest, window)
    p_k = p_key + i_h.to(tl.int64) * s_head
    p_v = p_value + i_h.to(tl.int64) * s_head
    p_table = p_block_table + i_b.to(tl.int64) * s_block_table
    first, whole, after, stop = key_tiles(position, count, lowest, window, BN, WINDOW)

    b_maximum = tl.full([BM], -float("inf"), tl.float32)
    b_total, b_acc = tl.zeros([BM], tl.float32), tl.zeros([BM, DP], tl.float32)
    start, count_whole = whole * BN, after - whole
    b_next = next_pages(p_table, start, 0, count_whole, BN, P)
    for i_t in tl.range(0, count_whole, num_stages=STAGES):
        b_offset = tile_offsets(b_next, start, i_t, s_page, BN, D, P)
        # Loaded an iteration ahead: see `prefill_guess.add_sample`.
        b_next = next_pages(p_table, start, i_t + 1, count_whole, BN, P)
        o_key = start + tile_keys(i_t, BN)
        b_k = load_rows(p_k, b_offset, o_n, o_d, D, MASKED=False)
        b_v = load_rows(p_v, b_offset, o_n, o_d, D, MASKED=False)
        b_z = score(rows, b_base, b_k, o_key, ALIBI, WINDOW, MASKED=False)
        b_v = b_v.to(b_q.dtype)
        b_maximum, b_total, b_acc = accumulate(b_z, b_maximum, b_total, b_acc, b_v)
    for i_t in tl.range(first, stop - (after - whole), num_stages=1):
        o_key = tl.where(i_t < whole, i_t, i_t + after - whole) * BN + o_n
        m_key = (o_key >= lowest) & (o_key < position + count)
        b_offset = row_offsets(p_table, o_key, m_key, s_page, D, P)
        b_k = load_rows(p_k, b_offset, m_key, o_d, D, MASKED=True)
        b_v = load_rows(p_v, b_offset, m_key, o_d, D, MASKED=True)
        b_z = score(rows, b_base, b_k, o_key, ALIBI, WINDOW, MASKED=True)
        b_v = b_v.to(b_q.dtype)
        b_maximum, b_total, b_acc = accumulate(b_z, b_maximum, b_total, b_acc, b_v)

    o_out = (o_token * s_out_t + o_head * s_out_h)[:, None] + o_d[None, :]
    b_out = b_acc / tl.where(m_row, b_total, 1.0)[:, None] * value_scale
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q)
