"""Entmax attention in fp64, and the error that the precision of the kernels explains."""

import torch
from fuzz_cases import Asked, Pool
from fuzz_families import DEVICE, Family
from torch import Tensor

from entmaxkv_kernels.reference.entmax import (
    entmax_threshold_bisect,
    entmax_threshold_sort,
    exponent,
    score_factor,
)

CHUNK_ELEMENTS = 1 << 23
"""Scores computed at a time."""


def attention(
    family: Family, pool: Pool, asked: Asked, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [T, query_heads, head_size] of every query, and the error [T, query_heads, 1] that
    the precision of the kernels explains; both 0 where a query sees nothing.

    allowed: [T, kv_heads, N] bool, keys that are read; None for all of them.
    """
    most, places = max(1, *asked.counts), (asked.sequence, asked.place)

    def by_sequence(x: Tensor) -> Tensor:
        """[M, Q, ...] of [T, ...], so that the keys of a sequence are multiplied once."""
        padded = x.new_zeros(family.pool, most, *x.shape[1:])
        padded[places] = x
        return padded

    query, position, scale = map(by_sequence, (asked.query, asked.position, asked.scale))
    window = None if asked.window is None else by_sequence(asked.window)
    allowed = None if allowed is None else by_sequence(allowed)
    out = torch.zeros_like(query, dtype=torch.float64)
    bound = torch.zeros_like(out[..., :1])
    chunk = max(1, CHUNK_ELEMENTS // (family.query_heads * most * pool.key.shape[1]))
    for start in range(0, family.pool, chunk):
        rows = slice(start, start + chunk)
        keys, queries = max(1, *pool.lens[rows]), max(1, *asked.counts[rows])
        key, value = (
            x[rows, :keys].double().repeat_interleave(family.group, 2).transpose(1, 2) * unit
            for x, unit in ((pool.key, pool.key_scale), (pool.value, pool.value_scale))
        )
        out[rows, :queries], bound[rows, :queries] = attend(
            family,
            key,
            value,
            query[rows, :queries],
            position[rows, :queries],
            scale[rows, :queries],
            None if window is None else window[rows, :queries],
            None if allowed is None else allowed[rows, :queries, :, :keys],
            pool.slopes,
        )
    empty = (asked.position < 0)[:, None, None]
    return out[places].masked_fill(empty, 0), bound[places].masked_fill(empty, 0)


def attend(
    family: Family,
    key: Tensor,
    value: Tensor,
    query: Tensor,
    position: Tensor,
    scale: Tensor,
    window: Tensor | None,
    allowed: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same for queries [M, Q, query_heads, head_size] by sequence, with one key for each
    query head: key, value [M, query_heads, N, head_size].

    A score z has an error of about two fp32 roundings of |q||k|; b K ** (1 / b) is the most that
    the weights of a support of K keys can change, in sum, with a change of z. Values and outputs
    are rounded to the dtype of the queries.
    """
    q = query.double().transpose(1, 2)  # [M, H, Q, D]
    scale = scale[:, None, :, None]
    scores = q @ key.mT * scale  # [M, H, Q, N]
    relative = torch.arange(key.shape[2], device=DEVICE) - position[:, None, :, None]
    if slopes is not None:
        scores += slopes.double()[:, None, None] * relative
    hidden = relative > 0
    if window is not None:
        hidden = hidden | (relative <= -window[:, None, :, None])
    scores.masked_fill_(hidden, -torch.inf)
    if allowed is not None:
        read = allowed.transpose(1, 2).repeat_interleave(family.group, 1)
        scores.masked_fill_(~read, -torch.inf)
    largest = scores.masked_fill(hidden, 0).nan_to_num_(neginf=0).abs_().amax(-1, keepdim=True)
    reach = q.norm(dim=-1, keepdim=True) * key.norm(dim=-1).amax(-1)[..., None, None] * scale
    # A query that sees nothing has no weights; any will do.
    scores[..., 0].masked_fill_((scores == -torch.inf).all(-1), 0)
    weights, change = torch.empty_like(scores), torch.empty_like(scores[..., :1])
    for alpha in set(family.alphas):
        of_it = [h for h, a in enumerate(family.alphas) if a == alpha]
        heads = of_it if len(of_it) < family.query_heads else slice(None)
        z = scores[:, heads] * score_factor(alpha)
        if alpha == 1:
            weights[:, heads] = z.softmax(-1)
            change[:, heads] = 1.0
        else:
            solve = entmax_threshold_sort if alpha in (1.5, 2) else entmax_threshold_bisect
            power = exponent(alpha)
            w = (z - solve(z, alpha)[..., None]).clamp_min_(0) ** power
            weights[:, heads] = w / w.sum(-1, keepdim=True)
            support = (w > 0).sum(-1, keepdim=True).double()
            change[:, heads] = score_factor(alpha) * power * support ** (1 / power)
    fp32, own = torch.finfo(torch.float32).eps, torch.finfo(family.dtype).eps
    bound = 4 * own + 2 * fp32 * change * (1 + reach + largest)
    bound *= value.abs().amax((2, 3))[..., None, None]
    return (weights @ value).transpose(1, 2), bound.transpose(1, 2)


def excess(out: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """[T] the largest error over what is allowed; infinite for what is no number."""
    share = (out.double() - exact).abs_() / bound.clamp_min(torch.finfo(torch.float64).tiny)
    return share.nan_to_num_(nan=torch.inf).flatten(1).amax(1)
