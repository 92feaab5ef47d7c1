"""Forward pass of causal entmax attention for training.

With z = (alpha - 1) * scale * q.k and b = 1 / (alpha - 1) the weights are x^b, x = relu(z - tau).
The threshold tau of a row is found by the Newton steps of `entmax.py`, from max(z) - 1.
Beside the output, sum(x^b v), there is a second one for the backward pass,
sum(x^(b - 1) v) / sum(x^(b - 1)).
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import NEWTON_STEPS, newton_step, weights_and_slopes

# The step taken from here leaves a small part of it: near enough to train, and often a pass over
# all keys less than decoding would take.
EXCESS_MASS = tl.constexpr(1e-3)


@triton.jit
def load_rows(p_x, s_row, o_row, o_d, T):
    """Loads rows `o_row` of one head's [T, D] matrix; rows past the end read as zero."""
    return tl.load(
        p_x + o_row[:, None].to(tl.int64) * s_row + o_d[None, :], mask=o_row[:, None] < T, other=0.0
    )


@triton.jit
def scaled_scores(b_a, b_b, factor, slope, distance):
    """z of every row of b_a against every row of b_b; without ALiBi slope is None."""
    b_z = tl.dot(b_a, tl.trans(b_b), input_precision="ieee") * factor
    return b_z if slope is None else b_z + slope * distance


@triton.jit
def query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, factor, slope, T, MASKED: tl.constexpr):
    b_k = load_rows(p_k, s_k, o_n, o_d, T)  # [BN, D]
    b_z = scaled_scores(b_q, b_k, factor, slope, o_n[None, :] - o_m[:, None])  # [BM, BN]
    if MASKED:
        b_z = tl.where(o_m[:, None] >= o_n[None, :], b_z, -float("inf"))
    return b_z


@triton.jit
def accumulate_maximum(
    b_max,
    b_q,
    p_k,
    s_k,
    o_m,
    o_d,
    start,
    stop,
    factor,
    slope,
    T,
    BN: tl.constexpr,
    M: tl.constexpr,
):
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_z = query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, factor, slope, T, M)
        b_max = tl.maximum(b_max, tl.max(b_z, axis=1))
    return b_max


@triton.jit
def accumulate_moments(
    b_mass,
    b_slopes,
    b_tau,
    b_q,
    p_k,
    s_k,
    o_m,
    o_d,
    start,
    stop,
    factor,
    slope,
    exponent,
    T,
    BN: tl.constexpr,
    ORDER: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_z = query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, factor, slope, T, MASKED)
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0)
        b_p, b_s = weights_and_slopes(b_x, exponent, ORDER)
        b_mass += tl.sum(b_p, axis=1)
        b_slopes += tl.sum(b_s, axis=1)
    return b_mass, b_slopes


@triton.jit
def accumulate_outputs(
    b_mass,
    b_slopes,
    b_o,
    b_o2,
    b_tau,
    b_q,
    p_k,
    p_v,
    s_k,
    s_v,
    o_m,
    o_d,
    start,
    stop,
    factor,
    slope,
    exponent,
    T,
    BN: tl.constexpr,
    ORDER: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_z = query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, factor, slope, T, MASKED)
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0)
        if tl.max(b_x) > 0.0:
            b_p, b_s = weights_and_slopes(b_x, exponent, ORDER)
            b_mass += tl.sum(b_p, axis=1)
            b_slopes += tl.sum(b_s, axis=1)
            b_v = load_rows(p_v, s_v, o_n, o_d, T)  # [BN, D]
            b_o += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
            b_o2 += tl.dot(b_s.to(b_v.dtype), b_v, input_precision="ieee")
    return b_mass, b_slopes, b_o, b_o2


@triton.jit(do_not_specialize=["T"])
def entmax_attention_forward_kernel(
    p_q,  # [B, H, T, D]
    p_k,  # [B, H // G, T, D]
    p_v,  # [B, H // G, T, D]
    p_o,  # [B, H, T, D]
    p_o2,  # [B, H, T, D]
    p_tau,  # [B, H, T] float32
    s_qb,
    s_qh,
    s_qt,
    s_kb,
    s_kh,
    s_kt,
    s_vb,
    s_vh,
    s_vt,
    factor,
    p_slopes,  # [H] float32, factor / scale * those of ALiBi, or None
    exponent,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ORDER: tl.constexpr,
):
    i_bh = tl.program_id(0).to(tl.int64)
    # Longest rows first, so that no long program starts last.
    i_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    i_b, i_h = i_bh // H, i_bh % H
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + (i_h // G) * s_kh
    p_v += i_b * s_vb + (i_h // G) * s_vh
    o_m = i_m + tl.arange(0, BM)
    o_d = tl.arange(0, D)
    stop = tl.minimum(i_m + BM, T)
    slope = tl.load(p_slopes + i_h) if p_slopes is not None else None

    b_q = load_rows(p_q, s_qt, o_m, o_d, T)  # [BM, D]
    b_max = tl.full([BM], -float("inf"), tl.float32)  # [BM]
    b_max = accumulate_maximum(
        b_max, b_q, p_k, s_kt, o_m, o_d, 0, i_m, factor, slope, T, BN, M=False
    )
    b_max = accumulate_maximum(
        b_max, b_q, p_k, s_kt, o_m, o_d, i_m, stop, factor, slope, T, BN, M=True
    )

    b_tau = b_max - 1.0  # [BM]
    excess = 1.0
    step = 0
    while (excess > EXCESS_MASS) & (step < NEWTON_STEPS):
        b_mass = tl.zeros([BM], tl.float32)
        b_slopes = tl.zeros([BM], tl.float32)
        b_mass, b_slopes = accumulate_moments(
            b_mass,
            b_slopes,
            b_tau,
            b_q,
            p_k,
            s_kt,
            o_m,
            o_d,
            0,
            i_m,
            factor,
            slope,
            exponent,
            T,
            BN,
            ORDER,
            MASKED=False,
        )
        b_mass, b_slopes = accumulate_moments(
            b_mass,
            b_slopes,
            b_tau,
            b_q,
            p_k,
            s_kt,
            o_m,
            o_d,
            i_m,
            stop,
            factor,
            slope,
            exponent,
            T,
            BN,
            ORDER,
            MASKED=True,
        )
        b_tau += newton_step(b_mass, b_slopes, 1.0, exponent, ORDER)
        excess = tl.max(b_mass) - 1.0
        step += 1

    b_mass = tl.zeros([BM], tl.float32)
    b_slopes = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, D], tl.float32)
    b_o2 = tl.zeros([BM, D], tl.float32)
    b_mass, b_slopes, b_o, b_o2 = accumulate_outputs(
        b_mass,
        b_slopes,
        b_o,
        b_o2,
        b_tau,
        b_q,
        p_k,
        p_v,
        s_kt,
        s_vt,
        o_m,
        o_d,
        0,
        i_m,
        factor,
        slope,
        exponent,
        T,
        BN,
        ORDER,
        MASKED=False,
    )
    b_mass, b_slopes, b_o, b_o2 = accumulate_outputs(
        b_mass,
        b_slopes,
        b_o,
        b_o2,
        b_tau,
        b_q,
        p_k,
        p_v,
        s_kt,
        s_vt,
        o_m,
        o_d,
        i_m,
        stop,
        factor,
        slope,
        exponent,
        T,
        BN,
        ORDER,
        MASKED=True,
    )

    m_m = o_m < T
    o_out = (i_bh * T + o_m)[:, None] * D + o_d[None, :]
    tl.store(p_o + o_out, (b_o / b_mass[:, None]).to(p_o.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_o2 + o_out, (b_o2 / b_slopes[:, None]).to(p_o2.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_tau + i_bh * T + o_m, b_tau, mask=m_m)
