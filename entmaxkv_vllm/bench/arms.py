"""This project's arms: steps over a workload, and what they count and cannot do without."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

import entmaxkv_kernels
from entmaxkv_kernels import Counter, Exact, PagedCache, Selector
from entmaxkv_vllm.bench.timing import Step
from entmaxkv_vllm.bench.workload import ALPHA, Workload
from entmaxkv_vllm.evaluate.selectors import parse_selector


def selector_of(name: str, tokens: int, share: float, page_size: int) -> Selector:
    """The selector of this name; a budget is `share` of `tokens`, at least a page."""
    budgeted = name.startswith("topk")
    return parse_selector(f"{name}:{max(page_size, int(share * tokens))}" if budgeted else name)


@dataclass
class EntmaxArm:
    """Steps of this project over a workload under one selector.

    certified: whether steps say how exact they are, which is counted.
    kernels: another version of the package, which the selector is then of.
    appends: whether steps write each sequence's newest token, which is there already, as a server's
        do.
    counts: whether steps count; `counted` and `complaint` know nothing of those that do not.

    Attributes:
        counters: [len(Counter)] int64, what all steps run so far counted.
    """

    workload: Workload
    selector: Selector
    certified: bool = False
    kernels: ModuleType = entmaxkv_kernels
    appends: bool = False
    counts: bool = True

    def __post_init__(self) -> None:
        device = self.workload.shape.device
        self.counters = torch.zeros(len(Counter), dtype=torch.int64, device=device)
        self.outs = torch.empty_like(self.workload.queries)
        heads = self.workload.decodes, self.workload.shape.query_heads
        self.certificate = torch.empty(heads, device=device) if self.certified else None

    @cached_property
    def cache(self) -> PagedCache:
        return self.kernels.PagedCache(*self.workload.pool.cache(self.selector.statistics))

    @cached_property
    def steps(self) -> list[Step]:
        """One for each set of pages."""
        return [self._step(index) for index in range(self.workload.sets)]

    @cached_property
    def workspace(self) -> torch.Tensor | None:
        work, shape = self.workload, self.workload.shape
        if shape.implementation == "reference":
            return None
        compiled = import_module(f"{self.kernels.__name__}.triton")
        heads = shape.query_heads, shape.kv_heads, shape.head_size
        sizes = [0]
        if work.decodes:
            sizes.append(
                compiled.decode_workspace_size(
                    work.decodes,
                    *heads,
                    shape.page_size,
                    shape.dtype,
                    work.table_tokens,
                    selector=self.selector,
                    certificate=self.certified,
                )
            )
        if work.kind != "decode":
            sizes.append(compiled.prefill_workspace_size(*heads, shape.dtype, work.table_tokens))
        return torch.empty(max(sizes), dtype=torch.uint8, device=shape.device)

    def _step(self, index: int) -> Step:
        work, out, end = self.workload, self.outs[index], self.workload.decodes
        query, table = work.queries[index], work.tables[index]
        options: dict[str, Any] = {
            "scale": work.shape.scale,
            "alpha": ALPHA,
            "workspace": self.workspace,
            "implementation": work.shape.implementation,
        }
        new_tokens = self._new_tokens(index) if self.appends and end else None

        def step() -> None:
            if end:
                self.kernels.decode(
                    query[:end],
                    self.cache,
                    table[:end],
                    work.lengths[:end],
                    selector=self.selector,
                    counters=self.counters if self.counts else None,
                    out=out[:end],
                    certificate=self.certificate,
                    new_tokens=new_tokens,
                    **options,
                )
            if end < len(work.requests):
                self.kernels.prefill(
                    query,
                    self.cache,
                    table[end:],
                    work.lengths[end:],
                    work.starts[end:],
                    out=out,
                    **options,
                )

        return step

    def _new_tokens(self, index: int) -> Any:
        """The last token of every sequence that decodes."""
        work, size = self.workload, self.workload.shape.page_size
        last = work.lengths[: work.decodes].long() - 1
        page = work.tables[index][: work.decodes].gather(1, last[:, None] // size)[:, 0]
        slots = page.long() * size + last % size
        return self.kernels.NewTokens(work.pool.key[slots], work.pool.value[slots], slots)

    def counted(self) -> dict[str, Any]:
        """What decoding read and gave weight, of the steps run so far.

        Shares `pages_read` of the pages held and `support` of the tokens of a sequence, and
        `bytes`: of keys, values and statistics that one step cannot do without. The values are
        those of a KV head's query heads together, which share some: a little too many.
        """
        work, shape = self.workload, self.workload.shape
        total = {counter: int(self.counters[counter]) for counter in Counter}
        if not total[Counter.STEPS]:
            return {}
        steps = total[Counter.STEPS] / work.decodes
        tokens = sum(request.tokens for request in work.requests[: work.decodes])
        vector = shape.head_size * shape.dtype.itemsize
        statistics = 0
        if self.selector.statistics:
            page = self.cache.statistics[0, 0].nbytes + self.cache.scales[0, 0].nbytes
            statistics = shape.kv_heads * tokens // shape.page_size * page
        keys = total[Counter.PAGES_READ] / steps * shape.page_size
        values = total[Counter.SUPPORT] / steps
        return {
            "pages_read": total[Counter.PAGES_READ] / total[Counter.PAGES_HELD],
            "sparse_steps": total[Counter.SPARSE_STEPS] / total[Counter.STEPS],
            "support": total[Counter.SUPPORT]
            / total[Counter.QUERY_HEADS]
            / (tokens / work.decodes),
            "bytes": statistics + int((keys + values) * vector),
        }

    def complaint(self) -> str | None:
        """Why this is no measurement of sparse decoding, if it was to be one."""
        if isinstance(self.selector, Exact) or not self.workload.decodes:
            return None
        if not self.counters[Counter.SPARSE_STEPS]:
            return "the sparse path never ran"
        if self.counters[Counter.PAGES_READ] >= self.counters[Counter.PAGES_HELD]:
            return "every page was read, so that its time says nothing of sparse decoding"
        return None
