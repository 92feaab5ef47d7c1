"""Differentiable causal entmax attention for training, with grouped-query heads."""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from ..reference.entmax import exponent
from .entmax import order_of
from .training_backward import (
    entmax_attention_key_value_gradient_kernel,
    entmax_attention_query_gradient_kernel,
)
from .training_forward import entmax_attention_forward_kernel

BLOCK_LONG, BLOCK_SHORT, WARPS = 128, 64, 8


class EntmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        q, k, v, scale, slopes, alpha = inputs
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
            (alpha - 1) * scale,
            slopes,
            exponent(alpha),
            length,
            H=heads,
            G=group,
            D=dim,
            BM=BLOCK_LONG,
            BN=BLOCK_SHORT,
            ORDER=order_of(exponent(alpha)),
            num_warps=WARPS,
        )
        ctx.save_for_backward(q, k, v, out2, tau, slopes)
        ctx.scale, ctx.alpha = scale, alpha
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out2, tau, slopes = ctx.saved_tensors
        batch, heads, length, dim = q.shape
        key_heads = k.shape[1]
        grad_out = grad_outputs[0].contiguous()
        delta = (grad_out.float() * out2.float()).sum(-1)  # [B, H, T]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        shared = (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            (ctx.alpha - 1) * ctx.scale,
            ctx.scale,
            slopes,
            exponent(ctx.alpha),
            length,
        )
        meta = {
            "H": heads,
            "G": heads // key_heads,
            "D": dim,
            "ORDER": order_of(exponent(ctx.alpha)),
        }
        meta["num_warps"] = WARPS
        blocks = triton.cdiv(length, BLOCK_LONG)
        entmax_attention_query_gradient_kernel[(batch * heads, blocks)](
            q, k, v, grad_out, tau, delta, dq, *shared, BM=BLOCK_LONG, BN=BLOCK_SHORT, **meta
        )
        entmax_attention_key_value_gradient_kernel[(batch * key_heads, blocks)](
            q, k, v, grad_out, tau, delta, dk, dv, *shared, BM=BLOCK_SHORT, BN=BLOCK_LONG, **meta
        )
        return dq, dk, dv, None, None, None


def entmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    slopes: Sequence[float] | None = None,
    alpha: float = 1.5,
) -> torch.Tensor:
    """Causal attention with entmax in place of softmax, differentiable in q, k and v.

    Args:
        q: queries [B, H, T, D] in bfloat16, float16 or float32; D is a power of two in 16..128.
        k: keys [B, K, T, D] of the same dtype, where K divides H; query head h reads key head
            h // (H // K).
        v: values [B, K, T, D] of the same dtype.
        scale: factor on q.k before entmax; 1 / sqrt(D) if None.
        slopes: of ALiBi, one for each of the H heads; slope * (key position - query position) is
            added to scores.
        alpha: above 1, up to 2. Any but 4/3, 1.5 and 2 takes powers of every weight.

    Returns:
        [B, H, T, D] in the dtype of q; sums and thresholds are float32 inside.

    Raises:
        ValueError: if the shapes do not fit together, or D or alpha is not supported.
    """
    batch, heads, length, dim = q.shape
    if dim not in (16, 32, 64, 128):
        raise ValueError(f"head dimension must be 16, 32, 64 or 128, not {dim}")
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, length, dim):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} differ")
    if heads % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {heads} query heads")
    if slopes is not None and len(slopes) != heads:
        raise ValueError(f"{len(slopes)} slopes are given for {heads} query heads")
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha is {alpha}: give a number above 1, up to 2")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    rows = None
    if slopes is not None:
        rows = (alpha - 1) * torch.tensor(slopes, dtype=torch.float32, device=q.device)
    return EntmaxAttention.apply(q, k, v, dim**-0.5 if scale is None else scale, rows, alpha)
