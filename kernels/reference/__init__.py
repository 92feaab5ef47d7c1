"""Plain PyTorch kernels: the definition of correct, and what serves on a CPU."""

from .append import append
from .decode import analyze_decode, decode
from .prefill import prefill

__all__ = ["analyze_decode", "append", "decode", "prefill"]
