"""Layers of other shapes through the engine: sliding windows among full layers, ALiBi, softmax."""

import random

import oracle
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from .engines import engine

pytestmark = pytest.mark.engine

VOCABULARY = 300
LENGTHS = [1, 16, 33, 65, 130, 517]
NEW_TOKENS = 12


def served(model, **options):
    """Greedy tokens and full logits of random prompts, through vLLM."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1, detokenize=False
    )
    with engine(
        model,
        max_model_len=1024,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        **options,
    ) as llm:
        requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts()]
        return [output.outputs[0] for output in llm.generate(requests, sampling, use_tqdm=False)]


def prompts():
    rng = random.Random(3)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def assert_same(outputs, model):
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens, logits = oracle.greedy(model, prompt, NEW_TOKENS)
        assert list(output.token_ids) == tokens, f"prompt of {len(prompt)} tokens"
        for step, row in zip(output.logprobs, logits, strict=True):
            served_row = torch.tensor([step[token].logprob for token in range(len(row))])
            torch.testing.assert_close(served_row, row, rtol=0, atol=1e-4)


def test_sliding_window_layers_among_full_ones_agree_with_the_oracle(tmp_path):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=1024,
        entmax_alpha=1.5,
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    outputs = served(tmp_path)
    assert_same(outputs, oracle.load(tmp_path))


def test_alibi_slopes_reach_the_kernels(tmp_path):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=256, n_layer=2, n_head=4)
    model = BloomForCausalLM(config).eval()
    for block in model.transformer.h:
        block.self_attention.query_key_value.weight.data.mul_(4)
    model.save_pretrained(tmp_path)
    # Softmax, because transformers has this architecture's ALiBi only with softmax.
    outputs = served(tmp_path, additional_config={"entmaxkv": {"alpha": 1.0}})
    assert_same(outputs, model)
