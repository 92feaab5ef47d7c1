"""The compiled kernels inside an engine, interpreted: slow, but the path that a GPU takes."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them compiled; see tests/gpu"),
]

COMPARE = """
import json, sys

import entmaxkv_kernels.triton.decode
import entmaxkv_kernels.triton.prefill
import entmaxkv_kernels.triton.workspace
from engine.engines import engine
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from entmaxkv_vllm.telemetry import engine_counters

# A small chip: interpreted programs run one after the other.
for module in ("decode", "prefill", "workspace"):
    vars(sys.modules[f"entmaxkv_kernels.triton.{module}"])["processors"] = lambda device: 1

# The prompt of 49 tokens leaves a chunk of one, which decodes exactly.
PROMPTS = [[256, *(i * 7 % 90 + 32 for i in range(n))] for n in (48, 69)]
SAMPLING = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def result(options):
    with engine(
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        additional_config={"entmaxkv": options},
    ) as llm:
        outputs = []
        for prompts in (PROMPTS[:1], PROMPTS):
            requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
            outputs += llm.generate(requests, SAMPLING, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return [tokens, engine_counters(llm)]


for options in json.loads(sys.argv[1]):
    print("RESULT", json.dumps(result(options)))
"""


def results(options):
    """Tokens and counters with each of the options, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, json.dumps(options)],
        check=True,
        timeout=800,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def test_compiled_kernels_give_the_tokens_and_the_counters_of_the_reference():
    options = {"selector": "topk", "token_budget": 16, "exact_below": 16, "dense_layers": [0]}
    reference, compiled = results(
        [options | {"implementation": name} for name in ("reference", "triton")]
    )
    assert compiled == reference
    counters = compiled[1]
    # Layer 0 is dense, and each other layer decodes one token of an unfinished prompt.
    assert 0 < counters["sparse_steps"] < counters["steps"] * 3 / 4
    assert counters["pages_read"] < counters["pages_held"]
