"""The compiled kernels inside vLLM on a GPU, against what the reference generates on a CPU.

Each engine has a cache that a batch does not fit into, prompts in chunks, and cached prefixes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.engines import engine, layers_of, metric

from entmaxkv_vllm.telemetry import engine_counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

RECORD = json.loads((Path(__file__).parent / "reference-tokens.json").read_text())
PROMPTS = [list(map(ord, text)) for text in RECORD["prompts"]]
NEW_TOKENS = len(RECORD["tokens"]["exact"][0])
ALONE = [ids for ids in PROMPTS if (len(ids) - 1) % 16][:4]
"""Prompts of which caches and chunks never leave a single token, which would decode."""

BLOCKS = 264
SIZES = [1, 8, 24]
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
ENGINES = {
    "as-by-default": {"compilation_config": {"cudagraph_capture_sizes": SIZES}},
    "graphs-alone": {"compilation_config": GRAPHS},
    "eager": {"enforce_eager": True},
    "older-runner": {"compilation_config": GRAPHS},
}


def started(selector, **options):
    """An engine under pressure with one of the recorded selectors."""
    settings = {"enforce_eager": False, "num_gpu_blocks_override": BLOCKS, "max_num_seqs": 24}
    return engine(
        max_model_len=4096 + 64,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.2,
        additional_config={"entmaxkv": RECORD["options"][selector]},
        **settings | options,
    )


def generate(llm, prompts, **sampling):
    """Completions of token ids, in one batch."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, **sampling)
    requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    return [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]


def differing(outputs, selector):
    """Numbers of the prompts whose tokens are not those on record."""
    pairs = zip(outputs, RECORD["tokens"][selector], strict=True)
    return [
        i for i, (output, text) in enumerate(pairs) if list(output.token_ids) != [*map(ord, text)]
    ]


@pytest.fixture(scope="module", params=ENGINES)
def exact(request):
    """What the checks of the exact selector need of one engine, stopped before the next starts."""
    older = request.param == "older-runner"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0" if older else "1")
        with started("exact", **ENGINES[request.param]) as llm:
            yield measured(llm, request.param)


def measured(llm, name):
    """Rounds of all prompts, some alone, and what was counted meanwhile."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    older = ".gpu_model_runner" in type(worker.model_runner).__module__
    assert older == (name == "older-runner")
    rounds = [generate(llm, PROMPTS) for _ in range(2)]
    before = engine_counters(llm)
    alone = []
    for ids in [*ALONE, ALONE[0]]:
        # A cached prefix was computed in other chunks, in another order of sums.
        llm.reset_prefix_cache()
        alone += generate(llm, [ids], logprobs=5)
    counted = engine_counters(llm)
    return {
        "name": name,
        "rounds": rounds,
        "alone": alone,
        "kernels": {layer.impl.kernels for layer in layers_of(llm)},
        "preemptions": metric(llm, "vllm:num_preemptions"),
        "hits": metric(llm, "vllm:prefix_cache_hits"),
        "counters": {name: counted[name] - before[name] for name in counted},
        "async": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
    }


@pytest.mark.parametrize("turn", [0, 1], ids=["uncached", "with-prefix-cache-hits"])
def test_greedy_tokens_are_those_of_the_reference_on_a_cpu(exact, turn):
    assert differing(exact["rounds"][turn], "exact") == []


def test_the_compiled_kernels_served(exact):
    assert exact["kernels"] == {"triton"}


def test_requests_were_preempted_and_prefixes_cached(exact):
    assert exact["preemptions"] > 0
    assert exact["hits"] > 0


def test_steps_were_scheduled_while_the_one_before_ran(exact):
    assert exact["async"]


def test_every_decoded_token_is_counted_right_after_the_last_step(exact):
    counters, layers = exact["counters"], 4
    # A prompt gives the first token.
    assert counters["steps"] == layers * len(exact["alone"]) * (NEW_TOKENS - 1)
    assert counters["query_heads"] == 8 * counters["steps"]
    assert counters["pages_read"] == counters["pages_held"] > 0
    assert counters["sparse_steps"] == 0


def fingerprint(output):
    """Tokens and the bits of the log probabilities beside them."""
    return [
        (token, sorted((other, value.logprob) for other, value in step.items()))
        for token, step in zip(output.token_ids, output.logprobs, strict=True)
    ]


def test_a_prompt_alone_gives_the_same_bits_twice(exact):
    prints = [fingerprint(output) for output in exact["alone"]]
    assert prints[0] == prints[-1]


def test_captured_and_eager_steps_give_the_same_bits(tmp_path):
    # Each in a process of its own: engines after a compiled one in a process were seen to differ.
    def answers(name):
        file = tmp_path / name
        command = [sys.executable, "-m", "gpu.alone", name, str(file)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        return json.loads(file.read_text())

    captured, eager = answers("graphs-alone"), answers("eager")
    assert len(captured) == len(ALONE)
    first_difference = {
        prompt: next(
            step for step, both in enumerate(zip(*pair, strict=True)) if both[0] != both[1]
        )
        for prompt, pair in enumerate(zip(captured, eager, strict=True))
        if pair[0] != pair[1]
    }
    assert first_difference == {}


@pytest.mark.parametrize("selector", ["topk", "gaussian"])
def test_sparse_selectors_read_less_and_give_the_reference_s_tokens(selector):
    with started(selector, compilation_config=GRAPHS) as llm:
        rounds = [generate(llm, PROMPTS) for _ in range(2)]
        counters = engine_counters(llm)
    assert counters["sparse_steps"] > 0
    assert counters["pages_read"] < counters["pages_held"]
    for outputs in rounds:
        assert differing(outputs, selector) == []


def test_an_fp8_cache_serves_in_graphs_and_answers_as_in_eager_steps():
    def tokens(**options):
        with started("exact", dtype="bfloat16", kv_cache_dtype="fp8", **options) as llm:
            return [list(output.token_ids) for output in generate(llm, ALONE[:1])]

    assert tokens(compilation_config=GRAPHS) == tokens(enforce_eager=True)
