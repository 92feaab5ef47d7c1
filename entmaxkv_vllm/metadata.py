"""Per-step metadata: which rows of the batch decode, which prefill, and where their pages are."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills


@dataclass(frozen=True)
class Rows:
    """One kind of rows of the batch; sequences are contiguous in it.

    Attributes:
        first_token, last_token: their tokens are query[first_token:last_token].
        block_table: [sequences, max_pages] int32, kernel block ids.
        seq_lens: [sequences] int32, tokens in the cache after this step's append.
    """

    first_token: int
    last_token: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class PrefillRows(Rows):
    """Rows of several tokens each.

    Attributes:
        query_start_loc: [sequences + 1] int32, counted from the first of these tokens.
    """

    query_start_loc: torch.Tensor


@dataclass(frozen=True)
class EntmaxKVMetadata(AttentionMetadata):
    """Decode rows come first in the batch; either kind may be absent."""

    decode: Rows | None
    prefill: PrefillRows | None


class EntmaxKVMetadataBuilder(AttentionMetadataBuilder[EntmaxKVMetadata]):
    """Splits each batch into decode rows (one new token, prompt finished) and prefill rows."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> EntmaxKVMetadata:
        common = common_attn_metadata
        # A prompt's last chunk can be a single token: it is prefill all the same, and dense.
        decodes, prefills, decode_tokens, prefill_tokens = split_decodes_and_prefills(
            common, decode_threshold=1, treat_short_extends_as_decodes=False
        )
        table, lengths = common.block_table_tensor, common.seq_lens
        end, last_token = decodes + prefills, decode_tokens + prefill_tokens
        return EntmaxKVMetadata(
            decode=Rows(0, decode_tokens, table[:decodes], lengths[:decodes]) if decodes else None,
            prefill=PrefillRows(
                decode_tokens,
                last_token,
                table[decodes:end],
                lengths[decodes:end],
                common.query_start_loc[decodes : end + 1] - decode_tokens,
            )
            if prefills
            else None,
        )
