"""A small deterministic context whose whole course through the selectors is known.

161 tokens in pages of 16, so 10 full pages and a last one of 1 token, with one head of 4 channels;
padded with zeros to 8, so that a page is a whole number of elements per token.
"""

import torch

from entmaxkv_kernels import PageLayout, allocate_pages, append, split_pages
from entmaxkv_kernels.reference.candidates import Candidates

LENGTH, PAGE_SIZE, SCALE, ALPHA = 161, 16, 0.5, 1.5

_I, _D = torch.arange(LENGTH, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)


def _pad(x):
    """[..., 4] to [..., 1 head, 8]."""
    return torch.nn.functional.pad(x, (0, 4)).unsqueeze(-2)


QUERY = _pad(6 * torch.cos(_D))[None]  # [1, 1, 8]
KEY = _pad(0.3 * torch.sin(0.37 * _I + 1.1 * _D) + torch.cos(0.11 * (_I // 16) * (_D + 1)))
VALUE = _pad(torch.cos(0.05 * _I + _D))


def golden_cache(statistics):
    """The cache, its block table and its length."""
    layout = PageLayout(PAGE_SIZE, 8, statistics)
    cache = split_pages(allocate_pages(11, 1, layout, torch.float64), layout)
    append(cache, KEY, VALUE, torch.arange(LENGTH))
    return cache, torch.arange(11, dtype=torch.int32)[None], torch.tensor([LENGTH])


def golden_candidates(statistics=("mean", "std"), alpha=ALPHA, alibi_slopes=None):
    cache, _, seq_lens = golden_cache(statistics)
    return Candidates(
        query=QUERY[:, None],
        statistics=cache.read_statistics(torch.arange(11)[None], torch.float64).permute(
            3, 0, 2, 1, 4
        ),
        ranked=torch.arange(11)[None] < 10,
        seq_lens=seq_lens,
        page_size=PAGE_SIZE,
        scale=SCALE,
        alpha=alpha,
        alibi_slopes=alibi_slopes,
        query_dtype=torch.float64,
    )
