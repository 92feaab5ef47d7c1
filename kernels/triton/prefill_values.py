"""The second kernel of entmax prefill: values, weighted by the scores above the thresholds."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import FP16_WEIGHT, weigh_scores
from .prefill_lists import (
    keep_flagged,
    listed_rows,
    masked_keys,
    masked_scores,
    masked_units,
    next_rows,
)
from .prefill_tiles import (
    UNIT,
    heads_in_turn,
    key_tiles,
    load_rows,
    load_tile,
    partial_sums,
    score,
    tile_of,
)


@triton.jit
def weigh_values(b_z, b_tau, b_exponent, b_v, b_total, b_acc, ORDER: tl.constexpr):
    b_weight = weigh_scores(b_z, b_tau[:, None], b_exponent[:, None], ORDER)
    if b_v.dtype == tl.float16:
        b_weight *= FP16_WEIGHT
    b_total += partial_sums(b_weight, b_v.dtype == tl.float32)
    return b_total, tl.dot(b_weight.to(b_v.dtype), b_v, b_acc, input_precision="ieee")


@triton.jit
def attend_masked(
    rows, b_base, p_key, p_value, p_table, edges, b_tau, b_total, b_acc, s_page,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds the sums of weights [BM, 8] and of weighted values [BM, DP] of the key tiles that
    need masks."""
    b_q, b_exponent = rows[0], rows[3]
    for i_t in tl.range(0, tl.cdiv(masked_units(edges), BN // UNIT), num_stages=1):
        o_key, m_key = masked_keys(rows, edges, i_t, BN)
        b_z, b_offset = masked_scores(
            rows, b_base, p_key, p_table, o_key, m_key, s_page, D, DP, P, ALIBI, WINDOW
        )
        b_v = load_rows(p_value, b_offset, m_key, tl.arange(0, DP), D, MASKED=True).to(b_q.dtype)
        b_total, b_acc = weigh_values(b_z, b_tau, b_exponent, b_v, b_total, b_acc, ORDER)
    return b_total, b_acc


@triton.jit
def attend_listed(
    rows, b_base, p_key, p_value, lists, b_tau, b_total, b_acc, count,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    ORDER: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds those of the first `count` listed key tiles; the loads as in
    `prefill_guess.add_sample`."""
    b_q, b_exponent = rows[0], rows[3]
    o_n, o_d = tl.arange(0, BN), tl.arange(0, DP)
    b_next, o_next = next_rows(lists, 0, count, BN, ALIBI)
    for i_t in tl.range(0, count, num_stages=STAGES):
        b_offset, o_key = listed_rows(b_next, o_next, BN, D)
        b_next, o_next = next_rows(lists, i_t + 1, count, BN, ALIBI)
        b_k = load_rows(p_key, b_offset, o_n, o_d, D, MASKED=False)
        b_v = load_rows(p_value, b_offset, o_n, o_d, D, MASKED=False)
        b_z = score(rows, b_base, b_k, o_key, ALIBI, WINDOW, MASKED=False)
        b_v = b_v.to(b_q.dtype)
        b_total, b_acc = weigh_values(b_z, b_tau, b_exponent, b_v, b_total, b_acc, ORDER)
    return b_total, b_acc


@triton.jit(
    do_not_specialize=["batch", "first_tile", "slab", "s_words", "s_list", "window"],
    do_not_specialize_on_alignment=["p_block_table", "p_seq_lens", "p_query_start_loc"],
)
def prefill_values_kernel(
    p_query,  # [tokens, HKV * G, D]
    p_key,  # [pages, HKV, P, D]
    p_value,  # [pages, HKV, P, D]
    p_block_table,  # [batch, max_pages]
    p_seq_lens,  # [batch]
    p_query_start_loc,  # [batch + 1]
    p_alpha,  # [HKV * G] float64
    p_slopes,  # [HKV * G] float32
    p_out,  # [tokens, HKV * G, D]
    p_tickets,  # [2] int32, the second one zero
    p_tau,  # [HKV, slab, BM] float32
    p_base,  # [HKV, slab, BM] float32, for fp32
    p_words,  # [HKV, slab, s_words] int32
    p_units,  # [programs, s_list] int32
    p_offsets,  # [programs, s_list] int64
    s_query_t, s_query_h, s_out_t, s_out_h, s_page, s_head, s_block_table, s_words, s_list,
    batch, first_tile, slab, window, scale, factor, exponent, value_scale,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FLAGGED_BN: tl.constexpr,
    BC: tl.constexpr, ORDER: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, ALIBI: tl.constexpr,
    WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of all heads of alpha > 1, tile by tile as in `prefill_thresholds_kernel`."""
    o_d = tl.arange(0, DP)
    i_p = tl.program_id(0).to(tl.int64)
    lists = p_units + i_p * s_list, p_offsets + i_p * s_list
    together = heads_in_turn(p_key, p_seq_lens, batch, HKV, D)
    item = tl.atomic_add(p_tickets + 1, 1, sem="relaxed")
    while item < slab * HKV:
        i_h, i_slab = tile_of(item, slab, together)
        i_b, count, token, o_q, o_head, m_row, rows = load_tile(
            p_query, p_alpha, p_slopes, p_query_start_loc, p_seq_lens, i_h, first_tile + i_slab,
            s_query_t, s_query_h, batch, window, scale, factor, exponent,
            G, D, DP, BQ, BM, ALPHA_PER_HEAD, ALIBI, WINDOW,
        )  # fmt: skip
        if count > 0:
            position, lowest = rows[5], rows[7]
            p_k = p_key + i_h.to(tl.int64) * s_head
            p_v = p_value + i_h.to(tl.int64) * s_head
            p_table = p_block_table + i_b.to(tl.int64) * s_block_table
            o_row = (i_h * slab + i_slab).to(tl.int64) * BM + tl.arange(0, BM)
            p_word = p_words + (i_h * slab + i_slab).to(tl.int64) * s_words
            b_tau = tl.load(p_tau + o_row)
            b_base = tl.zeros([BM], tl.float32)
            if rows[0].dtype == tl.float32:
                b_base = tl.load(p_base + o_row)
            _first, whole, after, _stop = key_tiles(
                position, count, lowest, window, FLAGGED_BN, WINDOW
            )
            start = whole * (FLAGGED_BN // UNIT)
            units = (after - whole) * (FLAGGED_BN // UNIT)
            edges = lowest // UNIT, start, start + units, (position + count - 1) // UNIT + 1
            # They fill key tiles as they are.
            kept = keep_flagged(lists, p_word, p_table, start, units, s_page, 1, D, P, BC, True)
            b_total, b_acc = tl.zeros([BM, 8], tl.float32), tl.zeros([BM, DP], tl.float32)
            b_total, b_acc = attend_masked(
                rows, b_base, p_k, p_v, p_table, edges, b_tau, b_total, b_acc,
                s_page, D, DP, P, BN, ORDER, ALIBI, WINDOW,
            )  # fmt: skip
            b_total, b_acc = attend_listed(
                rows, b_base, p_k, p_v, lists, b_tau, b_total, b_acc, kept // (BN // UNIT),
                D, DP, BN, ORDER, ALIBI, WINDOW, STAGES,
            )  # fmt: skip
            o_out = (token + o_q).to(tl.int64) * s_out_t + o_head * s_out_h
            b_out = b_acc / tl.where(m_row, tl.sum(b_total, 1), 1.0)[:, None] * value_scale
            tl.store(
                p_out + o_out[:, None] + o_d[None, :],
                b_out.to(p_out.dtype.element_ty),
                mask=m_row[:, None] & (o_d < D)[None, :],
            )
        # The list is the next tile's now.
        tl.debug_barrier()
        item = tl.atomic_add(p_tickets + 1, 1, sem="relaxed")
