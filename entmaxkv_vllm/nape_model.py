"""vLLM's Llama with NAPE in place of rotary positions."""

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from entmaxkv_vllm.nape import QueryScale, read_nape


class NapeAttention(nn.Module):
    """Attention of this rank's heads, each with its own slope or scale. Made by vLLM's layer."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        quant_config: Any,
        bias: bool,
        bias_o_proj: bool,
        cache_config: Any,
        prefix: str,
        **unused: Any,
    ) -> None:
        super().__init__()
        nape = read_nape(vars(config))
        size = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            size,
            num_heads,
            num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * size,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sizes = [heads * size, kv_heads * size, kv_heads * size]
        self.first_head = get_tensor_model_parallel_rank() * heads
        slopes = list(nape.slopes[self.first_head : self.first_head + heads])
        self.attn_scale = QueryScale(nape, hidden_size) if nape.scale_type else None
        self.attn = Attention(
            heads,
            size,
            size**-0.5,
            num_kv_heads=kv_heads,
            alibi_slopes=slopes if any(slopes) else None,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self.sizes, dim=-1)
        if self.attn_scale is not None:
            query = query.unflatten(-1, (-1, self.attn.head_size))  # [T, H, D]
            query = self.attn_scale(query, positions, hidden_states, self.first_head).flatten(1)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output


class NapeDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=NapeAttention)


class NapeLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=NapeDecoderLayer)
