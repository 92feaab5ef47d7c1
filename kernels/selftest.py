"""Says within about a minute whether the kernels are right on this machine.

    python -m entmaxkv_kernels.selftest

On a GPU the compiled kernels run; without one, the same kernels in Triton's interpreter. Both are
compared with the reference in fp64 on the same numbers. The exit code is 0 if all checks pass.
"""

import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import api
from .pages import FP8, PagedCache, PageLayout, allocate_pages, split_pages
from .selectors import Exact, Gaussian, Selector, TopK

KV_HEADS, GROUP, HEAD_SIZE, PAGE_SIZE = 2, 3, 64, 16
HOT_PAGES = 3
"""Pages of a long sequence whose keys score high: what the sparse selectors have to find."""


class Check(NamedTuple):
    """One function with one dtype; `alpha` 1 is softmax. `query` is the dtype of the queries."""

    name: str
    cache: torch.dtype
    query: torch.dtype
    selector: Selector | None = None
    alpha: float = 1.5


class Scene(NamedTuple):
    """Ragged sequences in shuffled pages, appended by the compiled kernel and, in fp64, by the
    reference."""

    cache: PagedCache
    exact_cache: PagedCache
    query: Tensor
    block_table: Tensor
    seq_lens: Tensor


def checks_for(device: torch.device) -> list[Check]:
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    # The interpreter multiplies bf16 matrices wrongly.
    main = bf16 if device.type == "cuda" else fp32
    checks = [
        Check("decode exact", main, main, Exact()),
        Check("decode exact, alpha 2", main, main, Exact(), 2.0),
        Check("decode softmax", main, main, Exact(), 1.0),
        Check("decode exact, pruned", main, main, Exact(prune=True)),
        Check("decode topk", main, main, TopK(HOT_PAGES * PAGE_SIZE)),
        Check("decode gaussian", main, main, Gaussian()),
        Check("prefill", main, main),
        Check("decode exact", fp16, fp16, Exact()),
    ]
    if device.type == "cuda":
        checks += [Check("decode exact", fp32, fp32, Exact()), Check("prefill", fp16, fp16)]
        if torch.cuda.get_device_capability(device) >= (8, 9):
            checks.append(Check("decode exact", FP8, bf16, Exact()))
    return checks


def make_scene(check: Check, device: torch.device) -> Scene:
    """Both caches hold the same numbers: what the compiled append stored.

    Raises AssertionError if that is not what it was given.
    """
    lengths = [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 20 * PAGE_SIZE + 5]
    if device.type == "cuda":
        lengths += [5003, 40009]
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    statistics = check.selector.statistics if check.selector else ()
    widths = [-(-n // PAGE_SIZE) for n in lengths]
    order = torch.randperm(sum(widths), generator=random).int()
    table = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
    for row, pages in zip(table, order.split(widths), strict=True):
        row[: len(pages)] = pages
    query = normal(len(lengths), KV_HEADS, 1, HEAD_SIZE).expand(-1, -1, GROUP, -1)
    query = 2 * (query + 0.1 * normal(*query.shape))
    keys, values, slots = [], [], []
    for b, n in enumerate(lengths):
        key = normal(n, KV_HEADS, HEAD_SIZE)
        if n > 2 * HOT_PAGES * PAGE_SIZE:
            hot = slice(PAGE_SIZE, (1 + HOT_PAGES) * PAGE_SIZE)
            key[hot] += 4 * query[b, :, 0] / query[b, :, 0].norm(dim=-1, keepdim=True)
        position = torch.arange(n)
        keys.append(key)
        values.append(normal(n, KV_HEADS, HEAD_SIZE))
        slots.append(table[b, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE)
    slot = torch.cat(slots).to(device)
    given = [torch.cat(part).to(device, check.query) for part in (keys, values)]

    def cache_of(dtype: torch.dtype) -> PagedCache:
        layout = PageLayout(PAGE_SIZE, HEAD_SIZE, statistics, fp8=dtype == FP8)
        return split_pages(allocate_pages(len(order), KV_HEADS, layout, dtype, device), layout)

    cache, exact_cache = cache_of(check.cache), cache_of(torch.float64)
    api.append(cache, given[0], given[1], slot, implementation="triton")
    stored = [x[slot // PAGE_SIZE, :, slot % PAGE_SIZE] for x in (cache.key, cache.value)]
    for rows, tensor in zip(stored, given, strict=True):
        if not torch.equal(rows, tensor.to(check.cache)):
            raise AssertionError("append stored something else than it was given")
    api.append(exact_cache, stored[0].double(), stored[1].double(), slot)
    return Scene(
        cache,
        exact_cache,
        query.flatten(1, 2).to(device, check.query),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def run_check(check: Check, device: torch.device) -> float:
    """The largest error as a share of what rounding explains; infinite for what is no number."""
    scene = make_scene(check, device)
    filled = scene.seq_lens > 0
    context = scene.block_table[filled], scene.seq_lens[filled]
    query = scene.query[filled]
    options = {"scale": HEAD_SIZE**-0.5, "alpha": check.alpha}
    more: tuple[Tensor, ...] = ()
    compute: Callable[..., Tensor] = api.prefill
    if check.selector is None:
        more = (torch.arange(len(query) + 1, dtype=torch.int32, device=device),)
    else:
        compute, options = api.decode, options | {"selector": check.selector}
    actual = compute(query, scene.cache, *context, *more, **options, implementation="triton")
    exact = compute(query.double(), scene.exact_cache, *context, *more, **options)
    # Scores are sums of products in fp32; outputs are rounded to their dtype.
    allowed = 4 * torch.finfo(actual.dtype).eps + 100 * torch.finfo(torch.float32).eps
    error = ((actual.double() - exact).abs() / (exact.abs() + 1) / allowed).amax()
    return torch.inf if error.isnan() else error.item()


def device() -> torch.device:
    """Where the kernels run on this machine."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> int:
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed, so only the reference runs here; pip install triton")
        return 1
    here = device()
    if here.type == "cpu":
        # Read when the compiled kernels are imported, by the first check.
        os.environ["TRITON_INTERPRET"] = "1"
        # Both branches of a choice are computed there, the one that is not taken too.
        warnings.simplefilter("ignore", RuntimeWarning)
    where = torch.cuda.get_device_name() if here.type == "cuda" else "Triton's interpreter"
    print(f"entmaxkv_kernels on {where}")
    failed = 0
    for check in checks_for(here):
        started = time.perf_counter()
        error = run_check(check, here)
        failed += not error <= 1
        verdict = "ok" if error <= 1 else "WRONG"
        took = time.perf_counter() - started
        cache = str(check.cache).removeprefix("torch.")
        print(f"{verdict:5}  {check.name:22} {cache:14} error {error:8.3f} of 1  {took:5.1f} s")
    print("all checks passed" if not failed else f"{failed} checks FAILED: do not use the kernels")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
