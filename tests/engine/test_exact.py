"""`exact` against an independent oracle, through everything vLLM does to a request."""

import random

import oracle
import pytest
import torch

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.retrieval import haystack_window, needle_prompt
from entmaxkv_vllm.telemetry import engine_counters

from .engines import engine, layers_of, metric

pytestmark = pytest.mark.engine

SHORT = [1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 143, 160, 191, 200]
MEDIUM = [255, 256, 257, 271, 300, 333, 384, 400, 449, 500, 511, 512, 513, 600, 640, 700, 767, 801]
LONG = [1023, 1024, 1500, 2047, 4000]
NEEDLES = [250, 280, 300, 350, 400, 420, 500, 550, 600, 700, 800, 900, 1000, 1200, 1600, 2000]
REPEATED = 1
NEW_TOKENS = 32
BLOCKS = 264  # 4,224 tokens: the longest prompt fits, a batch does not


def prompts(tokenizer) -> list[list[int]]:
    """60 prompts of 1 to 4,000 tokens: source code to continue, facts to retrieve, one repeated."""
    rng = random.Random(7)
    texts = [haystack_window(rng, n, held_out=True) for n in SHORT + MEDIUM + LONG]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    ids += [tokenizer(needle_prompt(rng, tokens=n, keys=4).prompt).input_ids for n in NEEDLES]
    ids += ids[-REPEATED:]
    rng.shuffle(ids)
    assert len(ids) == 60
    return ids


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Greedy tokens and logits of every prompt, from the oracle."""
    model = oracle.load(DEMO_MODEL)
    return [oracle.greedy(model, prompt, NEW_TOKENS) for prompt in prompts(tokenizer)]


@pytest.fixture(scope="module")
def llm():
    with engine(
        max_model_len=4096 + 64,
        num_gpu_blocks_override=BLOCKS,
        max_num_batched_tokens=512,
        max_num_seqs=24,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        additional_config={"entmaxkv": {"selector": "exact"}},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def rounds(llm, tokenizer):
    """All prompts generated twice: the second time their prefixes are in the cache."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1)
    requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts(tokenizer)]
    first = llm.generate(requests, sampling, use_tqdm=False)
    hits = metric(llm, "vllm:prefix_cache_hits")
    second = llm.generate(requests, sampling, use_tqdm=False)
    assert metric(llm, "vllm:prefix_cache_hits") > hits
    return first, second


@pytest.mark.parametrize("turn", [0, 1], ids=["uncached", "with-prefix-cache-hits"])
def test_greedy_tokens_are_those_of_the_oracle(rounds, expected, turn):
    for number, (output, (tokens, _)) in enumerate(zip(rounds[turn], expected, strict=True)):
        length = len(output.prompt_token_ids)
        assert list(output.outputs[0].token_ids) == tokens, f"prompt {number} of {length} tokens"


@pytest.mark.parametrize("turn", [0, 1], ids=["uncached", "with-prefix-cache-hits"])
def test_logits_agree_with_the_oracle_to_a_ten_thousandth(rounds, expected, turn):
    gaps = []
    for output, (_, logits) in zip(rounds[turn], expected, strict=True):
        for step, row in zip(output.outputs[0].logprobs, logits, strict=True):
            served = torch.tensor([step[token].logprob for token in range(len(row))])
            gaps.append((served - row).abs().max())
    # Of tensors, unlike of numbers, the largest is NaN if any is.
    assert torch.stack(gaps).max() <= 1e-4


def test_the_run_was_preempted_and_its_prefill_was_chunked(llm, rounds):
    assert metric(llm, "vllm:num_preemptions") > 0
    assert llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill
    assert max(len(output.prompt_token_ids) for output in rounds[0]) > 512


def test_exact_decoding_reads_every_page_and_says_so(llm, rounds):
    counters = engine_counters(llm)
    assert counters["pages_held"] == counters["pages_read"] > 0
    assert counters["sparse_steps"] == 0


def test_exact_keeps_no_statistics_in_its_pages(llm, rounds):
    for layer in layers_of(llm):
        _, _, page_size, elements = layer.kv_cache.shape
        assert (page_size, elements) == (16, 2 * layer.head_size)
