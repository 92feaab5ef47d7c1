"""Launches of kernels, which can be compiled ahead, several at a time."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton.runtime._async_compile import AsyncCompileMode

MOST_COMPILERS = 16
"""Kernels compiled at a time, at most: each takes some hundred MB."""

_ahead: ContextVar[bool] = ContextVar("compile_ahead", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launch a kernel or, within `compile_ahead`, see that it will be compiled."""
    if _ahead.get():
        kernel.warmup(*arguments, grid=grid, **named)
    else:
        kernel[grid](*arguments, **named)


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Within, `append`, `decode` and `prefill` write nothing; what they would launch is compiled.

    Kernels are compiled in threads, as many as the process has processors: Triton's passes, which
    take most of the time, hold no lock of Python's. All are compiled when it ends.

    Raises:
        triton.CompilationError: if one could not be compiled.
    """
    compilers = min(MOST_COMPILERS, len(os.sched_getaffinity(0)))
    token = _ahead.set(True)
    try:
        with ThreadPoolExecutor(compilers) as executor, AsyncCompileMode(executor):
            yield
    finally:
        _ahead.reset(token)
