"""`entmaxkv demo`: hide a needle in a long text, ask a server for it, and check every claim."""

import json
import random
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any

from entmaxkv_vllm.retrieval import NeedleTask, code_fact, needle_prompt, question_text
from entmaxkv_vllm.server import Server, ServerError

ANSWER_TOKENS = 64


def run(model: str, selector: str, tokens: int, seed: int, keep: bool) -> int:
    """Serve, ask, check, stop. 0 only if the answer is right and the selector did its work.

    Args:
        model: a model that answers in the form of `entmaxkv_vllm.retrieval`.
        selector: `exact` reads all pages; the others must read fewer, or the demo fails.
        tokens: length of the prompt.
        seed: which text, needle and place.
        keep: leave the server running and say how to ask it.
    """
    try:
        task = needle_prompt(random.Random(seed), tokens=tokens)
    except ValueError as error:
        print(f"FAILED: --tokens {tokens}: {error}", file=sys.stderr)
        return 1
    options: dict[str, Any] = {"selector": selector, "exact_below": min(2048, tokens // 2)}
    if selector == "topk":
        options["token_budget"] = max(16, tokens // 8)
    print(f"Starting vLLM with --attention-backend ENTMAXKV, selector {selector} ...", flush=True)
    server = Server(
        model,
        additional_config={"entmaxkv": options},
        arguments=_arguments(tokens),
        keep=keep,
        waiting=_show_waiting,
    )
    start = time.monotonic()
    try:
        with server:
            print(f"\rServer ready after {time.monotonic() - start:.0f} s at {server.url}")
            return _ask_and_check(server, task, selector, tokens)
    except ServerError as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    finally:
        if keep and server.process.poll() is None:
            print(f"\nThe server keeps running (process {server.process.pid}, log {server.log}).")
            print("Ask it:")
            print(_curl(server.url))
        else:
            print("Server stopped.")


def _arguments(tokens: int) -> tuple[str, ...]:
    from vllm.platforms import current_platform

    length = ("--max-model-len", str(max(8192, tokens) + 2 * ANSWER_TOKENS))
    if not current_platform.is_cpu():
        return length
    # Nothing to compile for a reference implementation, and float32 is a CPU's fastest type.
    return (*length, "--enforce-eager", "--dtype", "float32")


def _show_waiting(seconds: float) -> None:
    if sys.stdout.isatty():
        print(f"\r  {seconds:3.0f} s", end="", flush=True)


def _ask_and_check(server: Server, task: NeedleTask, selector: str, tokens: int) -> int:
    depth = task.document.find(task.answer.strip()) / len(task.document)
    print(f"\nText:     {tokens} tokens of Python source, one fact hidden at {depth:.0%} of it")
    print(f"Question: {task.question}")
    print("Answer:   ", end="", flush=True)
    start = time.monotonic()
    answer, first = _stream(server.url, task)
    finish = time.monotonic()
    print(f"\n          first token after {first - start:.1f} s, done after {finish - start:.1f} s")
    found = problems(answer, task, selector, server.metrics())
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


def _stream(url: str, task: NeedleTask) -> tuple[str, float]:
    """The answer, shown as it comes, and when its first token came."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": task.message}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        stream=True,
    )
    answer, first = "", 0.0
    for chunk in stream:
        piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
        if piece and not answer:
            first, piece = time.monotonic(), piece.lstrip()
        print(piece, end="", flush=True)
        answer += piece
    return answer, first


def problems(
    answer: str, task: NeedleTask, selector: str, metrics: Mapping[str, float]
) -> list[str]:
    """What is not as claimed; prints what is."""
    found = []
    if task.is_correct(answer):
        print(f"Right:    the hidden value is {task.value}")
    else:
        found.append(f"the answer is wrong: the hidden value is {task.value}")
    read = int(metrics.get("entmaxkv_pages_read_total", 0))
    held = int(metrics.get("entmaxkv_pages_held_total", 0))
    if not held:
        found.append("the backend decoded nothing: /metrics counts no pages")
        return found
    print(f"Pages:    {read:,} read of {held:,} held in decoding ({read / held:.1%})")
    if selector != "exact" and read >= held:
        found.append(f"the sparse path did not run: selector {selector} read every page")
    return found


def _curl(url: str) -> str:
    fact = code_fact("bolasirem", "48213")
    content = f"{fact.line}{question_text(fact.question)}"
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
