"""alpha-entmax attention over a paged KV cache, exact and support-aware sparse.

The kernels of EntmaxKV (arXiv 2605.21649), usable without a serving engine: split raw pages with
`split_pages`, write tokens with `append`, attend with `prefill` and `decode`, and compare a
sparse step with the exact one with `analyze_decode`.
"""

from .api import analyze_decode, append, decode, prefill
from .pages import NewTokens, PagedCache, PageLayout, allocate_pages, split_pages
from .report import Counter, DecodeReport
from .selectors import Adaptive, Exact, Gaussian, Selector, TopK

__all__ = [
    "Adaptive",
    "Counter",
    "DecodeReport",
    "Exact",
    "Gaussian",
    "NewTokens",
    "PageLayout",
    "PagedCache",
    "Selector",
    "TopK",
    "allocate_pages",
    "analyze_decode",
    "append",
    "decode",
    "prefill",
    "split_pages",
]
