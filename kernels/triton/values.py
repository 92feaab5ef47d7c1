"""Weighing values by the entmax weights, and adding up the splits of a sequence."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..report import Counter
from .entmax import head_parameters, weigh_scores
from .scores import load_pages, load_queries, load_rows, load_scales, page_source, score_rows
from .threshold import PASSES, group_failed, narrow_bracket

STEPS = tl.constexpr(int(Counter.STEPS))
PAGES_HELD = tl.constexpr(int(Counter.PAGES_HELD))
PAGES_READ = tl.constexpr(int(Counter.PAGES_READ))
SUPPORT = tl.constexpr(int(Counter.SUPPORT))
QUERY_HEADS = tl.constexpr(int(Counter.QUERY_HEADS))


@triton.jit
def weighted_sum(b_weight, b_v, b_acc):
    """b_acc [GA, DP] + b_weight [GA, BN] @ b_v [BN, DP], keeping weights beyond the precision of
    the values: their rounding errors go into a second product."""
    if b_v.dtype == tl.float32:
        return tl.dot(b_weight, b_v, b_acc, input_precision="ieee")
    else:
        b_coarse = b_weight.to(b_v.dtype)
        b_acc = tl.dot(b_coarse, b_v, b_acc)
        return tl.dot((b_weight - b_coarse.to(tl.float32)).to(b_v.dtype), b_v, b_acc)


@triton.jit
def keep_support(
    p_slot, p_score, b_tau, b_exponent, count, capacity,
    G: tl.constexpr, GC: tl.constexpr, BC: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Packs the candidates of positive weight to the front, scores becoming weights, in place.

    Returns how many there are, and each head's support [GC].
    """
    o_g, o_c = tl.arange(0, GC), tl.arange(0, BC)
    m_g = (o_g < G)[:, None]
    b_support = tl.zeros([GC], tl.int32)
    kept = 0
    for i_c in tl.range(0, count, BC, num_stages=1):
        o_i = i_c + o_c
        m_i = o_i < count
        p_z = p_score + o_g[:, None] * capacity
        b_z = tl.load(p_z + o_i[None, :], mask=m_g & m_i[None, :], other=-float("inf"))
        b_slot = tl.load(p_slot + o_i, mask=m_i, other=0)
        b_weight = weigh_scores(b_z, b_tau[:, None], b_exponent[:, None], ORDER)
        m_support = (b_weight != 0.0).to(tl.int32)
        b_support += tl.sum(m_support, 1)
        m_kept = tl.max(m_support, 0)
        position = kept + tl.cumsum(m_kept, 0) - m_kept
        # Positions up to those read in this iteration are overwritten.
        tl.debug_barrier()
        tl.store(p_slot + position, b_slot, mask=m_kept > 0)
        tl.store(p_z + position[None, :], b_weight, mask=m_g & (m_kept > 0)[None, :])
        kept += tl.sum(m_kept, 0)
    return kept, b_support


@triton.jit
def values_kernel(
    p_query, p_key, p_value, p_block_table, p_listed, p_listed_count, p_seq_lens, p_alpha, p_slopes,
    p_slot, p_score, p_count, p_tau, p_failed, p_bracket, p_mass, p_partial, p_total, p_support,
    s_query_b, s_query_h, s_page, s_head, s_block_table, list_stride, window, capacity,
    scale, factor, exponent,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GC: tl.constexpr, GA: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, GUESSED: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr, ALIBI: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """The part of the output, of the sum of weights and of the support that one split has.

    Candidates are first reduced to the support, then their values gathered densely. A row whose
    lists failed is read again: its keys for the weights, and the values that have any.
    """
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_b * HKV + i_h
    own = (i_row * S + i_s).to(tl.int64)
    o_a, o_d, o_n = tl.arange(0, GA), tl.arange(0, DP), tl.arange(0, BN)
    o_c = tl.arange(0, GC)
    p_v = p_value + i_h.to(tl.int64) * s_head
    b_acc = tl.zeros([GA, DP], tl.float32)
    b_total = tl.zeros([GA], tl.float32)
    failed = 0
    if GUESSED:
        failed = group_failed(p_failed, i_row, G, GP).to(tl.int32)
    if failed == 0:
        _, b_exponent = head_parameters(
            p_alpha, factor, exponent, i_h * G + o_c, o_c < G, ALPHA_PER_HEAD
        )
        b_tau = tl.load(p_tau + i_row * G + o_c, mask=o_c < G, other=float("inf"))
        count = tl.load(p_count + own)
        p_s, p_z = p_slot + own * capacity, p_score + own * G * capacity
        kept, b_support = keep_support(p_s, p_z, b_tau, b_exponent, count, capacity, G, GC, BC,
                                       ORDER)  # fmt: skip
        tl.store(p_support + own * G + o_c, b_support, mask=o_c < G)
        # What the program's other threads wrote is read below.
        tl.debug_barrier()
        m_a = (o_a < G)[:, None]
        p_z += o_a[:, None] * capacity
        b_next = tl.load(p_s + o_n, mask=o_n < kept, other=0)
        b_next_weight = tl.load(p_z + o_n[None, :], mask=m_a & (o_n < kept)[None, :], other=0.0)
        for i_n in tl.range(0, kept, BN, num_stages=STAGES):
            b_slot, b_weight = b_next, b_next_weight
            o_i = i_n + BN + o_n
            m_i = o_i < kept
            b_next = tl.load(p_s + o_i, mask=m_i, other=0)
            b_next_weight = tl.load(p_z + o_i[None, :], mask=m_a & m_i[None, :], other=0.0)
            o_v = (b_slot // P).to(tl.int64) * s_page + (b_slot % P) * D
            m_v = (i_n + o_n < kept)[:, None] & (o_d < D)[None, :]
            b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_v, other=0.0)  # [BN, DP]
            b_acc = weighted_sum(b_weight, b_v, b_acc)
            b_total += tl.sum(b_weight, 1)
    if GUESSED and failed != 0:
        n = tl.load(p_seq_lens + i_b).to(tl.int32)
        p_pages, first, entries = page_source(
            p_block_table, p_listed, p_listed_count, i_b, i_row, n, window, s_block_table,
            list_stride, P, WINDOW, LISTED,
        )  # fmt: skip
        o_g = tl.arange(0, GP)
        m_g = o_g < G
        b_scale, b_slope, b_exponent = load_scales(
            p_alpha, p_slopes, i_h, o_g, scale, factor, exponent, G, ALIBI, ALPHA_PER_HEAD
        )
        b_tau, _ = narrow_bracket(
            p_bracket, p_mass, PASSES - 1, tl.num_programs(2) * HKV, i_row, b_exponent,
            GP, S, ORDER,
        )  # fmt: skip
        b_tau = tl.where(m_g, b_tau, float("inf"))
        b_q = load_queries(p_query, i_b, i_h, o_g, o_d, s_query_b, s_query_h, G, D)  # [DP, GP]
        p_k = p_key + i_h.to(tl.int64) * s_head
        b_support = tl.zeros([GP], tl.int32)
        b_sum = tl.zeros([GP], tl.float32)
        # The accumulator of this branch has the group in columns, padded to 16 at most.
        b_columns = tl.zeros([DP, GP], tl.float32)
        PAGES: tl.constexpr = BN // P
        for i_t in tl.range(i_s, (entries + PAGES - 1) // PAGES, S, num_stages=1):
            o_entry = i_t * PAGES + o_n // P
            b_page, b_logical = load_pages(p_pages, o_entry, first, entries, list_stride, LISTED)
            b_k = load_rows(p_k, b_page, o_n, o_d, s_page, D, P)  # [BN, DP]
            b_z = score_rows(
                b_k, b_q, b_logical, o_n, n, window, b_scale, b_slope, P, WINDOW, ALIBI
            )  # [BN, GP]
            b_w = weigh_scores(b_z, b_tau[None, :], b_exponent[None, :], ORDER)
            m_support = (b_w != 0.0).to(tl.int32)
            b_support += tl.sum(m_support, 0)
            b_sum += tl.sum(b_w, 0)
            m_n = tl.max(m_support, 1) > 0
            o_v = b_page.to(tl.int64) * s_page + (o_n % P) * D
            m_v = m_n[:, None] & (o_d < D)[None, :]
            b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_v, other=0.0)
            b_columns = weighted_columns(b_w, b_v, b_columns)
        tl.store(p_support + own * G + o_g, b_support, mask=m_g)
        o_head64 = (i_row * G + o_g).to(tl.int64)
        tl.store(p_total + o_head64 * S + i_s, b_sum, mask=m_g)
        tl.store(
            p_partial + (o_head64 * S + i_s)[None, :] * D + o_d[:, None],
            b_columns,
            mask=m_g[None, :] & (o_d < D)[:, None],
        )
    if failed == 0:
        o_head64 = (i_row * G + o_a).to(tl.int64)
        tl.store(p_total + o_head64 * S + i_s, b_total, mask=o_a < G)
        tl.store(
            p_partial + (o_head64 * S + i_s)[:, None] * D + o_d[None, :],
            b_acc,
            mask=(o_a < G)[:, None] & (o_d < D)[None, :],
        )


@triton.jit
def weighted_columns(b_weight, b_v, b_acc):
    """b_acc [DP, GP] + b_v [BN, DP] transposed @ b_weight [BN, GP], as `weighted_sum`."""
    b_v = tl.trans(b_v)
    if b_v.dtype == tl.float32:
        return tl.dot(b_v, b_weight, b_acc, input_precision="ieee")
    else:
        b_coarse = b_weight.to(b_v.dtype)
        b_acc = tl.dot(b_v, b_coarse, b_acc)
        return tl.dot(b_v, (b_weight - b_coarse.to(tl.float32)).to(b_v.dtype), b_acc)


@triton.jit
def combine_kernel(
    p_seq_lens, p_alpha, p_partial, p_total, p_support, p_out, p_counters,
    s_out_b, s_out_h, window,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one query head in their order and divides by the sum of its weights."""
    i_hq, i_b = tl.program_id(0), tl.program_id(1)
    n = tl.load(p_seq_lens + i_b).to(tl.int32)
    if COUNT and i_hq == 0:
        count_step(p_counters, n, window, HKV, G, P, WINDOW, LISTED)
    if ALPHA_PER_HEAD and tl.load(p_alpha + i_hq) == 1.0:
        return
    i_head = (i_b * HKV * G + i_hq).to(tl.int64)
    o_s, o_d = tl.arange(0, SP), tl.arange(0, DP)
    m_s, m_d = o_s < S, o_d < D
    m_partial = m_s[:, None] & m_d[None, :]
    p_p = p_partial + (i_head * S + o_s)[:, None] * D + o_d[None, :]
    b_out = tl.sum(tl.load(p_p, mask=m_partial, other=0.0), 0)  # [DP]
    total = tl.sum(tl.load(p_total + i_head * S + o_s, mask=m_s, other=0.0), 0)
    b_out = tl.where(n > 0, b_out / tl.where(n > 0, total, 1.0), 0.0)
    p_o = p_out + i_b.to(tl.int64) * s_out_b + i_hq * s_out_h + o_d
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_d)
    if COUNT:
        i_row = i_b * HKV + i_hq // G
        o_own = (i_row * S + o_s).to(tl.int64) * G + i_hq % G
        support = tl.sum(tl.load(p_support + o_own, mask=m_s, other=0), 0)
        if n > 0:
            tl.atomic_add(p_counters + SUPPORT, support.to(tl.int64), sem="relaxed")


@triton.jit
def count_step(
    p_counters, n, window, HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Counts one sequence; pages read are counted where they are listed, if they are."""
    first = 0
    if WINDOW:
        first = tl.maximum(n - window, 0) // P
    held = (((n + P - 1) // P - first) * HKV).to(tl.int64)
    one = tl.minimum(n, 1).to(tl.int64)
    tl.atomic_add(p_counters + STEPS, one, sem="relaxed")
    tl.atomic_add(p_counters + QUERY_HEADS, one * HKV * G, sem="relaxed")
    tl.atomic_add(p_counters + PAGES_HELD, held, sem="relaxed")
    if LISTED == 0:
        tl.atomic_add(p_counters + PAGES_READ, held, sem="relaxed")
