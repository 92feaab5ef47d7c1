"""Two processes that share the heads of every layer, against one that has them all."""

import random

import pytest
import torch

from entmaxkv_vllm.retrieval import needle_prompt
from entmaxkv_vllm.telemetry import engine_counters

from .engines import engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs"),
]

OPTIONS = {"entmaxkv": {"selector": "gaussian", "exact_below": 0}}


def served(ranks):
    """Greedy tokens of a ragged batch, and what decoding read."""
    from vllm import SamplingParams

    rng = random.Random(4)
    prompts = [needle_prompt(rng, tokens=tokens, keys=2).prompt for tokens in (200, 350, 800)]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with engine(tensor_parallel_size=ranks, max_model_len=1024, additional_config=OPTIONS) as llm:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], engine_counters(llm)


def test_two_ranks_read_the_pages_that_one_reads_and_answer_the_same():
    tokens, counters = served(1)
    parallel_tokens, parallel_counters = served(2)
    assert parallel_tokens == tokens
    # Each rank counts its own steps, and its own share of everything else.
    for name in ("steps", "sparse_steps"):
        assert parallel_counters.pop(name) == 2 * counters.pop(name) > 0
    assert parallel_counters == counters
    assert counters["pages_read"] < counters["pages_held"]
