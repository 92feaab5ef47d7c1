"""An independent oracle: the same checkpoint in transformers, attention by the package `entmax`.

Nothing of this project computes here. Key and value heads are repeated for their group of query
heads, scores are materialised, and `entmax.entmax15` turns them into weights by sorting.
"""

from functools import partial
from pathlib import Path

import torch
from entmax import entmax15
from torch.nn.functional import rms_norm
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

NAME = "entmax_oracle"


def entmax_attention(
    module, query, key, value, attention_mask, scaling, sliding_window=None, **unused
):
    """Causal, alpha 1.5: [B, query_heads, T, D] over [B, kv_heads, N, D] keys and values."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    tokens, keys = query.shape[2], key.shape[2]
    hidden = torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)
    if sliding_window is not None:
        hidden |= torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens - sliding_window)
    output = torch.empty_like(query)
    # One head at a time where a score matrix is large.
    for heads in torch.arange(query.shape[1]).split(query.shape[1] if tokens == 1 else 1):
        scores = (query[:, heads] @ key[:, heads].mT) * scaling
        weights = entmax15(scores.masked_fill(hidden, float("-inf")), dim=-1, k=min(keys, 128))
        output[:, heads] = weights @ value[:, heads]
    return output.transpose(1, 2), None


def load(model: Path):
    """The checkpoint in float32 with entmax attention in every layer."""
    AttentionInterface.register(NAME, entmax_attention)
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation=NAME
    ).eval()


def load_float64(model: Path):
    """A Llama in float64, its norms too, which transformers would compute in float32.

    Angles of rotations stay those of float32, as in vLLM: they count as the model's own.
    """
    exact = load(model).double()
    for norm in exact.modules():
        if isinstance(norm, LlamaRMSNorm):
            norm.forward = partial(
                rms_norm,
                normalized_shape=norm.weight.shape,
                weight=norm.weight,
                eps=norm.variance_epsilon,
            )
    return exact


@torch.inference_mode()
def greedy(model, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """`tokens` greedy token ids after `prompt`, and the logits of each, [tokens, vocabulary]."""
    ids = torch.tensor([prompt])
    chosen, logits, cache = [], [], None
    for _ in range(tokens):
        step = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = step.past_key_values
        logits.append(step.logits[0, -1])
        chosen.append(int(step.logits[0, -1].argmax()))
        ids = torch.tensor([chosen[-1:]])
    return chosen, torch.stack(logits)
