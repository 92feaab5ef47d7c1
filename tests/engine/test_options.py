"""Each option does what it says inside a running engine."""

import os
import random
import subprocess
import sys

import oracle
import pytest
import torch

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.retrieval import evaluation_tasks, needle_prompt
from entmaxkv_vllm.telemetry import engine_counters, read_counters

from .engines import engine, layers_of

pytestmark = pytest.mark.engine

TASKS = list(evaluation_tasks("codes", 4, 900, 4, seed=3))
LAYERS = 4


def ask(llm):
    """Whether each task is answered right, in one ragged batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=64, stop="\n")
    outputs = llm.generate([task.prompt for task in TASKS], sampling, use_tqdm=False)
    return [t.is_correct(o.outputs[0].text) for t, o in zip(TASKS, outputs, strict=True)]


def options(**values):
    return {"entmaxkv": {"exact_below": 0} | values}


@pytest.mark.parametrize(
    ("settings", "page_size"),
    [
        pytest.param({"selector": "topk", "token_budget": 512}, 16, id="topk"),
        pytest.param({"selector": "gaussian", "page_size": 32}, 32, id="page-of-32"),
        pytest.param(
            {"selector": "topk", "token_budget": 512, "page_size": 64, "codes": True},
            64,
            id="codes-of-64",
        ),
        pytest.param({"selector": "gaussian-paper"}, 16, id="gaussian-paper"),
        pytest.param({"selector": "adaptive", "certificate": True}, 16, id="adaptive"),
        pytest.param({"selector": "exact", "prune": True}, 16, id="exact, pruned"),
    ],
)
def test_every_selector_and_page_size_answers_right_while_leaving_pages_unread(settings, page_size):
    with engine(block_size=128, additional_config=options(**settings)) as llm:
        assert all(ask(llm))
        counters = engine_counters(llm)
        assert all(layer.kv_cache.shape[2] == page_size for layer in layers_of(llm))
    assert counters["sparse_steps"] == counters["steps"] > 0
    assert counters["pages_read"] < counters["pages_held"]


def test_dense_layers_read_every_page_and_keep_no_statistics_up_to_date():
    settings = options(selector="topk", token_budget=256, dense_layers=[0, 2])
    with engine(additional_config=settings) as llm:
        assert all(ask(llm))
        steps, sparse = read_counters(llm.llm_engine.vllm_config.instance_id)[:, :2].T
        layouts = [
            layer.impl.pages(layer, layer.kv_cache).layout.statistics for layer in layers_of(llm)
        ]
    assert (steps == steps[0]).all()
    assert sparse.tolist() == [0, steps[1], 0, steps[3]]
    assert layouts == [(), ("center", "half_width"), (), ("center", "half_width")]


def test_certificates_count_every_query_head_of_every_step_once():
    settings = options(selector="topk", token_budget=512, certificate=True)
    with engine(additional_config=settings) as llm:
        assert all(ask(llm))
        counters = engine_counters(llm)
    sizes = ("certified", "bound_to_1e_4", "bound_to_1e_3", "bound_to_1e_2", "bound_to_1e_1")
    total = sum(counters[size] for size in (*sizes, "bound_below_1", "vacuous"))
    assert total == counters["query_heads"] > 0
    assert counters["pages_read"] < counters["pages_held"]


def test_short_contexts_decode_exactly_below_the_limit_that_was_set():
    with engine(additional_config=options(selector="gaussian", exact_below=1000)) as llm:
        assert all(ask(llm))
        assert engine_counters(llm)["sparse_steps"] == 0


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("auto", torch.bfloat16), ("float16", torch.float16)],
    ids=["what-the-checkpoint-asks-for", "float16"],
)
def test_half_precision_answers_right(dtype, stored):
    with engine(dtype=dtype, additional_config=options(selector="gaussian")) as llm:
        assert layers_of(llm)[0].kv_cache.dtype == stored
        assert all(ask(llm))


@pytest.mark.parametrize("selector", ["exact", "gaussian"])
def test_an_fp8_cache_answers_right(selector):
    settings = options(selector=selector)
    with engine(dtype="bfloat16", kv_cache_dtype="fp8", additional_config=settings) as llm:
        (layer, *_) = layers_of(llm)
        assert layer.kv_cache.dtype == torch.uint8
        assert layer.impl.pages(layer, layer.kv_cache).key.dtype == torch.float8_e4m3fn
        assert all(ask(llm))


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "BHLNC"])
def test_every_declared_cache_layout_answers_right(layout, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with engine(additional_config=options(selector="gaussian")) as llm:
        strides = [layer.kv_cache.stride() for layer in layers_of(llm)]
        assert all(ask(llm))
    page = 16 * (2 + 2 / 16) * 64
    block = {"LBHNC": 2 * page, "BLHNC": 4 * 2 * page, "BHLNC": 4 * 2 * page}[layout]
    head = {"LBHNC": page, "BLHNC": page, "BHLNC": 4 * page}[layout]
    assert all(stride[:2] == (block, head) for stride in strides)


SPECULATE = """
from engine.engines import engine, metric
from engine.test_options import ask

lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
with engine(speculative_config=lookup) as llm:
    assert all(ask(llm))
    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
"""


def test_speculative_decoding_answers_right_with_exact():
    # In a process of its own: it imports numba, after which this vLLM can start no further engine.
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-c", SPECULATE],
        check=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_the_custom_name_serves_the_same_backend():
    with engine(attention_backend="CUSTOM") as llm:
        assert layers_of(llm)[0].get_attn_backend().get_name() == "ENTMAXKV"
        assert all(ask(llm))


def test_each_rank_of_a_tensor_parallel_group_takes_the_alphas_of_its_own_heads(monkeypatch):
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    from entmaxkv_vllm import impl

    alphas = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
    config = EngineArgs(
        str(DEMO_MODEL), attention_backend="ENTMAXKV", hf_overrides={"entmax_alpha": alphas}
    ).create_engine_config()
    for rank in (0, 1):
        monkeypatch.setattr(impl, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        with set_current_vllm_config(config):
            layer = impl.EntmaxKVImpl(4, 64, 0.125, num_kv_heads=1)
        assert layer.alpha == tuple(alphas[4 * rank : 4 * rank + 4])


def next_token_logprobs(prompts, alphas):
    """[prompts, vocabulary], with one alpha for all heads or one for each."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    with engine(hf_overrides={"entmax_alpha": alphas}, max_logprobs=-1) as llm:
        outputs = llm.generate(requests, sampling, use_tqdm=False)
    rows = [output.outputs[0].logprobs[0] for output in outputs]
    return torch.tensor([[row[token].logprob for token in range(259)] for row in rows])


def test_heads_with_alphas_of_their_own_attend_each_with_its_own(tokenizer):
    """Powers round otherwise than alpha 1.5's squares, whose error from fp64 is the yardstick."""
    rng = random.Random(5)
    # The error for a single prompt is a matter of chance.
    prompts = [tokenizer(needle_prompt(rng, tokens=400).prompt).input_ids for _ in range(16)]
    model = oracle.load_float64(DEMO_MODEL)
    exact = torch.cat([oracle.greedy(model, prompt, 1)[1] for prompt in prompts]).log_softmax(-1)

    def error(alphas):
        return (next_token_logprobs(prompts, alphas).double() - exact).norm()

    limit = 2 * error(1.5)
    # All alike would be one alpha.
    assert error([1.5] * 7 + [1.5 + 1e-9]) <= limit
    assert error([1.5] * 7 + [1.501]) > limit
    assert error([1.5] * 7 + [1.0]) > limit
