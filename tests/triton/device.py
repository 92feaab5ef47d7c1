"""Scenes of the reference tests, on the device that the kernels run on."""

import torch
from torch import Tensor

from entmaxkv_kernels import PagedCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
"""Triton's interpreter multiplies bf16 matrices wrongly."""


def on_device(cache: PagedCache) -> PagedCache:
    """A copy of the pages on the device, with the strides that they have."""
    flat = torch.empty(0, dtype=cache.key.dtype).set_(cache.key.untyped_storage()).to(DEVICE)

    def moved(view: Tensor) -> Tensor:
        return flat.as_strided(view.shape, view.stride(), view.storage_offset())

    return PagedCache(*map(moved, cache[:3]), cache.layout)
