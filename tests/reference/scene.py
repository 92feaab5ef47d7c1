"""Ragged batches in a paged cache in which everything that is not theirs is poison."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entmaxkv_kernels import (
    PagedCache,
    PageLayout,
    allocate_pages,
    append,
    decode,
    prefill,
    split_pages,
)

from .dense import dense_attention

STALE = 10**8
"""A page id out of range, for entries of the block table that are not the sequence's."""


def slots_of(pages: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Slots of positions in a sequence that has these pages."""
    return pages[positions // page_size].long() * page_size + positions % page_size


@dataclass
class Scene:
    """Sequences with their tokens in a paged cache; the queries are those of all positions."""

    cache: PagedCache
    block_table: Tensor
    seq_lens: Tensor
    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    scale: float

    @property
    def page_size(self) -> int:
        return self.cache.layout.page_size

    @property
    def last_queries(self) -> Tensor:
        """[B, query_heads, head_size]; zeros for a sequence of length 0."""
        heads = self.query[0].shape[1:]
        return torch.stack([q[-1] if len(q) else q.new_zeros(heads) for q in self.query])

    def slots(self, sequence: int, start: int, end: int) -> Tensor:
        return slots_of(self.block_table[sequence], torch.arange(start, end), self.page_size)

    def append(self, sequence: int, start: int, end: int) -> None:
        """Append positions start to end of one sequence."""
        key, value = self.key[sequence][start:end], self.value[sequence][start:end]
        append(self.cache, key, value, self.slots(sequence, start, end))

    def append_all(self) -> None:
        slots = [self.slots(b, 0, len(key)) for b, key in enumerate(self.key)]
        append(self.cache, torch.cat(self.key), torch.cat(self.value), torch.cat(slots))

    def prefill(self, query_lens: list[int] | None = None, **options: Any) -> list[Tensor]:
        """Prefill the last query_lens tokens of each sequence, by default all of them."""
        query_lens = query_lens or self.seq_lens.tolist()
        query = [q[len(q) - n :] for q, n in zip(self.query, query_lens, strict=True)]
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        context = self.cache, self.block_table, self.seq_lens
        options = {"scale": self.scale, "alpha": 1.5} | options
        out = prefill(torch.cat(query), *context, starts, **options)
        return list(out.split(query_lens))

    def decode(self, **options: Any) -> Tensor:
        options = {"scale": self.scale, "alpha": 1.5} | options
        return decode(self.last_queries, self.cache, self.block_table, self.seq_lens, **options)

    def dense_prefill(self, query_lens: list[int] | None = None, **options: Any) -> list[Tensor]:
        query_lens = query_lens or self.seq_lens.tolist()
        options = {"alpha": 1.5} | options
        return [
            dense_attention(q[len(q) - n :], k, v, self.scale, **options)
            for q, k, v, n in zip(self.query, self.key, self.value, query_lens, strict=True)
        ]

    def dense_decode(self, **options: Any) -> Tensor:
        options = {"alpha": 1.5} | options
        rows = [
            dense_attention(q[-1:], k, v, self.scale, **options)[0] if len(q) else torch.zeros(1)
            for q, k, v in zip(self.query, self.key, self.value, strict=True)
        ]
        return torch.stack([row.expand(self.query[0].shape[1:]) for row in rows])


def make_scene(
    lengths: list[int],
    *,
    page_size: int = 16,
    head_size: int = 64,
    kv_heads: int = 2,
    group: int = 2,
    statistics: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    spread: float = 2.0,
    coherence: float = 0.0,
    seed: int = 0,
    filled: bool = True,
) -> Scene:
    """spread: standard deviation of the scores. coherence: share of a key's variance that the
    keys of a page have in common; the less is left, the better pages tell what they hold."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    def keys(length: int) -> Tensor:
        common = normal(-(-length // page_size), kv_heads, head_size)
        common = common.repeat_interleave(page_size, 0)[:length]
        own = normal(length, kv_heads, head_size)
        return coherence**0.5 * common + (1 - coherence) ** 0.5 * own

    layout = PageLayout(page_size, head_size, statistics)
    counts = [-(-n // page_size) for n in lengths]
    num_pages = sum(counts) + 3
    # Heads outermost: the first two strides of the pages are the engine's choice.
    raw = allocate_pages(kv_heads, num_pages, layout, dtype).fill_(torch.nan).transpose(0, 1)
    block_table = torch.full((len(lengths), max(counts) + 2), STALE, dtype=torch.int32)
    order = torch.randperm(num_pages, generator=random).int()
    for row, pages in zip(block_table, order.split([*counts, 3]), strict=False):
        row[: len(pages)] = pages
    scene = Scene(
        cache=split_pages(raw, layout),
        block_table=block_table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        query=[spread * normal(n, kv_heads * group, head_size) for n in lengths],
        key=[keys(n) for n in lengths],
        value=[normal(n, kv_heads, head_size) for n in lengths],
        scale=head_size**-0.5,
    )
    if filled:
        scene.append_all()
    return scene


def make_fp8_scene(
    lengths: list[int], *, key_scale: float, value_scale: float, **options: Any
) -> Scene:
    """The scene of `make_scene` over an fp8 cache. Keys and values are those that it holds, in
    float64; queries are of the dtype in the options, as were the keys and values appended."""
    scene = make_scene(lengths, filled=False, **options)
    layout = replace(scene.cache.layout, fp8=True)
    num_pages, kv_heads = scene.cache.key.shape[:2]
    raw = allocate_pages(kv_heads, num_pages, layout).fill_(torch.nan).transpose(0, 1)
    scene.cache = split_pages(raw, layout)
    # The bytes of several fp8 NaN are no wider NaN.
    (scene.cache.scales if layout.bounded else scene.cache.statistics).fill_(torch.nan)
    slots = [scene.slots(b, 0, n) for b, n in enumerate(lengths)]
    inputs = torch.cat(scene.key), torch.cat(scene.value), torch.cat(slots)
    append(scene.cache, *inputs, key_scale=key_scale, value_scale=value_scale)
    rows = [(slot // scene.page_size, slice(None), slot % scene.page_size) for slot in slots]
    scene.key = [scene.cache.key[row].double() * key_scale for row in rows]
    scene.value = [scene.cache.value[row].double() * value_scale for row in rows]
    return scene


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to an absolute tolerance; a NaN on either side fails."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any(), "the result holds NaN"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance, f"differs by {error:.3g}, more than {tolerance:.3g}"
