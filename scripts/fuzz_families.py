"""Families of random cases of the kernels: what is compiled for, everything else being random."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from entmaxkv_kernels import Adaptive, Exact, Gaussian, PageLayout, Selector, TopK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton reads it when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"
FP8, FP16, FP32 = torch.float8_e4m3fn, torch.float16, torch.float32
# Triton's interpreter multiplies bf16 matrices wrongly.
BF16 = torch.bfloat16 if DEVICE == "cuda" else FP16

EXACT = (Exact(),)
TOPK = (TopK(40), TopK(128), TopK(200), Exact())
GAUSSIAN = (
    Gaussian(),
    Gaussian(quantile=0.9, safety=0.02),
    Gaussian(shared_spread=True),
    Exact(),
)
ADAPTIVE = (
    Adaptive(first_pages=4, guard=1.1),
    Adaptive(reach=1.0, first_pages=2, guard=0),
    Exact(prune=True, first_pages=4),
    Exact(),
)
CODED = (TopK(40, codes=True), TopK(128, codes=True), Exact())
CODED_MORE = (
    Adaptive(first_pages=4, codes=True),
    Adaptive(reach=1.0, first_pages=2, guard=0, codes=True),
    Exact(prune=True, first_pages=4, codes=True),
    Exact(),
)
PRUNED = (Exact(prune=True, first_pages=3), Exact(prune=True))


@dataclass(frozen=True)
class Family:
    """What is compiled for: everything else of a case is random.

    kind: "decode", "prefill" or "append".
    dtype: of the queries, and of the cache unless that is fp8.
    width: pages in a row of the block table.
    selectors: each call takes one of them; they read the same statistics, or none.
    chunk: new tokens of a row of a prefill, at most.
    weight: how often cases of the family are drawn.
    calls: cases of a group.
    pool: sequences that these cases share.
    """

    kind: str = "decode"
    dtype: torch.dtype = BF16
    fp8: bool = False
    kv_heads: int = 2
    group: int = 4
    head_size: int = 128
    page_size: int = 16
    batch: int = 4
    width: int = 40
    alpha: float | tuple[float, ...] = 1.5
    selectors: tuple[Selector, ...] = EXACT
    alibi: bool = False
    window: bool = False
    chunk: int = 600
    weight: int = 4
    calls: int = 32
    pool: int = 8

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def alphas(self) -> list[float]:
        """alpha of every query head."""
        if isinstance(self.alpha, tuple):
            return [self.alpha[h % len(self.alpha)] for h in range(self.query_heads)]
        return [self.alpha] * self.query_heads

    @property
    def layout(self) -> PageLayout:
        statistics = self.selectors[0].statistics
        return PageLayout(self.page_size, self.head_size, statistics, fp8=self.fp8)

    @property
    def cache_dtype(self) -> torch.dtype:
        return FP8 if self.fp8 else self.dtype


NARROW: dict[str, Any] = {"head_size": 64}
LONG: dict[str, Any] = {"head_size": 64, "kv_heads": 1, "batch": 1, "pool": 2}
PREFILL: dict[str, Any] = {"kind": "prefill", "calls": 8}
APPEND: dict[str, Any] = {"kind": "append", "width": 8, "pool": 16}
PER_HEAD = (1.0, 1.5, 2.0, 1.3)

FAMILIES = {
    "exact bf16": Family(weight=12),
    "exact fp16": Family(dtype=FP16, weight=8),
    "exact fp32": Family(dtype=FP32, **NARROW, weight=12),
    "exact D 80": Family(dtype=FP32, head_size=80, group=3, kv_heads=1),
    "exact D 96, pages of 32": Family(head_size=96, group=1, page_size=32, width=20),
    "exact D 256, pages of 64": Family(head_size=256, group=2, page_size=64, width=10),
    "exact group 16": Family(**NARROW, kv_heads=1, group=16),
    "exact group 7": Family(dtype=FP32, **NARROW, kv_heads=1, group=7),
    "exact alpha 2": Family(dtype=FP32, **NARROW, alpha=2.0, weight=8),
    "exact alpha 4/3": Family(dtype=FP32, **NARROW, alpha=4 / 3, weight=6),
    "exact alpha 1.2": Family(dtype=FP32, **NARROW, alpha=1.2, weight=6),
    "softmax": Family(alpha=1.0),
    "alpha per head": Family(dtype=FP32, **NARROW, alpha=PER_HEAD),
    "ALiBi": Family(dtype=FP32, **NARROW, alibi=True, weight=6),
    "window": Family(dtype=FP32, **NARROW, window=True, weight=6),
    "window, ALiBi, alpha per head": Family(**NARROW, alibi=True, window=True, alpha=PER_HEAD),
    "fp8": Family(fp8=True),
    "fp8, queries of fp32": Family(dtype=FP32, fp8=True, **NARROW, alpha=4 / 3),
    "batch 1": Family(batch=1),
    "batch 64": Family(**NARROW, batch=64, width=16, weight=2, calls=16, pool=32),
    "batch 256": Family(**NARROW, batch=256, width=8, weight=1, calls=4, pool=64),
    "long fp32": Family(dtype=FP32, **LONG | {"batch": 2}, group=2, width=2600, weight=6),
    "long bf16": Family(batch=1, pool=2, width=3000),
    "long alpha 2": Family(dtype=FP32, **LONG, group=2, width=2600, alpha=2.0, weight=3),
    "long alpha 1.2": Family(dtype=FP32, **LONG, group=1, width=2600, alpha=1.2, weight=2),
    "top-k bf16": Family(selectors=TOPK, weight=8),
    "top-k fp32": Family(dtype=FP32, **NARROW, selectors=TOPK, alibi=True, weight=6),
    "top-k softmax": Family(selectors=TOPK, alpha=1.0),
    "top-k fp8": Family(fp8=True, selectors=TOPK),
    "top-k long": Family(**LONG, width=9000, selectors=(TopK(4000),), weight=1, calls=8),
    "gaussian bf16": Family(selectors=GAUSSIAN, weight=8),
    "gaussian fp32": Family(dtype=FP32, **NARROW, selectors=GAUSSIAN, alibi=True),
    "gaussian alpha 2": Family(dtype=FP32, **NARROW, selectors=GAUSSIAN, alpha=2.0),
    "gaussian fp8": Family(fp8=True, selectors=GAUSSIAN),
    "adaptive bf16": Family(selectors=ADAPTIVE, weight=8),
    "adaptive fp32": Family(dtype=FP32, **NARROW, selectors=ADAPTIVE, alibi=True, weight=6),
    "adaptive alpha per head": Family(
        dtype=FP32, **NARROW, selectors=ADAPTIVE, alpha=(1.25, 1.5, 2.0, 1.3)
    ),
    "adaptive fp8": Family(fp8=True, selectors=ADAPTIVE),
    "adaptive, pages of 64": Family(
        head_size=256, group=2, page_size=64, width=10, selectors=ADAPTIVE
    ),
    "adaptive long": Family(
        **LONG, width=3000, selectors=(Adaptive(first_pages=8),), weight=1, calls=8
    ),
    "pruned bf16": Family(selectors=PRUNED, alibi=True, weight=6),
    "pruned long": Family(
        dtype=FP32, **LONG, width=3000, selectors=PRUNED, alibi=True, weight=1, calls=8
    ),
    "codes bf16": Family(selectors=CODED, weight=8),
    "codes fp32": Family(dtype=FP32, **NARROW, selectors=CODED, alibi=True, weight=6),
    "codes fp8": Family(fp8=True, selectors=CODED),
    "codes fp16, D 80, pages of 32": Family(
        dtype=FP16, head_size=80, page_size=32, width=20, selectors=CODED
    ),
    "codes long": Family(
        **LONG, width=9000, selectors=(TopK(4000, codes=True),), weight=1, calls=8
    ),
    "adaptive codes bf16": Family(selectors=CODED_MORE, weight=6),
    "adaptive codes fp32": Family(dtype=FP32, **NARROW, selectors=CODED_MORE, alibi=True, weight=6),
    "prefill bf16": Family(**PREFILL),
    "prefill fp32": Family(**PREFILL, dtype=FP32, **NARROW, weight=3),
    "prefill ALiBi": Family(**PREFILL, dtype=FP16, **NARROW, alibi=True, weight=3),
    "prefill window": Family(**PREFILL, **NARROW, window=True, weight=3),
    "prefill softmax": Family(**PREFILL, alpha=1.0, weight=3),
    "prefill alpha 2": Family(**PREFILL, dtype=FP16, **NARROW, alpha=2.0, weight=3),
    "prefill alpha per head": Family(**PREFILL, **NARROW, alpha=PER_HEAD, width=16, weight=3),
    "prefill D 256, pages of 64": Family(
        **PREFILL, head_size=256, group=2, page_size=64, width=8, weight=3
    ),
    "prefill fp8": Family(**PREFILL, fp8=True, weight=3),
    "prefill of a few after many": Family(**PREFILL, **LONG, width=4400, chunk=8, weight=1),
    "append bf16": Family(**APPEND, selectors=GAUSSIAN),
    "append fp16": Family(**APPEND, dtype=FP16, **NARROW, selectors=TOPK),
    "append fp32": Family(**APPEND, dtype=FP32, head_size=80, selectors=TOPK),
    "append, pages of 64": Family(**APPEND | {"width": 3}, head_size=96, page_size=64),
    "append fp8": Family(**APPEND, fp8=True),
    "append fp8, mean": Family(**APPEND, dtype=FP32, fp8=True, selectors=GAUSSIAN),
    "append codes": Family(**APPEND, selectors=CODED),
    "append fp32, codes": Family(**APPEND, dtype=FP32, head_size=80, selectors=CODED),
    "append fp8, codes": Family(**APPEND, dtype=FP16, fp8=True, selectors=CODED),
    "append fp8, boxes": Family(**APPEND, dtype=FP16, fp8=True, selectors=TOPK),
}
