"""What the arms of a kernel benchmark read: the same keys, values, queries and block tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from entmaxkv_kernels import PagedCache, PageLayout, allocate_pages, append, split_pages
from entmaxkv_kernels.reference.entmax import entmax_threshold_sort
from entmaxkv_vllm.bench.batch import Request

ALPHA = 1.5
CHUNK = 1 << 16


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention layer; `device` and `dtype` of its cache."""

    query_heads: int
    kv_heads: int
    head_size: int
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    @property
    def implementation(self) -> str:
        return "triton" if self.device == "cuda" else "reference"

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize


def clustered_keys(tokens: int, kv_heads: int, head_size: int, device: str) -> torch.Tensor:
    """Keys [tokens, kv_heads, head_size] of topics that last some 128 tokens, with noise.

    Half of the variance is a topic's, drawn from 64 recurring ones per head; half is the token's.
    """
    topics = torch.randn(64, kv_heads, head_size, device=device)
    changes = torch.rand(tokens, device=device) < 1 / 128
    segment = changes.cumsum(0)
    topic_of = torch.randint(64, (int(segment[-1]) + 1,), device=device)
    keys = topics[topic_of[segment]] + torch.randn(tokens, kv_heads, head_size, device=device)
    return keys * 0.5**0.5


@dataclass(frozen=True)
class Pool:
    """Tokens in the order of their pages, and caches that hold them.

    key, value: [tokens, kv_heads, head_size], whole pages.
    """

    shape: Shape
    key: torch.Tensor
    value: torch.Tensor
    _caches: dict[tuple[str, ...], PagedCache] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape, tokens: int, data: str) -> "Pool":
        """`tokens` keys, `random` (normal numbers) or `clustered`, and random values."""
        size = (tokens, shape.kv_heads, shape.head_size)
        key = torch.empty(size, dtype=shape.dtype, device=shape.device)
        value = torch.empty_like(key)
        for part, values in zip(key.split(CHUNK), value.split(CHUNK), strict=True):
            if data == "clustered":
                part.copy_(clustered_keys(len(part), *size[1:], shape.device))
            else:
                part.copy_(torch.randn(part.shape, device=shape.device))
            values.copy_(torch.randn(part.shape, device=shape.device))
        return cls(shape, key, value)

    @property
    def page_count(self) -> int:
        return len(self.key) // self.shape.page_size

    @property
    def paged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [pages, page_size, kv_heads, head_size], tokens outside heads."""
        size = (self.page_count, self.shape.page_size, *self.key.shape[1:])
        return self.key.view(size), self.value.view(size)

    def cache(self, statistics: tuple[str, ...]) -> PagedCache:
        """The same keys and values in this project's pages, made at the first call."""
        if statistics not in self._caches:
            shape = self.shape
            layout = PageLayout(shape.page_size, shape.head_size, statistics)
            raw = allocate_pages(self.page_count, shape.kv_heads, layout, shape.dtype, shape.device)
            cache = split_pages(raw, layout)
            slots = torch.arange(len(self.key), device=shape.device)
            parts = (x.split(CHUNK) for x in (self.key, self.value, slots))
            for key, value, slot in zip(*parts, strict=True):
                append(cache, key, value, slot, implementation=shape.implementation)
            self._caches[statistics] = cache
        return self._caches[statistics]


@dataclass(frozen=True)
class Workload:
    """One batch over several sets of pages.

    requests: B of them, those that decode first.
    tables: [sets, B, pages] int32, shuffled; 0 past a sequence's last page.
    queries: [sets, query tokens, query_heads, head_size].
    lengths: [B] int32, tokens in the cache.
    starts: [B + 1] int32, where each request's queries start.
    """

    pool: Pool
    requests: tuple[Request, ...]
    tables: torch.Tensor
    queries: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def over(
        cls,
        pool: Pool,
        requests: Sequence[Request],
        sets: int,
        support: float,
        table_tokens: int = 0,
    ) -> "Workload":
        """support: the share of tokens that a query head is to give weight, in the mean.
        table_tokens: what the block table has room for, at least the longest sequence."""
        shape = pool.shape
        counts = [-(-request.tokens // shape.page_size) for request in requests]
        width = max(*counts, -(-table_tokens // shape.page_size))
        order = torch.randperm(pool.page_count, dtype=torch.int32, device=shape.device)
        taken = order[: sets * sum(counts)].view(sets, -1).split(counts, 1)
        room = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in taken]
        tables = torch.stack(room, 1)
        new = [request.query for request in requests]
        queries = torch.randn(
            sets, sum(new), shape.query_heads, shape.head_size, device=shape.device
        )
        lengths = [request.tokens for request in requests]
        starts = [sum(new[:i]) for i in range(len(new) + 1)]
        made = cls(
            pool,
            tuple(requests),
            tables,
            queries,
            torch.tensor(lengths, dtype=torch.int32, device=shape.device),
            torch.tensor(starts, dtype=torch.int32, device=shape.device),
        )
        queries *= made._scale_for(support)
        return cls(pool, made.requests, tables, queries.to(shape.dtype), made.lengths, made.starts)

    @property
    def shape(self) -> Shape:
        return self.pool.shape

    @property
    def sets(self) -> int:
        return len(self.tables)

    @property
    def decodes(self) -> int:
        """How many requests decode."""
        return sum(request.decodes for request in self.requests)

    @property
    def kind(self) -> str:
        """`decode`, `prefill` or `mixed`."""
        if self.decodes == len(self.requests):
            return "decode"
        return "mixed" if self.decodes else "prefill"

    @property
    def longest(self) -> int:
        return max(request.tokens for request in self.requests)

    @property
    def longest_query(self) -> int:
        return max(request.query for request in self.requests)

    @property
    def table_tokens(self) -> int:
        """What the block table has room for."""
        return self.tables.shape[2] * self.shape.page_size

    def gathered(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One request's keys and values in its own order, [kv_heads, tokens, head_size]."""
        tokens = self.requests[request].tokens
        pages = self.tables[index, request, : -(-tokens // self.shape.page_size)].long()
        key, value = (x[pages].flatten(0, 1)[:tokens].transpose(0, 1) for x in self.pool.paged)
        return key.contiguous(), value.contiguous()

    def _scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Half of the scaled scores of the first request's last query, [group, tokens], and its
        values, of the first KV head, all fp64."""
        key, value = (x[0].double() for x in self.gathered(0, 0))
        group = self.shape.query_heads // self.shape.kv_heads
        query = self.queries[0, self.requests[0].query - 1, :group].double()
        return query @ key.T * ((ALPHA - 1) * self.shape.scale), value

    def _scale_for(self, support: float) -> float:
        """The factor of the queries that gives the wanted support, found by bisection."""
        scores, _ = self._scores()
        low, high = 1e-2, 1e2
        for _ in range(24):
            middle = math.sqrt(low * high)
            z = scores * middle
            share = (z > entmax_threshold_sort(z, ALPHA)[..., None]).double().mean().item()
            low, high = (middle, high) if share > support else (low, middle)
        return low

    def exact_error(self, out: torch.Tensor) -> float:
        """Relative error of an output of the first set, of the first request's last query and
        first KV head, against entmax in fp64."""
        z, value = self._scores()
        weights = (z - entmax_threshold_sort(z, ALPHA)[..., None]).clamp_min(0).square()
        exact = weights @ value / weights.sum(-1, keepdim=True)
        found = out[self.requests[0].query - 1, : len(exact)].double()
        return ((found - exact).norm() / exact.norm()).item()
