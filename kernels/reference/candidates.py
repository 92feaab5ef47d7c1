"""The pages that a sparse selector chooses from."""

from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Codes


class Candidates(NamedTuple):
    """Some sequences and their pages, of which all but the last are full and to be chosen from.

    query: [B, kv_heads, group, head_size] in the compute dtype.
    statistics: [2, B, kv_heads, P, head_size] in the compute dtype, of the last page, too; anything
        after it. None of pages with codes.
    ranked: [B, P] bool, the pages to choose from, at least one per sequence.
    seq_lens: [B]; the query stands at position seq_len - 1.
    scale, alpha, alibi_slopes: as in `decode`.
    query_dtype: of the queries, before they were in the compute dtype.
    half_scales: [B, kv_heads, P, 1], what 8-bit half-widths were multiplied by.
    radius: [B, kv_heads, P, 1], of the boxes, in half-widths.
    codes: [B, kv_heads, P, ...] in the compute dtype, of pages that have them.
    """

    query: Tensor
    statistics: Tensor | None
    ranked: Tensor
    seq_lens: Tensor
    page_size: int
    scale: float
    alpha: float | Tensor
    alibi_slopes: Tensor | None
    query_dtype: torch.dtype
    half_scales: Tensor | None = None
    radius: Tensor | None = None
    codes: Codes | None = None
