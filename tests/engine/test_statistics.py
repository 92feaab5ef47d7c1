"""Page statistics in a running engine, after everything that can happen to a page."""

import random

import pytest
import torch

from entmaxkv_vllm.retrieval import haystack_window, needle_prompt
from entmaxkv_vllm.telemetry import engine_counters, read_counters

from .engines import engine, layers_of, metric

pytestmark = pytest.mark.engine

NEW_TOKENS = 40


@pytest.fixture(scope="module", params=["gaussian", "topk"])
def llm(request):
    options = {"selector": request.param, "exact_below": 256, "token_budget": 256}
    with engine(
        max_model_len=4096,
        num_gpu_blocks_override=264,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        additional_config={"entmaxkv": options},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def used(llm, tokenizer):
    """The engine after ragged batches, shared prefixes, preemption and reuse of every block."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    rng = random.Random(11)
    prefix = tokenizer(haystack_window(rng, 700, held_out=True)).input_ids
    prompts = [
        tokenizer(needle_prompt(rng, tokens=rng.randint(300, 1200), keys=2).prompt).input_ids
        for _ in range(12)
    ]
    prompts += [prefix + [rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    prompts.append(tokenizer(haystack_window(rng, 3000, held_out=True)).input_ids)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    for _ in range(2):
        llm.generate(requests, sampling, use_tqdm=False)
        rng.shuffle(requests)
    return llm


def from_scratch(rows: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """Statistics of a page's first rows [..., rows, D], as [..., 2, D]."""
    if names == ("mean", "std"):
        parts = rows.mean(-2), rows.std(-2, correction=0).clamp_min(1e-6)
    else:
        parts = rows.amin(-2), rows.amax(-2)
    return torch.stack(parts, dim=-2)


def test_every_page_holds_the_statistics_of_its_own_rows(used):
    assert metric(used, "vllm:num_preemptions") > 0
    assert metric(used, "vllm:prefix_cache_hits") > 0
    for layer in layers_of(used):
        pages = layer.impl.pages(layer.kv_cache)
        key, statistics = pages.key, pages.statistics
        written = key.abs().amax((-1, -2)) > 0  # [num_pages, kv_heads]
        assert written.sum() > 200 * key.shape[1]
        fits = torch.zeros_like(written)
        for rows in range(1, key.shape[2] + 1):
            # A page can be partly filled, with rows of an earlier owner after its own.
            expected = from_scratch(key[:, :, :rows].double(), pages.layout.statistics)
            error = (statistics.double() - expected).abs().amax((-1, -2))
            fits |= error <= 1e-5 * key.abs().amax()
        assert fits[written].all()


def test_the_sparse_path_ran_and_read_less_than_it_held(used):
    counters = engine_counters(used)
    assert counters["sparse_steps"] > 0
    assert counters["pages_read"] < counters["pages_held"]
    by_layer = read_counters(used.llm_engine.vllm_config.instance_id)
    assert by_layer.shape[0] == len(layers_of(used))
    assert (by_layer.sum(1) > 0).all()


def test_the_statistics_are_planned_in_vllms_cache_memory(llm):
    for layer in layers_of(llm):
        spec = layer.get_attn_backend().customize_spec(
            layer.get_kv_cache_spec(llm.llm_engine.vllm_config)
        )
        assert spec.page_size_bytes * 264 == layer.kv_cache.untyped_storage().nbytes() // len(
            layers_of(llm)
        )
        assert spec.state_content_bytes == (2 + 2 / 16) * layer.head_size * 4
