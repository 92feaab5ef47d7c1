"""Compiles the kernels for an H100 or H200 on a machine without one, and prints their names.

The interpreter accepts what the compiler does not. Every launch becomes a compilation; no GPU, and
no driver of one, is asked for.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from entmaxkv_kernels import (
    Adaptive,
    Counter,
    Exact,
    Gaussian,
    NewTokens,
    PagedCache,
    PageLayout,
    TopK,
    allocate_pages,
    split_pages,
)
from entmaxkv_kernels.pages import BOX, CODES, FP8
from entmaxkv_kernels.triton import append, decode, prefill
from entmaxkv_kernels.triton.launch import compile_ahead

launches = sys.modules["entmaxkv_kernels.triton.decode"]
QUERY_HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE, SCALE = 8, 2, 128, 16, 128**-0.5
SHARED_MEMORY = 227 << 10
"""Bytes that a program has at most."""
compiled: set[str] = set()


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches() -> None:
    """Make launches compile only."""
    run, compile_one = JITFunction.run, JITFunction._do_compile

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=(1,), warmup=True, **options)

    def compile_and_note(self: Any, *args: Any, **options: Any) -> Any:
        compiled.add(self.fn.__name__)
        kernel = compile_one(self, *args, **options)
        if kernel.metadata.shared > SHARED_MEMORY:
            sys.exit(f"{self.fn.__name__} takes {kernel.metadata.shared} bytes of shared memory")
        return kernel

    JITFunction.run = warm_up
    JITFunction._do_compile = compile_and_note
    triton.runtime.driver.set_active(Hopper())
    launches.can_chain = lambda device: True


def empty_cache(
    statistics: tuple[str, ...],
    dtype: torch.dtype,
    page_size: int = PAGE_SIZE,
    head_size: int = HEAD_SIZE,
) -> PagedCache:
    layout = PageLayout(page_size, head_size, statistics, fp8=dtype == FP8)
    return split_pages(allocate_pages(2, KV_HEADS, layout, dtype, "cpu"), layout)


def decode_step(
    selector: Any,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 1,
    page_size: int = PAGE_SIZE,
    head_size: int = HEAD_SIZE,
    appends: bool = False,
    **options: Any,
) -> None:
    new = torch.zeros(batch, KV_HEADS, head_size, dtype=torch.bfloat16)
    query = torch.zeros(batch, QUERY_HEADS, head_size, dtype=torch.bfloat16)
    decode(
        query,
        empty_cache(selector.statistics, dtype, page_size, head_size),
        torch.zeros(batch, tokens // page_size, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32),
        selector=selector,
        **{
            "scale": SCALE,
            "alpha": 1.5,
            "alibi_slopes": None,
            "sliding_window": None,
            "exact_rows": None,
            "exact_below": 0,
            "counters": torch.zeros(len(Counter), dtype=torch.int64),
            "out": torch.empty_like(query),
            "new_tokens": NewTokens(new, new, torch.zeros(batch, dtype=torch.int64))
            if appends
            else None,
            **options,
        },
    )


def prefill_step(alpha: float | torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    query = torch.zeros(70, QUERY_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    prefill(
        query,
        empty_cache((), dtype),
        torch.zeros(1, 8, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        scale=SCALE,
        alpha=alpha,
        alibi_slopes=None,
        sliding_window=None,
        out=torch.empty_like(query),
    )


def append_step(statistics: tuple[str, ...], dtype: torch.dtype) -> None:
    rows = torch.zeros(3, KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    append(empty_cache(statistics, dtype), rows, rows, torch.arange(3))


def main() -> None:
    compile_launches()
    with compile_ahead():
        take_steps()
    print(*sorted(compiled), sep="\n")
    compiled.clear()
    take_steps()
    if compiled:
        sys.exit(f"not compiled ahead: {sorted(compiled)}")
    with compile_ahead():
        take_batched_steps(8)
    compiled.clear()
    take_batched_steps(7)
    if compiled:
        sys.exit(f"compiled once more for 7 sequences after 8: {sorted(compiled)}")


def take_batched_steps(batch: int) -> None:
    exact_rows = torch.zeros(batch, dtype=torch.bool)
    decode_step(TopK(512), 8192, exact_rows=exact_rows, batch=batch)
    decode_step(TopK(512), 8192, exact_rows=exact_rows, batch=batch, appends=True)
    decode_step(Exact(), 1 << 18, batch=batch)


def take_steps() -> None:
    exact_rows = torch.zeros(1, dtype=torch.bool)
    mixed = torch.tensor([1.0, 1.5] * (QUERY_HEADS // 2), dtype=torch.float64)
    entmax = torch.tensor([1.25, 1.5] * (QUERY_HEADS // 2), dtype=torch.float64)
    slopes = torch.zeros(QUERY_HEADS)
    decode_step(Exact(), 2048, sliding_window=300)
    decode_step(Exact(), 8192, alibi_slopes=slopes)
    decode_step(Exact(), 1 << 20, FP8)
    decode_step(TopK(512), 8192, exact_rows=exact_rows, exact_below=512)
    decode_step(TopK(4096), 1 << 16, exact_rows=exact_rows)
    decode_step(TopK(16384), 1 << 18)
    decode_step(TopK(16384), 1 << 19)
    decode_step(TopK(512), 8192, alpha=mixed)
    # Some pages more than 1,024: those who read them choose them, or a launch does.
    decode_step(TopK(1024), 1100 * PAGE_SIZE, exact_rows=exact_rows)
    decode_step(TopK(1024), 1100 * PAGE_SIZE, alpha=mixed)
    certificate = torch.zeros(1, QUERY_HEADS)
    for tokens, budget, alpha in ((8192, 512, mixed), (1 << 16, 4096, 1.5), (1 << 18, 16384, 1.5)):
        decode_step(TopK(budget), tokens, alpha=alpha, certificate=certificate)
    decode_step(TopK(16384), 1 << 19, certificate=certificate)
    for selector, tokens in (Exact(), 2048), (TopK(512), 8192), (TopK(16384), 1 << 18):
        decode_step(selector, tokens, exact_rows=exact_rows, appends=True)
    decode_step(TopK(512), 8192, FP8, certificate=certificate, appends=True)
    decode_step(TopK(512), 8192, FP8, exact_rows=exact_rows, certificate=certificate)
    decode_step(Exact(), 8192, certificate=certificate)
    decode_step(Gaussian(), 8192, certificate=certificate)
    decode_step(Gaussian(), 8192)
    decode_step(Adaptive(), 1 << 17, exact_rows=exact_rows, certificate=certificate)
    decode_step(TopK(512, codes=True), 8192, FP8, certificate=certificate, appends=True)
    decode_step(Adaptive(codes=True), 8192, alibi_slopes=slopes, certificate=certificate)
    decode_step(TopK(512, codes=True), 8192, page_size=64, head_size=256)
    decode_step(Adaptive(reach=1.75), 8192, alibi_slopes=slopes, alpha=entmax)
    decode_step(Exact(prune=True), 1 << 20, FP8, alibi_slopes=slopes, certificate=certificate)
    prefill_step(1.5)
    prefill_step(mixed)
    prefill_step(1.5, FP8)
    append_step(Gaussian.statistics, torch.bfloat16)
    append_step(BOX, FP8)
    append_step(CODES, FP8)
    append_step((), torch.bfloat16)


if __name__ == "__main__":
    main()
