"""Per-step metadata: which rows of the batch decode, which prefill, and where their pages are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from entmaxkv_vllm.config import from_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class DecodeRows:
    """Sequences of one new token each, which are the first of the batch.

    A CUDA graph keeps what is in here, so every tensor is a view of memory that stays.

    Attributes:
        count: how many; their tokens are query[:count]. Those past the batch are padding, of
            length 0.
        block_table: [count, max_pages] int32, kernel block ids.
        seq_lens: [count] int32, tokens in the cache after this step's append.
        exact: [count] bool, sequences whose prompt is not finished, which are read whole; None if
            all are.
    """

    count: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    exact: torch.Tensor | None


@dataclass(frozen=True)
class PrefillRows:
    """Sequences of several new tokens each, and all after the first of these.

    Attributes:
        last_token: their tokens end there in the batch.
        block_table: [sequences, max_pages] int32.
        seq_lens: [sequences] int32.
        query_start_loc: [sequences + 1] int32, counted from the first token of the batch.
    """

    last_token: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor


@dataclass(frozen=True)
class EntmaxKVMetadata(AttentionMetadata):
    """Either kind of rows may be absent.

    Attributes:
        slot_mapping: [tokens] int64, where the new tokens are appended; negative for padding.
    """

    slot_mapping: torch.Tensor
    decode: DecodeRows | None
    prefill: PrefillRows | None


class EntmaxKVMetadataBuilder(AttentionMetadataBuilder[EntmaxKVMetadata]):
    """Splits each batch into rows of one token, which decode, and rows of several, which prefill.

    The last chunk of a prompt can be a single token. vLLM runs it in the CUDA graphs of decoding,
    so it decodes here too, always exactly.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.max_pages = -(-vllm_config.model_config.max_model_len // kv_cache_spec.block_size)
        self._exact: torch.Tensor | None = None
        if from_vllm(vllm_config).selector != "exact":
            rows = vllm_config.scheduler_config.max_num_seqs
            self._exact = torch.zeros(rows, dtype=torch.bool, device=device)
            self._exact_on_host = np.zeros(rows, dtype=np.bool_)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: "VllmConfig", kv_cache_spec: Any
    ) -> AttentionCGSupport:
        """The reference looks at lengths on the host, which no CUDA graph can."""
        if from_vllm(vllm_config).kernels == "reference":
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> EntmaxKVMetadata:
        common, end = common_attn_metadata, common_attn_metadata.num_reqs
        starts = common.query_start_loc_cpu[: end + 1].numpy()
        longer = np.flatnonzero(np.diff(starts) > 1)
        decodes = int(longer[0]) if len(longer) else end
        # Columns past the longest sequence that may be would be planned for in vain.
        table, lengths = common.block_table_tensor[:, : self.max_pages], common.seq_lens
        decode = prefill = None
        if decodes:
            exact = self._unfinished(common.is_prefilling, decodes)
            decode = DecodeRows(decodes, table[:decodes], lengths[:decodes], exact)
        if decodes < end:
            prefill = PrefillRows(
                common.num_actual_tokens,
                table[decodes:end],
                lengths[decodes:end],
                common.query_start_loc[decodes : end + 1],
            )
        return EntmaxKVMetadata(common.slot_mapping, decode, prefill)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> EntmaxKVMetadata:
        """Rows of length 0, which read nothing and count nowhere: a graph replays any lengths."""
        common_attn_metadata.seq_lens.fill_(0)
        return self.build(0, common_attn_metadata)

    def _unfinished(self, prefilling: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        """[rows] bool on the device, sequences whose prompt is not finished. Padding is."""
        if self._exact is None:
            return None
        wanted = np.zeros_like(self._exact_on_host)
        if prefilling is not None:
            given = prefilling[:rows].numpy()
            wanted[: len(given)] = given
        if not np.array_equal(wanted, self._exact_on_host):
            self._exact_on_host = wanted
            flags = torch.from_numpy(wanted)
            # The memory of a copy under way is pinned and not reused before its end.
            flags = flags.pin_memory() if self._exact.is_cuda else flags
            self._exact.copy_(flags, non_blocking=True)
        return self._exact[:rows]
