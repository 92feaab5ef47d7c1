"""Compiled kernels, in Triton: the functions of `entmaxkv_kernels.api` and their scratch memory."""

from .append import append
from .decode import decode
from .prefill import prefill, prefill_workspace_size
from .workspace import decode_workspace_size

__all__ = ["append", "decode", "decode_workspace_size", "prefill", "prefill_workspace_size"]
