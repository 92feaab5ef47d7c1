"""A model with NAPE, trained for a step and saved, through the engine against plain PyTorch."""

import math
import random

import pytest
import torch
from entmax import entmax15
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, rms_norm, silu

from entmaxkv_vllm.telemetry import engine_counters

from .engines import engine

pytestmark = pytest.mark.engine

SLOPES = [0.0625, 0.00390625, 0.0, 0.0]
LENGTHS = [1, 16, 33, 65, 130, 301]
NEW_TOKENS = 8
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from llama import new_model, save_model

    folder = tmp_path_factory.mktemp("nape")
    torch.manual_seed(0)
    shape = {"layers": 2, "hidden": 128, "intermediate": 256, "heads": 4, "key_heads": 2}
    model = new_model(alpha=1.5, longest=1024, positions="nape", **shape)
    for layer in model.model.layers:
        layer.self_attn.attn_scale.beta.data = torch.tensor([0.4, 1.1])
        layer.self_attn.attn_scale.gamma.data = torch.tensor([1.2, 0.3])
    tokens = torch.randint(3, 256, (2, 70))
    loss = cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    return {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}


@torch.inference_mode()
def plain_logits(weights, tokens, slopes):
    """[tokens, vocabulary] with nothing of this project."""
    positions = torch.arange(len(tokens))
    distance = (positions - positions[:, None]).float()
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(2):
        w = {n.split(".", 3)[3]: v for n, v in weights.items() if f"layers.{layer}." in n}
        h = rms_norm(x, x.shape[-1:], w["input_layernorm.weight"], 1e-6)
        query, key, value = (
            (h @ w[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, SIZE)).transpose(0, 1)
            for n in "qkv"
        )
        outputs = []
        for head, slope in enumerate(slopes):
            q = query[head]
            if head >= 2:
                beta = w["self_attn.attn_scale.beta"][head - 2]
                gamma = w["self_attn.attn_scale.gamma"][head - 2]
                q = q * (1 + beta * (positions + 2.0).log() ** gamma)[:, None]
            scores = q @ key[head // 2].T / math.sqrt(SIZE) + slope * distance
            weight = entmax15(scores.masked_fill(distance > 0, -torch.inf), dim=-1)
            outputs.append(weight @ value[head // 2])
        x = x + torch.cat(outputs, -1) @ w["self_attn.o_proj.weight"].T
        h = rms_norm(x, x.shape[-1:], w["post_attention_layernorm.weight"], 1e-6)
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w["mlp.down_proj.weight"].T
    x = rms_norm(x, x.shape[-1:], weights["model.norm.weight"], 1e-6)
    return x @ weights["model.embed_tokens.weight"].T


def prompt(length):
    rng = random.Random(length)
    return [rng.randrange(3, 256) for _ in range(length)]


def test_greedy_tokens_and_logits_are_those_of_plain_pytorch(folder, weights):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1, detokenize=False
    )
    # Short contexts decode as `exact`; pages are chosen for the others, all of them.
    options = {"selector": "topk", "token_budget": 1024, "exact_below": 40}
    with engine(
        folder,
        max_model_len=1024,
        max_num_batched_tokens=256,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        additional_config={"entmaxkv": options},
    ) as llm:
        requests = [TokensPrompt(prompt_token_ids=prompt(length)) for length in LENGTHS]
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        counters = engine_counters(llm)
    assert 0 < counters["sparse_steps"] <= counters["steps"]
    for length, output in zip(LENGTHS, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        logits = plain_logits(weights, [*prompt(length), *tokens[:-1]], SLOPES)[length - 1 :]
        assert tokens == logits.argmax(-1).tolist(), f"prompt of {length} tokens"
        for step, row in zip(output.outputs[0].logprobs, logits, strict=True):
            served = torch.tensor([step[token].logprob for token in range(len(row))])
            torch.testing.assert_close(served, row, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_the_model_that_is_trained_computes_the_same(folder, weights):
    from llama import load_model

    logits = load_model(folder, "cpu").float()(torch.tensor([prompt(130)])).logits[0]
    torch.testing.assert_close(
        logits, plain_logits(weights, prompt(130), SLOPES), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("changed", ["slopes", "beta", "gamma"])
def test_slopes_and_scales_count(weights, changed):
    expected = plain_logits(weights, prompt(130), SLOPES)
    slopes = [0.0] * 4 if changed == "slopes" else SLOPES
    others = {n: w * 0.8 if changed in n else w for n, w in weights.items()}
    assert (plain_logits(others, prompt(130), slopes) - expected).abs().max() > 1e-2
