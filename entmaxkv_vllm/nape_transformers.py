"""Llama with NAPE for transformers: to train, and to evaluate without vLLM."""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from entmaxkv_vllm.nape import NapeLlamaConfig, QueryScale, read_nape


class NapeAttention(LlamaAttention):
    """Llama's attention without rotation; attention functions find the slopes in `slopes`."""

    def __init__(self, config: NapeLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        nape = read_nape(vars(config))
        self.slopes = nape.slopes
        self.attn_scale = QueryScale(nape, config.hidden_size) if nape.scale_type else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in projections
        )  # [B, T, H, D]
        if self.attn_scale is not None:
            query = self.attn_scale(query, position_ids, hidden_states)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, **more
        )
        return self.o_proj(output.flatten(2)), weights


class NapeLlamaForCausalLM(LlamaForCausalLM):
    config_class = NapeLlamaConfig

    def __init__(self, config: NapeLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = NapeAttention(config, index)
        self.post_init()


AutoConfig.register(NapeLlamaConfig.model_type, NapeLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(NapeLlamaConfig, NapeLlamaForCausalLM, exist_ok=True)
