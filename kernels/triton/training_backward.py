"""Backward pass of causal entmax attention for training.

With the weights p = x^b and the slopes s = x^(b - 1) = p^(2 - alpha) the Jacobian of p in the score
is diag(s) - s s^T / sum(s). With the second output out2 = sum(s v) / sum(s) it needs no
normalisation pass over the keys: ds = s * (dp - dout.out2), where dp = dout.v ("AdaSplash: Adaptive
Sparse Flash Attention", 2025).
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .entmax import weights_and_slopes
from .training_forward import load_rows, scaled_scores


@triton.jit
def accumulate_query_gradient(
    b_dq,
    b_q,
    b_do,
    b_tau,
    b_delta,
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
        b_k = load_rows(p_k, s_k, o_n, o_d, T)  # [BN, D]
        b_z = scaled_scores(b_q, b_k, factor, slope, o_n[None, :] - o_m[:, None])  # [BM, BN]
        if MASKED:
            b_z = tl.where(o_m[:, None] >= o_n[None, :], b_z, -float("inf"))
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0)
        if tl.max(b_x) > 0.0:
            b_v = load_rows(p_v, s_v, o_n, o_d, T)  # [BN, D]
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BM, BN]
            _, b_s = weights_and_slopes(b_x, exponent, ORDER)
            b_ds = b_s * (b_dp - b_delta[:, None])
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["T"])
def entmax_attention_query_gradient_kernel(
    p_q,  # [B, H, T, D]
    p_k,  # [B, H // G, T, D]
    p_v,  # [B, H // G, T, D]
    p_do,  # [B, H, T, D]
    p_tau,  # [B, H, T] float32
    p_delta,  # [B, H, T] float32
    p_dq,  # [B, H, T, D]
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
    scale,
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
    i_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    i_b, i_h = i_bh // H, i_bh % H
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + (i_h // G) * s_kh
    p_v += i_b * s_vb + (i_h // G) * s_vh
    o_m = i_m + tl.arange(0, BM)
    o_d = tl.arange(0, D)
    m_m = o_m < T
    stop = tl.minimum(i_m + BM, T)
    slope = tl.load(p_slopes + i_h) if p_slopes is not None else None

    b_q = load_rows(p_q, s_qt, o_m, o_d, T)  # [BM, D]
    b_do = load_rows(p_do + i_bh * T * D, D, o_m, o_d, T)  # [BM, D]
    b_tau = tl.load(p_tau + i_bh * T + o_m, mask=m_m, other=float("inf"))  # [BM]
    b_delta = tl.load(p_delta + i_bh * T + o_m, mask=m_m, other=0.0)  # [BM]
    b_dq = tl.zeros([BM, D], tl.float32)
    b_dq = accumulate_query_gradient(
        b_dq,
        b_q,
        b_do,
        b_tau,
        b_delta,
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
    b_dq = accumulate_query_gradient(
        b_dq,
        b_q,
        b_do,
        b_tau,
        b_delta,
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
    o_out = (i_bh * T + o_m)[:, None] * D + o_d[None, :]
    b_dq *= scale
    tl.store(p_dq + o_out, b_dq.to(p_dq.dtype.element_ty), mask=m_m[:, None])


@triton.jit
def accumulate_key_value_gradients(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_do,
    p_tau,
    p_delta,
    s_q,
    o_n,
    o_d,
    start,
    stop,
    factor,
    slope,
    exponent,
    T,
    D: tl.constexpr,
    BM: tl.constexpr,
    ORDER: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_m in range(start, stop, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < T
        b_q = load_rows(p_q, s_q, o_m, o_d, T)  # [BM, D]
        b_tau = tl.load(p_tau + o_m, mask=m_m, other=float("inf"))  # [BM]
        b_z = scaled_scores(b_k, b_q, factor, slope, o_n[:, None] - o_m[None, :])  # [BN, BM]
        if MASKED:
            b_z = tl.where(o_m[None, :] >= o_n[:, None], b_z, -float("inf"))
        b_x = tl.maximum(b_z - b_tau[None, :], 0.0)
        if tl.max(b_x) > 0.0:
            b_do = load_rows(p_do, D, o_m, o_d, T)  # [BM, D]
            b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)  # [BM]
            b_p, b_s = weights_and_slopes(b_x, exponent, ORDER)
            b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BN, BM]
            b_ds = b_s * (b_dp - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T"])
def entmax_attention_key_value_gradient_kernel(
    p_q,  # [B, H, T, D]
    p_k,  # [B, H // G, T, D]
    p_v,  # [B, H // G, T, D]
    p_do,  # [B, H, T, D]
    p_tau,  # [B, H, T] float32
    p_delta,  # [B, H, T] float32
    p_dk,  # [B, H // G, T, D]
    p_dv,  # [B, H // G, T, D]
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
    scale,
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
    i_n = tl.program_id(1) * BN
    i_b, i_h = i_bh // (H // G), i_bh % (H // G)
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    o_n = i_n + tl.arange(0, BN)
    o_d = tl.arange(0, D)
    stop_masked = tl.minimum(i_n + BN, T)

    b_k = load_rows(p_k, s_kt, o_n, o_d, T)  # [BN, D]
    b_v = load_rows(p_v, s_vt, o_n, o_d, T)  # [BN, D]
    b_dk = tl.zeros([BN, D], tl.float32)
    b_dv = tl.zeros([BN, D], tl.float32)
    for i_g in range(G):
        i_q = i_h * G + i_g
        i_row = i_b * H + i_q
        slope = tl.load(p_slopes + i_q) if p_slopes is not None else None
        p_qg = p_q + i_b * s_qb + i_q * s_qh
        p_dog = p_do + i_row * T * D
        p_taug = p_tau + i_row * T
        p_deltag = p_delta + i_row * T
        b_dk, b_dv = accumulate_key_value_gradients(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_qg,
            p_dog,
            p_taug,
            p_deltag,
            s_qt,
            o_n,
            o_d,
            i_n,
            stop_masked,
            factor,
            slope,
            exponent,
            T,
            D,
            BM,
            ORDER,
            MASKED=True,
        )
        b_dk, b_dv = accumulate_key_value_gradients(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_qg,
            p_dog,
            p_taug,
            p_deltag,
            s_qt,
            o_n,
            o_d,
            i_n + BN,
            T,
            factor,
            slope,
            exponent,
            T,
            D,
            BM,
            ORDER,
            MASKED=False,
        )
    m_n = o_n < T
    o_out = (i_bh * T + o_n)[:, None] * D + o_d[None, :]
    b_dk *= scale
    tl.store(p_dk + o_out, b_dk.to(p_dk.dtype.element_ty), mask=m_n[:, None])
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_n[:, None])
