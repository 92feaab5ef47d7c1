"""Counting on the device what a step reads."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..report import Counter

STEPS = tl.constexpr(int(Counter.STEPS))
PAGES_HELD = tl.constexpr(int(Counter.PAGES_HELD))
PAGES_READ = tl.constexpr(int(Counter.PAGES_READ))
SUPPORT = tl.constexpr(int(Counter.SUPPORT))
QUERY_HEADS = tl.constexpr(int(Counter.QUERY_HEADS))
FALLBACKS = tl.constexpr(int(Counter.FALLBACKS))


@triton.jit
def count_step(
    p_counters, n, window, HKV: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Counts one sequence; pages read are counted where they are listed, if they are."""
    first = 0
    if WINDOW:
        first = tl.maximum(n - window, 0) // P
    held = (((n + P - 1) // P - first) * HKV).to(tl.int64)
    one = tl.minimum(n, 1).to(tl.int64)
    tl.atomic_add(p_counters + STEPS, one, sem="relaxed")
    tl.atomic_add(p_counters + QUERY_HEADS, one * HKV * G, sem="relaxed")
    tl.atomic_add(p_counters + PAGES_HELD, held, sem="relaxed")
    if LISTED == 0:
        tl.atomic_add(p_counters + PAGES_READ, held, sem="relaxed")
