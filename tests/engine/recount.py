"""What decode steps of a running engine should have counted, found out without its counters."""

from collections import Counter as Tally
from dataclasses import dataclass

import torch

from entmaxkv_kernels import Counter, PagedCache, decode, split_pages
from entmaxkv_vllm.impl import EntmaxKVImpl

RECORDED = 3
"""Steps of each engine that are kept whole."""


@dataclass(frozen=True)
class RecordedStep:
    """Everything that one layer's decode step was given, and what it counted."""

    query: torch.Tensor
    raw: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    exact: torch.Tensor | None
    impl: EntmaxKVImpl
    counted: dict[Counter, int]

    def decode(self, cache: PagedCache) -> torch.Tensor:
        """The step again, over a cache of the same layout."""
        return decode(
            self.query,
            cache,
            self.block_table,
            self.lengths,
            scale=self.impl.scale,
            alpha=self.impl.alpha,
            selector=self.impl.selector,
            exact_rows=self.exact,
            exact_below=self.impl.config.exact_below,
        )

    def pages_read(self) -> int:
        """Pages on whose keys the output depends, summed over sequences and KV heads.

        One position after another, the keys of all sequences' pages there are made NaN; statistics
        stay as they were. Whatever the selector, a page was read where the output becomes NaN.
        """
        layout, kv_heads = self.impl.layout, self.impl.num_kv_heads
        held = -(-self.lengths // layout.page_size)
        read = 0
        for position in range(int(held.max())):
            cache = split_pages(self.raw.clone(), layout)
            there = held > position
            cache.key[self.block_table[there, position].long()] = torch.nan
            poisoned = self.decode(cache).unflatten(1, (kv_heads, -1)).isnan().any(-1).any(-1)
            assert not poisoned[~there].any()
            read += int(poisoned.sum())
        return read


class Recount:
    """Adds up, from lengths alone, what steps should count; keeps a few steps whole.

    Attributes:
        expected: totals by counter, of those that lengths tell: PAGES_READ only for `topk`.
        recorded: steps of several sequences, some of them sparse.
    """

    def __init__(self) -> None:
        self.expected: Tally[Counter] = Tally()
        self.recorded: list[RecordedStep] = []
        self._calls = 0

    def note_appended(self, impl, slots):
        """Count the pages that one layer is about to write to."""
        pages = {slot // impl.config.page_size for slot in slots.tolist() if slot >= 0}
        self.expected[Counter.APPENDED_PAGES] += impl.num_kv_heads * len(pages)

    def watch(self, impl, layer, query, rows, decode):
        """Run one layer's decode and note what it should have counted."""
        config = impl.config
        sparse = rows.seq_lens > config.exact_below
        if rows.exact is not None:
            sparse &= ~rows.exact
        held = -(-rows.seq_lens // config.page_size)
        read = held
        if config.selector == "topk":
            chosen = torch.clamp(held - 1, max=config.token_budget // config.page_size) + 1
            read = torch.where(sparse, chosen, held)
        steps = int((rows.seq_lens > 0).sum())
        self.expected += Tally(
            {
                Counter.STEPS: steps,
                Counter.SPARSE_STEPS: int(sparse.sum()),
                Counter.PAGES_HELD: impl.num_kv_heads * int(held.sum()),
                Counter.PAGES_READ: impl.num_kv_heads * int(read.sum()),
                Counter.QUERY_HEADS: impl.num_heads * steps,
            }
        )
        row = impl.counters.row(impl.index_of(layer), query.device)
        self._calls += 1
        kept = len(self.recorded) < RECORDED and self._calls > 200 * (len(self.recorded) + 1)
        if not (kept and rows.count > 2 and sparse.any()):
            decode()
            return
        before, given = row.clone(), (query[: rows.count].clone(), layer.kv_cache.clone())
        decode()
        counted = {counter: int((row - before)[counter]) for counter in Counter}
        exact = None if rows.exact is None else rows.exact.clone()
        places = rows.block_table.clone(), rows.seq_lens.clone()
        self.recorded.append(RecordedStep(*given, *places, exact, impl, counted))
