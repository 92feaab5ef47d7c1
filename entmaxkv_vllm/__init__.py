"""EntmaxKV for vLLM: alpha-entmax attention served exactly, or with support-aware sparse decoding.

vLLM finds this package through its plugin entry points (see `plugin`).
"""

from importlib.metadata import version
from pathlib import Path

__version__ = version("entmaxkv-vllm")

DEMO_MODEL = Path(__file__).parent / "demo_model"
"""Folder of the small entmax model that ships with the package (alpha 1.5, byte tokens)."""

__all__ = ["DEMO_MODEL", "__version__"]
