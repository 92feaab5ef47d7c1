"""Launches of kernels, which can be compiled ahead, several at a time."""

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from triton.runtime._async_compile import AsyncCompileMode, active_mode

MOST_COMPILERS = 16
"""Kernels that a machine compiles at a time, at most: each takes some hundred MB."""

_ahead: ContextVar[bool] = ContextVar("compile_ahead", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launch a kernel or, within `compile_ahead`, see that it will be compiled."""
    if _ahead.get():
        kernel.warmup(*arguments, grid=grid, **named)
        return
    compiled = kernel[grid](*arguments, **named)
    # Triton's interpreter compiles nothing.
    if compiled is not None and compiled.function is not None:
        prefer_shared_memory(compiled.function)


@cache
def prefer_shared_memory(function: int) -> None:
    """Have a loaded kernel run where all of a multiprocessor's memory that can be is shared memory.

    An engine's matrix products, before and after, have it so, and a multiprocessor changes only
    once it is idle. Measured in an engine: docs/kernels.md. A kernel's first launch comes before;
    a graph of it is captured after.

    Raises:
        RuntimeError: if the driver does not know the function.
    """
    attribute, percent = 9, 100  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    error = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(
        ctypes.c_void_p(function), attribute, percent
    )
    if error:
        raise RuntimeError(f"cuFuncSetAttribute of a Triton kernel: CUDA error {error}")


@contextmanager
def compile_ahead(processes: int = 1) -> Iterator[None]:
    """Within, `append`, `decode` and `prefill` write nothing; what they would launch is compiled.

    Kernels are compiled in threads, as many as the process has processors, or its share of the
    most: Triton's passes, which take most of the time, hold no lock of Python's. All are compiled
    when it ends.

    Args:
        processes: how many of this machine compile at the same time.

    Raises:
        triton.CompilationError: if one could not be compiled.
    """
    compilers = max(1, min(MOST_COMPILERS, len(os.sched_getaffinity(0))) // processes)
    token, outer = _ahead.set(True), active_mode.get()
    try:
        with ThreadPoolExecutor(compilers) as executor, AsyncCompileMode(executor):
            yield
    finally:
        # Triton 3.6 leaves its mode active where a compilation failed.
        active_mode.set(outer)
        _ahead.reset(token)
