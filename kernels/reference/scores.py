"""From attention inputs to the scores that the entmax threshold is solved in."""

import torch
from torch import Tensor

from .entmax import score_factor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 data, fp32 for any other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_to_scores(
    query: Tensor, scale: float, alpha: float | Tensor, alibi_slopes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fold scale and the factor alpha - 1 into the query and the ALiBi slopes, once.

    query: [tokens, query_heads, head_size]. Returns the query in the compute dtype, whose dot
    product with a key is then z (see `entmax`), and the slopes [query_heads] per position.
    """
    dtype = compute_dtype(query.dtype)
    factor = torch.as_tensor(score_factor(alpha), dtype=dtype, device=query.device)
    slopes = None if alibi_slopes is None else alibi_slopes.to(dtype) * factor
    return query.to(dtype) * (factor * scale)[..., None], slopes
