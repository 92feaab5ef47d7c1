"""A Llama with softmax or entmax and with rotary positions or NAPE, and its files."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import BOS, EOS, PAD, VOCABULARY_SIZE, byte_tokenizer
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from entmaxkv_kernels.triton.training import entmax_attention
from entmaxkv_vllm.nape import NapeLlamaConfig
from entmaxkv_vllm.nape_transformers import NapeLlamaForCausalLM

HEAD_DIM = 64
POSITIONS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "rotary": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "nape": (
        NapeLlamaConfig,
        NapeLlamaForCausalLM,
        {"alibi_slope_type": "geometric", "attn_scale_type": "learn"},
    ),
}
"""Classes of the configuration and the model, and what the configuration says of positions."""


def attention_of(alpha: float) -> str:
    """The name by which transformers knows the attention of an alpha from 1 to 2.

    Raises ValueError for any other.
    """
    if not 1 <= alpha <= 2:
        raise ValueError(f"alpha is {alpha:g}: give a number from 1 (softmax) to 2")
    return "sdpa" if alpha == 1 else "entmax"


def trained_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in the form that transformers calls. # [B, H, T, D] -> [B, T, H, D]"""
    # Autocast leaves rotated queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    slopes = getattr(module, "slopes", None)
    attend = entmax_attention if query.is_cuda else dense_entmax_attention
    config: Any = module.config
    return attend(query, key, value, scaling, slopes, config.entmax_alpha).transpose(1, 2), None


def dense_entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    slopes: tuple[float, ...] | None,
    alpha: float,
) -> Tensor:
    """What `entmax_attention` computes, without a GPU, from all scores at once."""
    from entmax import entmax15, entmax_bisect

    weigh = entmax15 if alpha == 1.5 else partial(entmax_bisect, alpha=alpha)

    group = query.shape[1] // key.shape[1]
    kept = value.dtype
    query, key, value = (
        query.float(),
        *(x.float().repeat_interleave(group, 1) for x in (key, value)),
    )
    position = torch.arange(query.shape[2])
    distance = position - position[:, None]
    scores = scale * query @ key.mT
    if slopes is not None:
        scores = scores + torch.tensor(slopes)[:, None, None] * distance
    weights = weigh(scores.masked_fill(distance > 0, -torch.inf), dim=-1)
    return (weights @ value).to(kept)


AttentionInterface.register("entmax", trained_attention)


def new_model(
    *,
    alpha: float,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    key_heads: int,
    longest: int,
    positions: str = "rotary",
) -> LlamaForCausalLM:
    """A freshly initialised model for sequences of up to `longest` bytes."""
    config_class, model_class, settings = POSITIONS[positions]
    config = config_class(
        **settings,
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=longest,
        initializer_range=0.6 * hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        entmax_alpha=alpha,
        attn_implementation=attention_of(alpha),
    )
    return model_class(config)


def load_model(folder: Path, device: str) -> LlamaForCausalLM:
    """The saved model in the dtype of its weights, with the attention that its config names."""
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention_of(config.entmax_alpha), dtype="auto"
    ).to(device)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes bfloat16 weights, the configuration and the tokenizer."""
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    half = type(model)(model.config).bfloat16()
    half.load_state_dict(weights)
    half.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    half.save_pretrained(folder)
    byte_tokenizer(model.config.max_position_embeddings).save_pretrained(folder)
