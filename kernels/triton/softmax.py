"""Softmax decoding, for heads of alpha = 1: one pass over keys and values, split and combined."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .certificate import (
    BOUNDED,
    load_last_span,
    load_query,
    load_unread,
    own_rounding,
    place_last_scales,
    store_certificate,
    sum_unread,
    take_bounds,
)
from .counters import SUPPORT, count_step
from .pages import ranked_pages
from .scores import load_pages, load_queries, load_rows, page_source, score_rows
from .values import weighted_columns


@triton.jit
def softmax_kernel(
    p_query, p_key, p_value, p_block_table, p_listed, p_listed_count, p_seq_lens, p_alpha,
    p_slopes, p_maximum, p_partial, p_total, p_support, p_bound,
    s_query_b, s_query_h, s_head, s_block_table, list_stride, page_stride, window, scale,
    s_page: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    CERTIFY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weighted values, their weights' sum and the largest score of one split, and how many keys
    it has."""
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    o_n, o_d, o_g = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, GP)
    m_g = o_g < G
    o_head = i_h * G + o_g
    if ALPHA_PER_HEAD:
        b_alpha = tl.load(p_alpha + o_head, mask=m_g, other=2.0)
        if tl.min(b_alpha, 0) > 1.0:
            return
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    p_pages, first, entries = page_source(
        p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table, list_stride,
        P, WINDOW, LISTED,
    )  # fmt: skip
    b_scale = tl.zeros([GP], tl.float32) + scale
    b_slope = b_scale
    if ALIBI:
        b_slope = tl.load(p_slopes + o_head, mask=m_g, other=0.0)
    b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
    p_k = p_key + i_h.to(tl.int64) * s_head
    p_v = p_value + i_h.to(tl.int64) * s_head
    b_maximum = tl.full([GP], -float("inf"), tl.float32)
    b_total = tl.zeros([GP], tl.float32)
    b_visible = tl.zeros([GP], tl.int32)
    b_acc = tl.zeros([DP, GP], tl.float32)
    PAGES: tl.constexpr = BN // P
    tiles = (entries + PAGES - 1) // PAGES
    b_next, b_next_logical = load_pages(
        p_pages, i_s * PAGES + o_n // P, first, entries, list_stride, LISTED
    )
    for i_t in tl.range(i_s, tiles, S, num_stages=STAGES):
        b_page, b_logical = b_next, b_next_logical
        b_next, b_next_logical = load_pages(
            p_pages, (i_t + S) * PAGES + o_n // P, first, entries, list_stride, LISTED
        )
        b_k = load_rows(p_k, b_page, o_n, o_d, s_page, D, P)  # [BN, DP]
        b_z = score_rows(
            b_k, b_q, b_logical, o_n, n, window, b_scale, b_slope, P, WINDOW, ALIBI
        )  # [BN, GP]
        if CERTIFY == BOUNDED:
            take_bounds(p_bound, b_logical, o_n, i_row, n, page_stride, G, P)
        b_raised = tl.maximum(b_maximum, tl.max(b_z, 0))
        b_weight = tl.exp(b_z - b_raised[None, :])
        b_shrink = tl.exp(b_maximum - b_raised)
        b_maximum = b_raised
        b_total = b_total * b_shrink + tl.sum(b_weight, 0)
        m_visible = b_z > -float("inf")
        b_visible += tl.sum(m_visible.to(tl.int32), 0)
        # Slots that hold no token of the sequence may hold anything, even NaN.
        m_v = (b_logical * P + o_n % P < n)[:, None] & (o_d < D)[None, :]
        o_v = b_page.to(tl.int64) * s_page + (o_n % P) * D
        b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_v, other=0.0)  # [BN, DP]
        b_acc = weighted_columns(b_weight, b_v.to(b_q.dtype), b_acc * b_shrink[None, :])
    o_own = (i_row * S + i_s).to(tl.int64) * G + o_g
    tl.store(p_maximum + o_own, b_maximum, mask=m_g)
    tl.store(p_support + o_own, b_visible, mask=m_g)
    o_split = (i_row * G + o_g).to(tl.int64) * S + i_s
    tl.store(p_total + o_split, b_total, mask=m_g)
    tl.store(
        p_partial + o_split[None, :] * D + o_d[:, None],
        b_acc,
        mask=m_g[None, :] & (o_d < D)[:, None],
    )


@triton.jit
def softmax_combine_kernel(
    p_seq_lens, p_alpha, p_maximum, p_partial, p_total, p_support, p_out, p_counters,
    p_exact_rows, p_listed_count, p_certificate, p_bound, p_span, p_unread_mass, p_query,
    p_slopes, p_block_table, p_scales,
    s_out_b, s_out_h, s_query_b, s_query_h, s_block_table, s_scales_page, s_scales_head, window,
    exact_below, scale, value_scale, page_stride, s_certificate,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr,
    ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr, PS: tl.constexpr, PSP: tl.constexpr,
    BC: tl.constexpr, BU: tl.constexpr, EXACT_ROWS: tl.constexpr, CERTIFY: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one query head in their order."""
    i_hq, i_b = tl.program_id(0), tl.program_id(1)
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    if ALPHA_PER_HEAD:
        if tl.load(p_alpha + i_hq) > 1.0:
            return
    elif COUNT and i_hq == 0:
        count_step(p_counters, n, window, HKV, G, P, WINDOW, LISTED)
    i_head = (i_b * HKV * G + i_hq).to(tl.int64)
    i_row = i_b * HKV + i_hq // G
    o_s, o_d = tl.arange(0, SP), tl.arange(0, DP)
    m_s, m_d = o_s < S, o_d < D
    o_own = (i_row * S + o_s).to(tl.int64) * G + i_hq % G
    b_maximum = tl.load(p_maximum + o_own, mask=m_s, other=-float("inf"))
    peak = tl.max(b_maximum, 0)
    b_share = tl.exp(b_maximum - tl.where(peak > -float("inf"), peak, 0.0))
    m_partial = m_s[:, None] & m_d[None, :]
    p_p = p_partial + (i_head * S + o_s)[:, None] * D + o_d[None, :]
    b_out = tl.sum(tl.load(p_p, mask=m_partial, other=0.0) * b_share[:, None], 0)  # [DP]
    total = tl.sum(tl.load(p_total + i_head * S + o_s, mask=m_s, other=0.0) * b_share, 0)
    b_out = tl.where(n > 0, b_out / tl.where(n > 0, total, 1.0) * value_scale, 0.0)
    p_o = p_out + i_b.to(tl.int64) * s_out_b + i_hq * s_out_h + o_d
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_d)
    if COUNT:
        support = tl.sum(tl.load(p_support + o_own, mask=m_s, other=0), 0)
        if n > 0:
            tl.atomic_add(p_counters + SUPPORT, support.to(tl.int64), sem="relaxed")
    if CERTIFY > 0:
        _, ranked = ranked_pages(p_seq_lens, p_exact_rows, i_b, exact_below, P, EXACT_ROWS)
        rounding = 0.0, 0.0
        if CERTIFY == BOUNDED:
            parts = load_query(p_query, i_b, i_hq, s_query_b, s_query_h, D, DP)
            slope = tl.load(p_slopes + i_hq) if ALIBI else 0.0
            rounding = own_rounding(parts, scale, slope, n, D, DP, ALIBI)
        unread, spans, b_bound = load_unread(
            p_listed_count, p_bound, p_span, i_row, i_row * G + i_hq % G, 0, n, ranked,
            page_stride, P, PS, PSP, BC, LISTED, CERTIFY,
        )  # fmt: skip
        if CERTIFY == BOUNDED:
            p_last = place_last_scales(
                p_block_table, p_scales, i_b, i_hq // G, ranked, s_block_table, s_scales_page,
                s_scales_head,
            )  # fmt: skip
            spans = spans[0], load_last_span(p_last, ranked)
        bound, complete = sum_unread(
            p_bound, p_unread_mass, unread, spans, rounding, b_bound, i_row * G + i_hq % G, 0,
            ranked, tl.log(total), peak, 1.0, page_stride, P, BC, BU, 1, CERTIFY, 1, True,
        )  # fmt: skip
        store_certificate(
            p_certificate, p_counters, bound, complete, i_b, i_hq, n, s_certificate, COUNT
        )
