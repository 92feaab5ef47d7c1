"""A transformers model whose attention is `entmaxkv_kernels` over paged caches.

For measurements that need a batch of equally long prompts, prefilled once and then decoded by one
selector after the other, token by token, with the kernels that serve.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from entmaxkv_kernels import (
    Adaptive,
    Exact,
    Gaussian,
    PagedCache,
    PageLayout,
    Selector,
    TopK,
    allocate_pages,
    append,
    decode,
    prefill,
    split_pages,
)
from entmaxkv_kernels.pages import BOX
from entmaxkv_kernels.selectors import CompiledSelector
from entmaxkv_vllm.config import GAUSSIAN

PREFILL_TOKENS = 131072
"""Tokens that are prefilled at once."""

Statistics = tuple[str, ...]

STATISTICS: tuple[Statistics, ...] = (("mean", "std"), BOX)
"""The sets of page statistics that all selectors together read."""


def parse_selector(name: str) -> Selector:
    """`exact`, `gaussian`, `gaussian-paper`, `topk:N` with a budget of N tokens, or `adaptive:R` with
    a reach of R.

    Raises ValueError for any other name.
    """
    kind, _, budget = name.partition(":")
    if kind == "topk" and budget.isdecimal():
        return TopK(int(budget))
    if kind == "adaptive" and budget:
        return Adaptive(reach=float(budget))
    if name == "exact":
        return Exact()
    if name in GAUSSIAN:
        return Gaussian(shared_spread=name == "gaussian-paper")
    expected = "exact, gaussian, gaussian-paper, topk:TOKENS or adaptive:REACH"
    raise ValueError(f"selector is {name!r}; expected {expected}")


def implementation_for(selector: Selector, preferred: str) -> str:
    """The preferred implementation, or the reference for a selector without compiled kernels."""
    return preferred if isinstance(selector, CompiledSelector) else "reference"


@dataclass
class Step:
    """What attention does in one pass of the model.

    caches: caches to append to, for each layer; attention reads the first.
    slots: [B * T] of the new tokens.
    seq_lens: [B] with the new tokens.
    selector: None prefills; a selector decodes one token of each sequence.
    queries: receives, for each layer, the queries [B * T, heads, head_size], if given.
    """

    caches: list[list[PagedCache]]
    block_table: Tensor
    slots: Tensor
    seq_lens: Tensor
    alpha: float
    implementation: str
    selector: Selector | None = None
    queries: dict[int, Tensor] | None = None


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    paged: Step,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls. # [B, H, T, D] -> [B, T, H, D]"""
    batch, length = query.shape[0], query.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    caches = paged.caches[module.layer_idx]
    for cache in caches:
        append(cache, key, value, paged.slots, implementation=paged.implementation)
    settings: dict[str, Any] = {
        "scale": scaling,
        "alpha": paged.alpha,
        "implementation": paged.implementation,
    }
    shared = query, caches[0], paged.block_table, paged.seq_lens
    if paged.queries is not None:
        paged.queries[module.layer_idx] = query
    if paged.selector is not None:
        settings["implementation"] = implementation_for(paged.selector, paged.implementation)
        out = decode(*shared, selector=paged.selector, **settings)
    else:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
        out = prefill(*shared, starts, **settings)
    return out.unflatten(0, (batch, length)), None


AttentionInterface.register("entmaxkv_paged", paged_attention)


class PagedModel:
    """A batch of sequences in paged caches, one for each set of page statistics.

    model: a causal model of transformers; its attention is replaced.
    statistics: sets of page statistics to keep; see `PageLayout`.
    graphs: decode in CUDA graphs, on a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        longest: int,
        statistics: tuple[Statistics, ...] = STATISTICS,
        page_size: int = 16,
        graphs: bool = True,
    ) -> None:
        model.set_attn_implementation("entmaxkv_paged")
        config, device = model.config, model.device
        self.model = model.eval()
        self.batch = batch
        self.alpha: float = config.entmax_alpha
        self.page_size = page_size
        self.implementation = "triton" if device.type == "cuda" else "reference"
        pages = -(-longest // page_size)
        table = torch.arange(batch * pages, dtype=torch.int32, device=device)
        self.block_table = table.view(batch, pages)
        self.caches = {
            kept: [self._new_cache(kept, batch * pages) for _ in range(config.num_hidden_layers)]
            for kept in statistics
        }
        # What a captured step reads: the tokens to decode, and their position.
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs: dict[Selector, tuple[torch.cuda.CUDAGraph, Tensor]] | None
        self._graphs = {} if graphs and device.type == "cuda" else None

    def _new_cache(self, statistics: Statistics, pages: int) -> PagedCache:
        config = self.model.config
        layout = PageLayout(self.page_size, config.head_dim, statistics)
        raw = allocate_pages(
            pages, config.num_key_value_heads, layout, self.model.dtype, self.model.device
        )
        return split_pages(raw, layout)

    def statistics_of(self, selector: Selector) -> Statistics:
        """Of the sets that are kept, one that the selector can decode with."""
        return selector.statistics if selector.statistics else next(iter(self.caches))

    def _hidden(
        self,
        tokens: Tensor,
        position: Tensor,
        table: Tensor,
        caches: list[list[PagedCache]],
        **more: Any,
    ) -> Tensor:
        """Last hidden states [rows, T, hidden] of tokens [rows, T] at positions [T].

        table: [rows, pages], the part of the block table of these rows.
        """
        slots = table.long()[:, :1] * self.page_size + position
        seq_lens = (position[-1:] + 1).int().expand(len(tokens)).contiguous()
        settings = self.alpha, self.implementation
        step = Step(caches, table, slots.flatten(), seq_lens, *settings, **more)
        base = self.model.base_model
        output = base(input_ids=tokens, position_ids=position[None], use_cache=False, paged=step)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, queries: dict[int, Tensor] | None = None) -> Tensor:
        """Fill every cache with tokens [B, T]; returns the last hidden states [B, T, hidden].

        queries: receives the queries [T, heads, head_size] of each layer, of the last sequences
            that were prefilled at once: for a batch of one.
        """
        caches = [list(layer) for layer in zip(*self.caches.values(), strict=True)]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        rows = max(1, PREFILL_TOKENS // tokens.shape[1])
        return torch.cat(
            [
                self._hidden(part, position, table, caches, queries=queries)
                for part, table in zip(
                    tokens.split(rows), self.block_table.split(rows), strict=True
                )
            ]
        )

    @torch.inference_mode()
    def decode(self, tokens: Tensor, position: int, selector: Selector) -> Tensor:
        """Logits [B, vocabulary] after tokens [B] at a position, which all before it precede.

        The next call overwrites them.
        """
        self._tokens.copy_(tokens[:, None])
        self._position.fill_(position)
        if self._graphs is None or isinstance(selector, Adaptive):
            return self._decode(selector)
        if selector not in self._graphs:
            try:
                self._graphs[selector] = self._capture(selector)
            except RuntimeError as error:
                # A measurement without graphs takes longer, and says the same.
                print(f"no CUDA graphs: {error}", flush=True)
                self._graphs = None
                return self._decode(selector)
        graph, logits = self._graphs[selector]
        graph.replay()
        return logits

    def _decode(self, selector: Selector) -> Tensor:
        caches = [[cache] for cache in self.caches[self.statistics_of(selector)]]
        hidden = self._hidden(
            self._tokens, self._position, self.block_table, caches, selector=selector
        )
        logits: Tensor = self.model.get_output_embeddings()(hidden[:, -1])
        return logits

    def _capture(self, selector: Selector) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._decode(selector)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                logits = self._decode(selector)
        torch.cuda.synchronize()
        return graph, logits
