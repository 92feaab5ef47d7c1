"""configs/serve/cpu.yaml as the CPU image serves it, over two engines, and watched as there."""

import json
import random
import socket
import sys
import urllib.request
from pathlib import Path

import dockerfiles
import pytest
import torch
import yaml

from entmaxkv_vllm import DEMO_MODEL, cli
from entmaxkv_vllm.retrieval import needle_prompt
from entmaxkv_vllm.server import HOST, Server

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="two engines for CPUs; see tests/gpu"),
]

ROOT = Path(__file__).parent.parent.parent
LAYERS = 4
QUESTIONS = 4
CHOICES = ["for", "while"]


class ImageServer(Server):
    """Started by the command of the CPU image, from the root of the clone."""

    def __init__(self, *arguments: str) -> None:
        super().__init__(str(DEMO_MODEL), additional_config={})
        program, *entrypoint = json.loads(dockerfiles.last("Dockerfile.cpu", "ENTRYPOINT"))
        assert program == "python"
        command = json.loads(dockerfiles.last("Dockerfile.cpu", "CMD"))
        place = [f"--host={HOST}", f"--port={self.port}"]
        self.command = [sys.executable, *entrypoint, *command, *place, *arguments]


@pytest.fixture(scope="module")
def server():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(ROOT)
    # Two engines start at a time.
    monkeypatch.setattr("entmaxkv_vllm.server.START_SECONDS", 600)
    with ImageServer("--data-parallel-size=2") as running:
        yield running
    monkeypatch.undo()


@pytest.fixture(scope="module")
def answers(server):
    """Facts in long texts were asked for: how many tokens that took, and which were right."""
    rng = random.Random(2)
    tasks = [needle_prompt(rng, tokens=2500) for _ in range(QUESTIONS)]
    replies = [ask(server, task.prompt, max_tokens=64, stop="\n") for task in tasks]
    right = [t.is_correct(r["choices"][0]["text"]) for t, r in zip(tasks, replies, strict=True)]
    return sum(reply["usage"]["completion_tokens"] for reply in replies), right


def ask(server, prompt, **options):
    model = yaml.safe_load((ROOT / "configs/serve/cpu.yaml").read_text())["model"]
    body = {"model": model, "prompt": prompt, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def test_the_cpu_file_serves_right_answers_and_leaves_pages_unread(server, answers):
    _, right = answers
    assert all(right)
    metrics = server.metrics()
    assert 0 < metrics["entmaxkv_pages_read_total"] < metrics["entmaxkv_pages_held_total"]


def test_both_engines_decode_and_are_counted(server, answers):
    tokens, _ = answers
    # The first token of an answer comes from prefill.
    assert server.metrics()["entmaxkv_steps_total"] >= LAYERS * (tokens - QUESTIONS)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    generated = [line for line in lines if line.startswith("vllm:generation_tokens_total{")]
    assert len(generated) == 2
    assert all(float(line.rsplit(maxsplit=1)[1]) > 0 for line in generated)


def test_the_dashboard_asks_for_nothing_that_the_server_does_not_tell(server, answers):
    import dashboard

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    told = {line.partition("{")[0] for line in lines if "model_name=" in line}
    assert dashboard.metrics() <= told


def test_the_benchmark_of_a_server_sees_that_it_decodes_sparsely(server, answers, tmp_path):
    out = tmp_path / "server.json"
    load = ["--requests=4", "--running=2", "--shortest=2100", "--longest=2300"]
    load += ["--least-output=3", "--most-output=5", "--expect=sparse", f"--out={out}"]
    assert cli.main(["bench", "server", server.url, *load]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["steps"] == row["sparse_steps"] == LAYERS * (row["output_tokens"] - 4)
    assert 0 < row["pages_read"] < row["pages_held"]
    assert row["first_token_ms"]["p50"] > row["per_output_token_ms"]["p50"] > 0


def test_structured_output_is_one_of_the_choices(server):
    reply = ask(server, "x = 1\n", max_tokens=8, structured_outputs={"choice": CHOICES})
    assert reply["choices"][0]["text"] in CHOICES


@pytest.mark.parametrize("name", dockerfiles.NAMES)
def test_the_health_check_of_the_image_tells_a_server_that_answers_from_one_that_does_not(
    name, server
):
    command = dockerfiles.health_check(name)
    assert dockerfiles.run(with_port(command, server.port)).returncode == 0
    assert dockerfiles.run(with_port(command, closed_port())).returncode != 0


def with_port(command, port):
    """The image's command, on this machine's Python, for a server on another port."""
    assert command[0] == "python3"
    return [sys.executable, *(part.replace(":8000/", f":{port}/") for part in command[1:])]


def closed_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
