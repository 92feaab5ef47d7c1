"""A transformers model whose attention is `entmaxkv_kernels` over paged caches.

For measurements that prefill a batch of equally long prompts exactly, once, and then let one
selector after the other predict the tokens that follow. These tokens are known. So all of a
sequence go through the model at once, each as a decode step of its own that sees the keys before
it: what comes out is what decoding them one by one gives.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from entmaxkv_kernels import (
    Counter,
    PagedCache,
    PageLayout,
    Selector,
    allocate_pages,
    append,
    decode,
    prefill,
    split_pages,
)
from entmaxkv_kernels.pages import BOX
from entmaxkv_vllm.evaluate.errors import EvaluationError

PREFILL_TOKENS = 131072
"""Tokens that are prefilled at once."""

DECODE_STEPS = 1024
"""Decode steps of one call, which takes scratch memory for each."""

UNSUPPORTED = ("sliding_window", "softcap", "s_aux")
"""What models ask attention for that would have to be computed, too."""

Statistics = tuple[str, ...]

STATISTICS: tuple[Statistics, ...] = (("mean", "std"), BOX)
"""The sets of page statistics that all selectors together read."""


@dataclass
class Recorded:
    """Queries [tokens, heads, head_size] of a layer, what its scores are scaled by, and ALiBi's
    slopes [heads] if it has any."""

    query: Tensor
    scale: float
    slopes: Tensor | None


@dataclass
class Step:
    """What attention does in one pass of the model.

    caches: caches to append to, for each layer; attention reads the first.
    slots: [B * T] of the new tokens.
    positions: [T] of the new tokens, one after the other.
    selector: None prefills; a selector makes a decode step of each token.
    counters: what decode steps count.
    recorded: receives the queries of each layer, if given.
    """

    caches: list[list[PagedCache]]
    block_table: Tensor
    slots: Tensor
    positions: Tensor
    alpha: float | tuple[float, ...]
    implementation: str
    selector: Selector | None = None
    counters: Tensor | None = None
    recorded: dict[int, Recorded] | None = None


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    paged: Step,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls. # [B, H, T, D] -> [B, T, H, D]"""
    for name in UNSUPPORTED:
        if more.get(name) is not None:
            raise EvaluationError(
                f"the model's attention has {name}={more[name]}, which the evaluation does not "
                "compute; give a model without it"
            )
    batch, length = query.shape[0], query.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    caches = paged.caches[module.layer_idx]
    for cache in caches:
        append(cache, key, value, paged.slots, implementation=paged.implementation)
    slopes = getattr(module, "slopes", None)
    slopes = None if slopes is None else torch.tensor(slopes, device=query.device)
    if paged.recorded is not None:
        paged.recorded[module.layer_idx] = Recorded(query, scaling, slopes)
    attend = _prefill if paged.selector is None else _decode_each
    return attend(query, caches[0], paged, scaling, slopes).unflatten(0, (batch, length)), None


def _prefill(
    query: Tensor, cache: PagedCache, paged: Step, scale: float, slopes: Tensor | None
) -> Tensor:
    batch, length = len(paged.block_table), len(paged.positions)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
    seq_lens = (paged.positions[-1:] + 1).int().expand(batch).contiguous()
    return prefill(
        query,
        cache,
        paged.block_table,
        seq_lens,
        starts,
        scale=scale,
        alpha=paged.alpha,
        alibi_slopes=slopes,
        implementation=paged.implementation,
    )


def _decode_each(
    query: Tensor, cache: PagedCache, paged: Step, scale: float, slopes: Tensor | None
) -> Tensor:
    assert paged.selector is not None
    batch, length = len(paged.block_table), len(paged.positions)
    seq_lens = (paged.positions + 1).int().repeat(batch)
    rows = torch.arange(batch, device=query.device).repeat_interleave(length)
    steps = zip(
        *(x.split(DECODE_STEPS) for x in (query, rows, seq_lens)),
        strict=True,
    )
    return torch.cat(
        [
            decode(
                some,
                cache,
                paged.block_table[row],
                lens,
                scale=scale,
                alpha=paged.alpha,
                alibi_slopes=slopes,
                selector=paged.selector,
                counters=paged.counters,
                implementation=paged.implementation,
            )
            for some, row, lens in steps
        ]
    )


AttentionInterface.register("entmaxkv_paged", paged_attention)


@dataclass
class Predictions:
    """logits: [B, T, vocabulary] fp32. pages_read: share of the pages that were held."""

    logits: Tensor
    pages_read: float


@dataclass
class PagedModel:
    """A batch of sequences in paged caches, one for each set of page statistics.

    model: a causal model of transformers; its attention is replaced.
    alpha: of all query heads, or one for each.
    batch, longest: how many sequences of up to how many tokens.
    statistics: sets of page statistics to keep; see `PageLayout`.
    """

    model: PreTrainedModel
    alpha: float | tuple[float, ...]
    batch: int
    longest: int
    statistics: tuple[Statistics, ...] = STATISTICS
    page_size: int = 16
    caches: dict[Statistics, list[PagedCache]] = field(init=False)

    def __post_init__(self) -> None:
        self.model.set_attn_implementation("entmaxkv_paged")
        self.model.eval()
        device = self.model.device
        self.implementation = "triton" if device.type == "cuda" else "reference"
        pages = -(-self.longest // self.page_size)
        table = torch.arange(self.batch * pages, dtype=torch.int32, device=device)
        self.block_table = table.view(self.batch, pages)
        layers = range(self.model.config.num_hidden_layers)
        self.caches = {
            kept: [self._new_cache(kept, self.batch * pages) for _ in layers]
            for kept in self.statistics
        }

    def _new_cache(self, statistics: Statistics, pages: int) -> PagedCache:
        config = self.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layout = PageLayout(self.page_size, size, statistics)
        raw = allocate_pages(
            pages, config.num_key_value_heads, layout, self.model.dtype, self.model.device
        )
        return split_pages(raw, layout)

    def statistics_of(self, selector: Selector) -> Statistics:
        """Of the sets that are kept, one that the selector can decode with."""
        return selector.statistics if selector.statistics else next(iter(self.caches))

    def _step(
        self, first: int, length: int, table: Tensor, caches: list[list[PagedCache]], **more: Any
    ) -> Step:
        """A pass over `length` tokens from a position on, of the sequences of a block table."""
        positions = torch.arange(first, first + length, device=table.device)
        pages = table.long()[:, positions // self.page_size]
        slots = (pages * self.page_size + positions % self.page_size).flatten()
        return Step(caches, table, slots, positions, self.alpha, self.implementation, **more)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, recorded: dict[int, Recorded] | None = None) -> None:
        """Fill every cache with tokens [B, T].

        recorded: receives the queries of each layer, of the last sequences that were prefilled at
            once: for a batch of one.
        """
        caches = [list(layer) for layer in zip(*self.caches.values(), strict=True)]
        length = tokens.shape[1]
        rows = max(1, PREFILL_TOKENS // length)
        for part, table in zip(tokens.split(rows), self.block_table.split(rows), strict=True):
            step = self._step(0, length, table, caches, recorded=recorded)
            self.model.base_model(
                input_ids=part, position_ids=step.positions[None], use_cache=False, paged=step
            )

    @torch.inference_mode()
    def predict(self, tokens: Tensor, first: int, selector: Selector) -> Predictions:
        """What follows each of tokens [B, T], the first of which stands at position `first`, all
        before it having been prefilled, if a selector decodes them one by one."""
        caches = [[cache] for cache in self.caches[self.statistics_of(selector)]]
        counters = torch.zeros(len(Counter), dtype=torch.int64, device=tokens.device)
        step = self._step(
            first, tokens.shape[1], self.block_table, caches, selector=selector, counters=counters
        )
        logits: Tensor = self.model(
            input_ids=tokens, position_ids=step.positions[None], use_cache=False, paged=step
        ).logits
        read, held = (counters[at].item() for at in (Counter.PAGES_READ, Counter.PAGES_HELD))
        return Predictions(logits.float(), read / held)
