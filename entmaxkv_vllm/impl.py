"""One layer's forward: append to the pages, then prefill and decode over them."""

from typing import Any, ClassVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from entmaxkv_kernels import Exact, NewTokens, PagedCache, append, decode, prefill, split_pages
from entmaxkv_kernels.pages import FP8
from entmaxkv_vllm import cache, compat, scratch, telemetry
from entmaxkv_vllm.config import OTHER_BACKEND, ConfigurationError, from_vllm
from entmaxkv_vllm.metadata import DecodeRows, EntmaxKVMetadata, PrefillRows
from entmaxkv_vllm.warm_up import compile_kernels


class EntmaxKVImpl(AttentionImpl[EntmaxKVMetadata]):
    """Entmax attention of one layer over vLLM's paged cache.

    Raises:
        ConfigurationError: for settings of the model that entmax attention has no meaning for.
    """

    is_sparse: ClassVar[bool] = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        if logits_soft_cap:
            raise ConfigurationError(
                "logits_soft_cap", logits_soft_cap, "is not supported by ENTMAXKV", OTHER_BACKEND
            )
        if extra:
            raise ConfigurationError(
                "attention option", sorted(extra), "is not supported by ENTMAXKV", OTHER_BACKEND
            )
        vllm_config = get_current_vllm_config()
        self.config = from_vllm(vllm_config)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alpha = self.config.head_alphas(
            get_tensor_model_parallel_rank() * num_heads, num_heads
        )
        self.alibi_slopes = (
            None
            if alibi_slopes is None
            # Outside the memory of weights, which a deep sleep discards.
            else torch.tensor(alibi_slopes, dtype=torch.float32, device="cpu")
        )
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.selector = cache.selector_of(self.config)
        self.fp8 = cache.is_fp8(kv_cache_dtype)
        self.layout = cache.page_layout(self.config, head_size, self.fp8)
        self.kernels = self.config.kernels
        self.max_sequences = vllm_config.scheduler_config.max_num_seqs
        self.max_batched_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.max_tokens = _whole_pages(
            vllm_config.model_config.max_model_len, self.config.page_size
        )
        self.local_workers = vllm_config.parallel_config.local_world_size
        self.flags_resumed = compat.flags_resumed(vllm_config)
        self.counters = telemetry.worker_counters(vllm_config)
        self._warm = False
        self._layer_index: int | None = None
        # What vLLM frees must not stay because of its views.
        self._pages: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: EntmaxKVMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append this step's keys and values to their pages, then attend.

        Args:
            query: [tokens, query_heads, head_size]; rows past the batch's tokens are padding.
            key, value: [tokens, kv_heads, head_size]; not looked at by a layer that reads the
                cache of another one.
            output: shape of query, written in place.
        """
        if attn_metadata is None:
            self._prepare(layer, query)
            return output.fill_(0)
        pages = self.pages(layer, kv_cache)
        options: dict[str, Any] = {
            "scale": self.scale,
            "alpha": self.alpha,
            "alibi_slopes": self.alibi_slopes,
            "sliding_window": self.sliding_window,
            "workspace": self._workspace(query),
            "implementation": self.kernels,
            **self._scales(layer),
        }
        if self.kernels == "triton" and not self._warm:
            self._warm = compile_kernels(self, layer, query, pages, attn_metadata, options)
        rows, new_tokens = attn_metadata.decode, None
        if self.kv_sharing_target_layer_name is None:
            slots = attn_metadata.slot_mapping
            if (
                rows is not None
                and attn_metadata.prefill is None
                and self.decode_appends(pages, rows)
            ):
                new_tokens = NewTokens(key[: rows.count], value[: rows.count], slots[: rows.count])
            else:
                self.append_tokens(layer, key, value, pages, slots)
        if rows is not None:
            self._decode(layer, query, pages, rows, output, options, new_tokens)
        if attn_metadata.prefill is not None:
            self.prefill_rows(query, pages, attn_metadata.prefill, output, options)
        return output

    def decode_appends(self, pages: PagedCache, rows: DecodeRows) -> bool:
        """Whether one call can append the tokens of a batch and decode it.

        A sequence that ranks its pages must not have one that another fills in this step. Only one
        in its first step can have it, which is flagged and so read whole; `exact` that prunes flags
        none, but is never appended to while it ranks.
        """
        safe = self.flags_resumed or not pages.layout.statistics or isinstance(self.selector, Exact)
        return safe and rows.count <= scratch.DECODE_ROWS

    def append_tokens(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: PagedCache,
        slot_mapping: torch.Tensor,
    ) -> None:
        tokens = len(slot_mapping)
        append(
            pages,
            key[:tokens],
            value[:tokens],
            slot_mapping,
            counters=self.counters.row(self.index_of(layer), key.device),
            implementation=self.kernels,
            **self._scales(layer),
        )

    def _decode(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        pages: PagedCache,
        rows: DecodeRows,
        output: torch.Tensor,
        options: dict[str, Any],
        new_tokens: NewTokens | None,
    ) -> None:
        index = self.index_of(layer)
        self.decode_rows(index, query, pages, rows, output, options, new_tokens)
        self.counters.publish(index)

    def decode_rows(
        self,
        index: int,
        query: torch.Tensor,
        pages: PagedCache,
        rows: DecodeRows,
        output: torch.Tensor,
        options: dict[str, Any],
        new_tokens: NewTokens | None = None,
    ) -> None:
        """Decode as many sequences at a time as scratch is planned for, which may be given with
        their new tokens."""
        sparse = bool(pages.layout.statistics)
        certificates = self._certificates(query)
        for first in range(0, rows.count, scratch.DECODE_ROWS):
            part = slice(first, min(rows.count, first + scratch.DECODE_ROWS))
            decode(
                query[part],
                pages,
                rows.block_table[part],
                rows.seq_lens[part],
                selector=self.selector if sparse else Exact(),
                exact_rows=rows.exact[part] if sparse and rows.exact is not None else None,
                exact_below=self.config.exact_below,
                counters=self.counters.row(index, query.device),
                out=output[part],
                certificate=None if certificates is None else certificates[: part.stop - first],
                new_tokens=new_tokens,
                **options,
            )

    def prefill_rows(
        self,
        query: torch.Tensor,
        pages: PagedCache,
        rows: PrefillRows,
        output: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        prefill(
            query[: rows.last_token],
            pages,
            rows.block_table,
            rows.seq_lens,
            rows.query_start_loc,
            out=output[: rows.last_token],
            **options,
        )

    def _prepare(self, layer: AttentionLayer, query: torch.Tensor) -> None:
        """While vLLM profiles its memory: take what steps will take, and what graphs will read."""
        self._workspace(query)
        self._certificates(query)
        self.counters.row(self.index_of(layer), query.device)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(query.device)

    def _scales(self, layer: AttentionLayer) -> dict[str, Any]:
        """What the numbers in an fp8 cache are multiplied by."""
        if not self.fp8:
            return {}
        return {"key_scale": layer._k_scale_float, "value_scale": layer._v_scale_float}

    def _workspace(self, query: torch.Tensor) -> torch.Tensor | None:
        if self.kernels == "reference":
            return None
        size = scratch.plan(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.config.page_size,
            FP8 if self.fp8 else query.dtype,
            query.dtype,
            self.max_tokens,
            self.max_sequences,
            self.selector,
            self.config.exact_below,
            self.config.certificate,
            query.device,
        )
        return scratch.take(size, query.device)

    def _certificates(self, query: torch.Tensor) -> torch.Tensor | None:
        if not self.config.certificate:
            return None
        return scratch.certificates(self.num_heads, query.device)

    def index_of(self, layer: AttentionLayer) -> int:
        """Index of `layer` in the whole model."""
        if self._layer_index is None:
            self._layer_index = extract_layer_index(layer.layer_name)
        return self._layer_index

    def pages(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> PagedCache:
        """This layer's keys, values and statistics in vLLM's cache tensor."""
        pages: PagedCache | None = self._pages.get(kv_cache)
        if pages is None:
            pages = split_pages(kv_cache.view(FP8) if self.fp8 else kv_cache, self.layout)
            if self._reads_every_page(layer):
                pages = cache.without_statistics(pages)
            self._pages[kv_cache] = pages
        return pages

    def _reads_every_page(self, layer: AttentionLayer) -> bool:
        indices = {self.index_of(layer)}
        if self.kv_sharing_target_layer_name is not None:
            # The statistics in a shared cache are kept by the layer that owns it.
            indices.add(extract_layer_index(self.kv_sharing_target_layer_name))
        return self.sliding_window is not None or not indices.isdisjoint(self.config.dense_layers)


def _whole_pages(tokens: int, page_size: int) -> int:
    """Tokens of as many whole pages as hold that many."""
    return -(-tokens // page_size) * page_size
