"""vLLM's OpenAI server with the compiled kernels, on one GPU and with an engine on each of two."""

import json
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.retrieval import needle_prompt
from entmaxkv_vllm.server import Server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPTIONS = {"entmaxkv": {"selector": "gaussian", "exact_below": 256}}
ARGUMENTS = ("--gpu-memory-utilization=0.2", "--max-model-len=8192", "--compilation-config.mode=0")
CHOICES = ["yes", "no", "maybe"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-gpu", "data-parallel"])
def server(request):
    if torch.cuda.device_count() < request.param:
        pytest.skip("needs two GPUs")
    arguments = (*ARGUMENTS, f"--data-parallel-size={request.param}")
    with Server(str(DEMO_MODEL), additional_config=OPTIONS, arguments=arguments) as running:
        yield running


def complete(server, prompt, **fields):
    """The text of a completion."""
    body = {"model": str(DEMO_MODEL), "prompt": prompt, "temperature": 0} | fields
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())["choices"][0]["text"]


def test_many_at_once_get_right_answers_and_pages_are_left_unread(server):
    rng = random.Random(8)
    tasks = [needle_prompt(rng, tokens=rng.randint(600, 5000), keys=1) for _ in range(24)]
    before = server.metrics()
    with ThreadPoolExecutor(len(tasks)) as threads:
        texts = list(
            threads.map(lambda task: complete(server, task.prompt, max_tokens=64, stop="\n"), tasks)
        )
    right = sum(task.is_correct(text) for task, text in zip(tasks, texts, strict=True))
    assert right >= len(tasks) - 1
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["entmaxkv_sparse_steps_total"] > 0
    assert 0 < grown["entmaxkv_pages_read_total"] < grown["entmaxkv_pages_held_total"]


def test_structured_output_is_one_of_the_choices(server):
    text = complete(server, "x = 1\n", max_tokens=8, structured_outputs={"choice": CHOICES})
    assert text in CHOICES
