"""Differentiable causal 1.5-entmax attention for training, with grouped-query heads.

Forward. With z = scale * q.k / 2 the weights are p = relu(z - tau)^2, and the threshold tau of a
row is the root of ||relu(z - tau)||_2 = 1. That norm is convex and decreasing in tau, so Newton
steps tau += (S2 - sqrt(S2)) / S1, where S1 = sum x, S2 = sum x^2 and x = relu(z - tau), never pass
the root when they start below it, and max(z) - 1 is below it (Peters, Niculae and Martins, "Sparse
Sequence-to-Sequence Models", 2019, for the root; Newton on the norm instead of on the sum because
the norm is nearly linear).

Backward. The Jacobian of p in the score is diag(x) - x x^T / sum(x). With the second output
out2 = sum(x v) / sum(x) it needs no normalisation pass over the keys:
ds = x * (dp - dout.out2), where dp = dout.v ("AdaSplash: Adaptive Sparse Flash Attention", 2025).
"""

import torch
import triton
import triton.language as tl

MAX_NEWTON_STEPS = tl.constexpr(20)
# A step squares the excess mass up to a constant, so the step taken from below this bound is exact
# to float32.
EXCESS_MASS = tl.constexpr(1e-3)


@triton.jit
def load_rows(p_x, s_row, o_row, o_d, T):
    """Loads rows `o_row` of one head's [T, D] matrix; rows past the end read as zero."""
    return tl.load(
        p_x + o_row[:, None].to(tl.int64) * s_row + o_d[None, :], mask=o_row[:, None] < T, other=0.0
    )


@triton.jit
def scaled_scores(b_a, b_b, half_scale):
    """Scores of every row of b_a against every row of b_b, scaled in float32."""
    return tl.dot(b_a, tl.trans(b_b), input_precision="ieee") * half_scale


@triton.jit
def query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, half_scale, T, MASKED: tl.constexpr):
    b_k = load_rows(p_k, s_k, o_n, o_d, T)  # [BN, D]
    b_z = scaled_scores(b_q, b_k, half_scale)  # [BM, BN]
    if MASKED:
        b_z = tl.where(o_m[:, None] >= o_n[None, :], b_z, -float("inf"))
    return b_z


@triton.jit
def accumulate_maximum(
    b_max, b_q, p_k, s_k, o_m, o_d, start, stop, half_scale, T, BN: tl.constexpr, M: tl.constexpr
):
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_z = query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, half_scale, T, M)
        b_max = tl.maximum(b_max, tl.max(b_z, axis=1))
    return b_max


@triton.jit
def accumulate_moments(
    b_s1,
    b_s2,
    b_tau,
    b_q,
    p_k,
    s_k,
    o_m,
    o_d,
    start,
    stop,
    half_scale,
    T,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_z = query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, half_scale, T, MASKED)
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0)
        b_s1 += tl.sum(b_x, axis=1)
        b_s2 += tl.sum(b_x * b_x, axis=1)
    return b_s1, b_s2


@triton.jit
def accumulate_outputs(
    b_s1,
    b_s2,
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
    half_scale,
    T,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_z = query_key_scores(b_q, p_k, s_k, o_m, o_n, o_d, half_scale, T, MASKED)
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0)
        if tl.max(b_x) > 0.0:
            b_p = b_x * b_x
            b_s1 += tl.sum(b_x, axis=1)
            b_s2 += tl.sum(b_p, axis=1)
            b_v = load_rows(p_v, s_v, o_n, o_d, T)  # [BN, D]
            b_o += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
            b_o2 += tl.dot(b_x.to(b_v.dtype), b_v, input_precision="ieee")
    return b_s1, b_s2, b_o, b_o2


@triton.jit
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
    half_scale,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
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

    b_q = load_rows(p_q, s_qt, o_m, o_d, T)  # [BM, D]
    b_max = tl.full([BM], -float("inf"), tl.float32)  # [BM]
    b_max = accumulate_maximum(
        b_max, b_q, p_k, s_kt, o_m, o_d, 0, i_m, half_scale, T, BN, M=False
    )
    b_max = accumulate_maximum(
        b_max, b_q, p_k, s_kt, o_m, o_d, i_m, stop, half_scale, T, BN, M=True
    )

    b_tau = b_max - 1.0  # [BM]
    excess = 1.0
    step = 0
    while (excess > EXCESS_MASS) & (step < MAX_NEWTON_STEPS):
        b_s1 = tl.zeros([BM], tl.float32)
        b_s2 = tl.zeros([BM], tl.float32)
        b_s1, b_s2 = accumulate_moments(
            b_s1, b_s2, b_tau, b_q, p_k, s_kt, o_m, o_d, 0, i_m, half_scale, T, BN, MASKED=False
        )
        b_s1, b_s2 = accumulate_moments(
            b_s1, b_s2, b_tau, b_q, p_k, s_kt, o_m, o_d, i_m, stop, half_scale, T, BN, MASKED=True
        )
        b_tau += (b_s2 - tl.sqrt(b_s2)) / b_s1
        excess = tl.max(b_s2) - 1.0
        step += 1

    b_s1 = tl.zeros([BM], tl.float32)
    b_s2 = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, D], tl.float32)
    b_o2 = tl.zeros([BM, D], tl.float32)
    b_s1, b_s2, b_o, b_o2 = accumulate_outputs(
        b_s1,
        b_s2,
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
        half_scale,
        T,
        BN,
        MASKED=False,
    )
    b_s1, b_s2, b_o, b_o2 = accumulate_outputs(
        b_s1,
        b_s2,
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
        half_scale,
        T,
        BN,
        MASKED=True,
    )

    m_m = o_m < T
    o_out = (i_bh * T + o_m)[:, None] * D + o_d[None, :]
    tl.store(p_o + o_out, (b_o / b_s2[:, None]).to(p_o.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_o2 + o_out, (b_o2 / b_s1[:, None]).to(p_o2.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_tau + i_bh * T + o_m, b_tau, mask=m_m)


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
    half_scale,
    T,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_k = load_rows(p_k, s_k, o_n, o_d, T)  # [BN, D]
        b_z = scaled_scores(b_q, b_k, half_scale)  # [BM, BN]
        if MASKED:
            b_z = tl.where(o_m[:, None] >= o_n[None, :], b_z, -float("inf"))
        b_x = tl.maximum(b_z - b_tau[:, None], 0.0)
        if tl.max(b_x) > 0.0:
            b_v = load_rows(p_v, s_v, o_n, o_d, T)  # [BN, D]
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BM, BN]
            b_ds = b_x * (b_dp - b_delta[:, None])
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    return b_dq


@triton.jit
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
    half_scale,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
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
        half_scale,
        T,
        BN,
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
        half_scale,
        T,
        BN,
        MASKED=True,
    )
    o_out = (i_bh * T + o_m)[:, None] * D + o_d[None, :]
    b_dq *= 2.0 * half_scale
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
    half_scale,
    T,
    D: tl.constexpr,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
):
    for i_m in range(start, stop, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < T
        b_q = load_rows(p_q, s_q, o_m, o_d, T)  # [BM, D]
        b_tau = tl.load(p_tau + o_m, mask=m_m, other=float("inf"))  # [BM]
        b_z = scaled_scores(b_k, b_q, half_scale)  # [BN, BM]
        if MASKED:
            b_z = tl.where(o_m[None, :] >= o_n[:, None], b_z, -float("inf"))
        b_x = tl.maximum(b_z - b_tau[None, :], 0.0)
        if tl.max(b_x) > 0.0:
            b_do = load_rows(p_do, D, o_m, o_d, T)  # [BM, D]
            b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)  # [BM]
            b_dv += tl.dot((b_x * b_x).to(b_do.dtype), b_do, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BN, BM]
            b_ds = b_x * (b_dp - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
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
    half_scale,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
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
            half_scale,
            T,
            D,
            BM,
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
            half_scale,
            T,
            D,
            BM,
            MASKED=False,
        )
    m_n = o_n < T
    o_out = (i_bh * T + o_n)[:, None] * D + o_d[None, :]
    b_dk *= 2.0 * half_scale
    tl.store(p_dk + o_out, b_dk.to(p_dk.dtype.element_ty), mask=m_n[:, None])
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_n[:, None])


BLOCK_LONG, BLOCK_SHORT, WARPS = 128, 64, 8


class EntmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):  # type: ignore[no-untyped-def]
        batch, heads, length, dim = q.shape
        group = heads // k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out2 = torch.empty_like(out)
        tau = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        entmax_attention_forward_kernel[(batch * heads, triton.cdiv(length, BLOCK_LONG))](
            q,
            k,
            v,
            out,
            out2,
            tau,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            0.5 * scale,
            length,
            H=heads,
            G=group,
            D=dim,
            BM=BLOCK_LONG,
            BN=BLOCK_SHORT,
            num_warps=WARPS,
        )
        ctx.save_for_backward(q, k, v, out2, tau)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        q, k, v, out2, tau = ctx.saved_tensors
        batch, heads, length, dim = q.shape
        key_heads = k.shape[1]
        grad_out = grad_out.contiguous()
        delta = (grad_out.float() * out2.float()).sum(-1)  # [B, H, T]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        shared = (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            0.5 * ctx.scale,
            length,
        )
        meta = {"H": heads, "G": heads // key_heads, "D": dim, "num_warps": WARPS}
        blocks = triton.cdiv(length, BLOCK_LONG)
        entmax_attention_query_gradient_kernel[(batch * heads, blocks)](
            q, k, v, grad_out, tau, delta, dq, *shared, BM=BLOCK_LONG, BN=BLOCK_SHORT, **meta
        )
        entmax_attention_key_value_gradient_kernel[(batch * key_heads, blocks)](
            q, k, v, grad_out, tau, delta, dk, dv, *shared, BM=BLOCK_SHORT, BN=BLOCK_LONG, **meta
        )
        return dq, dk, dv, None


def entmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Causal attention with 1.5-entmax in place of softmax, differentiable in q, k and v.

    Args:
        q: queries [B, H, T, D] in bfloat16, float16 or float32; D is a power of two in 16..128.
        k: keys [B, K, T, D] of the same dtype, where K divides H; query head h reads key head
            h // (H // K).
        v: values [B, K, T, D] of the same dtype.
        scale: factor on q.k before entmax; 1 / sqrt(D) if None.

    Returns:
        [B, H, T, D] in the dtype of q; sums and thresholds are float32 inside.

    Raises:
        ValueError: if the shapes do not fit together or D is not supported.
    """
    batch, heads, length, dim = q.shape
    if dim not in (16, 32, 64, 128):
        raise ValueError(f"head dimension must be 16, 32, 64 or 128, not {dim}")
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, length, dim):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} differ")
    if heads % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {heads} query heads")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return EntmaxAttention.apply(q, k, v, dim**-0.5 if scale is None else scale)
