"""Naive dense attention in float64, from its definition and the PyPI package `entmax`."""

import torch
from entmax import entmax_bisect
from torch import Tensor


def dense_weights(scores: Tensor, alpha: float) -> Tensor:
    """alpha-entmax of scores [..., n], by bisection."""
    if alpha == 1:
        return scores.softmax(-1)
    return entmax_bisect(scores, alpha, dim=-1, n_iter=60)


def dense_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal scores [query_heads, m, n] of the last m of n positions.

    query: [m, query_heads, head_size]; key: [n, kv_heads, head_size].
    """
    queries, query_heads = query.shape[:2]
    key = key.repeat_interleave(query_heads // key.shape[1], dim=1)
    scores = torch.einsum("mhd,nhd->hmn", query, key) * scale
    position = torch.arange(len(key))
    relative = position - position[len(key) - queries :, None]
    if slopes is not None:
        scores = scores + slopes.to(scores.dtype)[:, None, None] * relative
    hidden = relative > 0
    if window is not None:
        hidden |= relative <= -window
    return scores.masked_fill(hidden, -torch.inf)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    alpha: float | list[float],
    slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention [m, query_heads, head_size] of the last m of n tokens, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    scores = dense_scores(query, key, scale, slopes, window)
    alphas = alpha if isinstance(alpha, list) else [alpha] * len(scores)
    weights = torch.stack([dense_weights(s, a) for s, a in zip(scores, alphas, strict=True)])
    value = value.repeat_interleave(len(scores) // value.shape[1], dim=1)
    return torch.einsum("hmn,nhd->mhd", weights, value)
