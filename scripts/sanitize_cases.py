"""Small cases that launch every kernel of the public API; run by `sanitize.py` under its tools.

What they are given is made on the CPU and copied, and memory that the kernels write is not
initialised, so that on the GPU almost nothing runs but the kernels, and a read of what none of
them wrote can be told. Workspaces that allow no lists make decode sample, guess and fall back;
rows of more than 2,048 pages make it rank pages by several programs.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from fuzz_families import BF16, DEVICE, FP8, FP16, FP32
from torch import Tensor

from entmaxkv_kernels import (
    Adaptive,
    Counter,
    Exact,
    Gaussian,
    NewTokens,
    PageLayout,
    Selector,
    TopK,
    append,
    decode,
    prefill,
    split_pages,
)
from entmaxkv_kernels.triton import prefill_workspace_size
from entmaxkv_kernels.triton.decode import step_shape

MODULES = (
    *("adaptive", "append", "attend", "attend_short", "collect", "filter", "gaussian"),
    *("nearest", "nearest_long", "pages", "prefill_softmax", "prefill_thresholds"),
    *("prefill_values", "softmax", "topk"),
)
KV_HEADS, GROUP, PAGE = 1, 4, 16
EXACT = Exact()


@dataclass(frozen=True)
class Case:
    """A batch of sequences of these lengths; one prefill of at most `chunk` tokens of each, or
    one decode step.

    least: give the workspace the least size that decode takes.
    appends: the decode step appends the newest token of each sequence itself.
    """

    dtype: torch.dtype = BF16
    fp8: bool = False
    head_size: int = 64
    alpha: float | tuple[float, ...] = 1.5
    selector: Selector = EXACT
    width: int = 12
    lens: tuple[int, ...] = (150, 0, 33)
    alibi: bool = False
    window: int | None = None
    least: bool = False
    chunk: int = 0
    certified: bool = False
    appends: bool = False


CASES = {
    "exact": Case(),
    "exact, appending": Case(appends=True),
    "exact by fallback": Case(least=True),
    "top-k": Case(selector=TopK(48)),
    "top-k of a wide table": Case(selector=TopK(48), width=2100),
    "top-k of a long row": Case(selector=TopK(4800), width=4200, lens=(66000, 0, 33)),
    "top-k, certified": Case(selector=TopK(48), certified=True),
    "top-k of a long row, certified": Case(
        selector=TopK(32000), width=4200, lens=(66000, 0, 33), certified=True
    ),
    "top-k, appending": Case(selector=TopK(48), appends=True),
    "top-k of a long row, certified, appending": Case(
        selector=TopK(4800), width=4200, lens=(66000, 0, 33), certified=True, appends=True
    ),
    "top-k by fallback, certified": Case(FP16, selector=TopK(96), least=True, certified=True),
    "top-k, softmax": Case(alpha=1.0, selector=TopK(48)),
    "adaptive": Case(FP32, selector=Adaptive(first_pages=4, guard=1.1), certified=True),
    "pruned": Case(selector=Exact(prune=True, first_pages=4), alibi=True, certified=True),
    "pruned, of a long row by fallback": Case(
        FP32, selector=Exact(prune=True), width=2100, lens=(33000, 0, 33), alibi=True, least=True
    ),
    "codes, certified, appending": Case(
        selector=TopK(48, codes=True), certified=True, appends=True
    ),
    "adaptive by codes, D 80": Case(
        FP16, head_size=80, selector=Adaptive(first_pages=4, codes=True), alibi=True
    ),
    "pruned by codes": Case(FP32, selector=Exact(prune=True, first_pages=4, codes=True)),
    "gaussian": Case(selector=Gaussian()),
    "softmax": Case(alpha=1.0),
    "prefill": Case(chunk=40),
    "prefill softmax": Case(alpha=1.0, chunk=40),
    "fp8": Case(fp8=True),
    "fp8 prefill": Case(fp8=True, chunk=40),
    "fp32, alpha per head, ALiBi, window": Case(
        FP32, alpha=(1.0, 1.5, 2.0, 1.3), alibi=True, window=50
    ),
    "fp32 by fallback": Case(FP32, alpha=1.2, least=True),
    "fp32 prefill": Case(FP32, alpha=1.2, chunk=40),
    "fp32 prefill, alpha 1.5": Case(FP32, chunk=40),
    "fp16, D 80, gaussian by fallback": Case(
        FP16, head_size=80, selector=Gaussian(), alibi=True, least=True
    ),
}


def run(case: Case) -> None:
    """Raises AssertionError where the kernels and the reference on the CPU differ."""
    random = torch.Generator().manual_seed(0)
    scales: dict[str, Any] = {"key_scale": 0.02, "value_scale": 0.01} if case.fp8 else {}
    layout = PageLayout(PAGE, case.head_size, case.selector.statistics, fp8=case.fp8)
    tokens, batch = sum(case.lens), len(case.lens)
    key, value = (
        torch.randn(tokens, KV_HEADS, case.head_size, generator=random).to(case.dtype)
        for _ in range(2)
    )
    pages = [-(-n // PAGE) for n in case.lens]
    order = torch.randperm(sum(pages), generator=random).int()
    table = torch.zeros(batch, case.width, dtype=torch.int32)
    slots = []
    for row, own, n in zip(table, order.split(pages), case.lens, strict=True):
        row[: len(own)] = own
        slots.append(own.long().repeat_interleave(PAGE)[:n] * PAGE + torch.arange(n) % PAGE)
    shape = sum(pages), KV_HEADS, PAGE, layout.elements_per_token
    raw = torch.zeros(shape, dtype=FP8 if case.fp8 else case.dtype)
    device_raw = raw.to(DEVICE, copy=True)
    newest = torch.tensor(case.lens).cumsum(0) - 1
    newest_slots = torch.cat(slots)[newest].where(torch.tensor(case.lens) > 0, -1)
    new_tokens = NewTokens(key[newest], value[newest], newest_slots)
    before = torch.ones(tokens, dtype=torch.bool)
    if case.appends:
        before[newest] = False
    rows = key[before], value[before], torch.cat(slots)[before]
    append(split_pages(raw, layout), *rows, **scales)
    append(split_pages(device_raw, layout), *to_device(*rows), **scales, implementation="triton")
    assert_same_pages(device_raw, raw, layout)

    query_lens = [min(n, case.chunk) if case.chunk else 1 for n in case.lens]
    heads = KV_HEADS * GROUP
    query = 2 * torch.randn(sum(query_lens), heads, case.head_size, generator=random)
    context = query.to(case.dtype), split_pages(raw, layout), table, torch.tensor(case.lens).int()
    on_chip_tables = to_device(*context[2:])
    device = context[0].to(DEVICE), split_pages(device_raw, layout), *on_chip_tables
    options: dict[str, Any] = {
        "scale": case.head_size**-0.5,
        "alpha": case.alpha,
        "sliding_window": case.window,
        **scales,
    }
    slopes = torch.rand(heads, generator=random) if case.alibi else None
    on_host, on_chip = ({**options, "alibi_slopes": x} for x in (slopes, *to_device(slopes)))
    out = torch.empty_like(device[0])
    on_chip |= {"out": out, "implementation": "triton"}
    if case.chunk:
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        size = prefill_workspace_size(
            heads, KV_HEADS, case.head_size, case.dtype, case.width * PAGE, device=DEVICE
        )
        expected = prefill(*context, starts, **on_host)
        prefill(*device, *to_device(starts), **on_chip, workspace=scratch(size))
    else:
        shape_of = step_shape(device[0], device[1], device[2], case.selector, 0, case.certified)
        size = shape_of.least_size if case.least else shape_of.good_size
        counters, selector = torch.zeros(len(Counter), dtype=torch.int64), case.selector
        certificate = torch.full((batch, heads), torch.nan) if case.certified else None
        (own_certificate,) = to_device(certificate)
        on_host |= {"selector": selector, "certificate": certificate}
        if case.appends:
            on_host["new_tokens"] = new_tokens
        expected = decode(*context, **on_host)
        on_chip |= {"selector": selector, "workspace": scratch(size)}
        on_chip |= {"certificate": own_certificate, "counters": counters.to(DEVICE)}
        if case.appends:
            on_chip["new_tokens"] = NewTokens(*to_device(*new_tokens))
        decode(*device, **on_chip)
        if certificate is not None:
            assert_close(own_certificate, certificate, 1e-3)
        assert_same_pages(device_raw, raw, layout)
    assert_close(out, expected, 8 * max(2**-16, torch.finfo(case.dtype).eps))


def to_device(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.to(DEVICE) for x in tensors]


def scratch(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=DEVICE)


def assert_same_pages(actual: Tensor, expected: Tensor, layout: PageLayout) -> None:
    """Keys, values and the first two statistics of every page."""
    of_both = (split_pages(raw, layout)[:4] for raw in (actual, expected))
    for stored, reference in zip(*of_both, strict=True):
        assert_close(stored, reference, 2 * torch.finfo(expected.dtype).eps)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    pair = actual.cpu().float(), expected.float()
    torch.testing.assert_close(*pair, rtol=tolerance, atol=4 * tolerance)


def kernels() -> Iterator[tuple[str, Any]]:
    """The launched kernels, by name."""
    for module in MODULES:
        for name, kernel in vars(import_module(f"entmaxkv_kernels.triton.{module}")).items():
            if name.endswith("_kernel") and hasattr(kernel, "add_pre_run_hook"):
                yield name, kernel


def main() -> None:
    """Run cases until so many seconds have passed, and keep a record of them in a JSON file."""
    record, seconds, start = Path(sys.argv[1]), float(sys.argv[2]), time.time()
    launched: set[str] = set()
    all_kernels = dict(kernels())
    for name, kernel in all_kernels.items():
        kernel.add_pre_run_hook(lambda *_, name=name, **__: launched.add(name))
    record.write_text(json.dumps({"pid": os.getpid()}))
    done: list[str] = []
    for name, case in CASES.items():
        if time.time() - start > seconds:
            break
        print(f"{time.time() - start:.1f} s: {name}", flush=True)
        run(case)
        done.append(name)
        left = sorted({*all_kernels} - launched)
        result = {"cases": done, "kernels": sorted(launched), "not_run": left}
        record.write_text(json.dumps({"pid": os.getpid()} | result))


if __name__ == "__main__":
    main()
