"""Latency and throughput of a server under mixed requests, beside FLASH_ATTN.

One server after the other with the same model, a Llama shape with random weights, and the same
requests in the same order: prompts of random tokens whose lengths spread evenly over the octaves
between --shortest and --longest. At most --running requests are under way at once.

The weights are made so that attention scores have a standard deviation of about --score-spread.
Writes docs/results/server-*.json, row after row, and fails if any request fails or if a sparse
selector never ran.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_serving import SETTINGS, SHAPES
from timing import about

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.server import Server

ROOM = 512
"""Tokens that a server takes beyond the longest prompt."""


def save_model(folder: str, shape: str, spread: float, longest: int) -> None:
    """A checkpoint with random weights; attention scores spread by about `spread`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    # What weights multiply has unit variance, so scores have that of a query times that of a key.
    deviation = (spread / sizes["head_dim"] ** 0.5 / sizes["hidden_size"] * 8) ** 0.5
    config = LlamaConfig(
        **sizes,
        vocab_size=128256,
        max_position_embeddings=longest,
        initializer_range=deviation,
        tie_word_embeddings=shape == "1B",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
        entmax_alpha=1.5,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()


def make_requests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is posted to /v1/completions, the same for every server."""
    rng = random.Random(args.seed)
    requests = []
    for _ in range(args.requests):
        length = round(args.shortest * (args.longest / args.shortest) ** rng.random())
        requests.append(
            {
                "prompt": [rng.randrange(256) for _ in range(length)],
                "max_tokens": rng.randint(args.least_output, args.most_output),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        )
    return requests


async def send(url: str, request: dict[str, Any], session: Any) -> list[float]:
    """Seconds from sending to each piece of the answer; raises on any error of the server."""
    began = time.perf_counter()
    times: list[float] = []
    async with session.post(f"{url}/v1/completions", json=request) as reply:
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {(await reply.text())[:500]}")
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            if b'"error"' in line:
                raise RuntimeError(line.decode()[:500])
            if line.strip() == b"data: [DONE]":
                return times
            times.append(time.perf_counter() - began)
    raise RuntimeError("the answer ended without [DONE]")


async def load(url: str, requests: list[dict[str, Any]], running: int) -> list[Any]:
    """What became of each request: times, or an exception."""
    import aiohttp

    gate = asyncio.Semaphore(running)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def one(request: dict[str, Any]) -> list[float]:
            async with gate:
                return await send(url, request, session)

        return await asyncio.gather(*map(one, requests), return_exceptions=True)


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds of seconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{p}": cuts[p - 1] * 1e3 for p in (50, 90, 99)}


def measure(arm: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One server under all requests."""
    arguments = (
        f"--tokenizer={DEMO_MODEL}",
        "--served-model-name=model",
        f"--max-model-len={args.longest + ROOM}",
        f"--max-num-seqs={args.running}",
        "--no-enable-prefix-caching",
        *args.server_argument,
    )
    settings: dict[str, Any] = dict(SETTINGS.get(arm, {}))
    if arm == "FLASH_ATTN":
        arguments += ("--attention-backend=FLASH_ATTN",)
    elif arm == "topk":
        settings["token_budget"] = args.token_budget
    requests = make_requests(args)
    options = {"entmaxkv": settings}
    with Server(str(model), additional_config=options, arguments=arguments) as server:
        first = [{**request, "max_tokens": 4} for request in requests[: args.running]]
        asyncio.run(load(server.url, first, args.running))
        before, began = server.metrics(), time.perf_counter()
        results = asyncio.run(load(server.url, requests, args.running))
        seconds = time.perf_counter() - began
        after = server.metrics()
    times = [result for result in results if not isinstance(result, BaseException)]
    failures = [repr(result) for result in results if isinstance(result, BaseException)]
    served = [
        request["max_tokens"]
        for request, result in zip(requests, results, strict=True)
        if not isinstance(result, BaseException)
    ]
    row: dict[str, Any] = {
        "model": args.model.name if args.model else args.shape,
        "selector": arm,
        "requests": len(requests),
        "running": args.running,
        "shortest": args.shortest,
        "longest": args.longest,
        "failures": failures,
        "seconds": seconds,
        "requests_per_second": len(times) / seconds,
        "output_tokens_per_second": sum(served) / seconds,
        "prompt_tokens": sum(len(request["prompt"]) for request in requests),
        "output_tokens": sum(served),
    }
    if not failures:
        row |= {
            "first_token_ms": percentiles([each[0] for each in times]),
            "per_output_token_ms": percentiles(
                [(t[-1] - t[0]) / (n - 1) for t, n in zip(times, served, strict=True)]
            ),
            "whole_ms": percentiles([each[-1] for each in times]),
        }
    for name in ("steps", "sparse_steps", "pages_read", "pages_held", "support", "query_heads"):
        sample = f"entmaxkv_{name}_total"
        row[name] = round(after.get(sample, 0) - before.get(sample, 0))
    return row


def complaints(row: dict[str, Any]) -> list[str]:
    """Why a row is no measurement."""
    wrong = [f"{row['selector']}: {failure}" for failure in row["failures"]]
    if row["selector"] in ("topk", "gaussian") and not row["sparse_steps"]:
        wrong.append(f"{row['selector']}: the sparse path never ran")
    if (row["steps"] > 0) == (row["selector"] == "FLASH_ATTN"):
        wrong.append(f"{row['selector']}: ENTMAXKV decoded {row['steps']} steps")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--arm", nargs="+", default=["FLASH_ATTN", "exact", "topk"])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--least-output", type=int, default=64)
    parser.add_argument("--most-output", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=2048, help="of topk")
    parser.add_argument("--score-spread", type=float, default=2.5)
    parser.add_argument("--server-argument", action="append", default=[], help="of vllm serve")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    args = parser.parse_args()
    if args.least_output < 2:
        parser.error(f"--least-output is {args.least_output}; expected at least 2")
    measured = about(args.commit) | {"score_spread": args.score_spread}
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix=f"llama-{args.shape}-") as folder:
        if args.model is None:
            save_model(folder, args.shape, args.score_spread, args.longest + ROOM)
        for arm in args.arm:
            rows.append(measure(arm, args.model or Path(folder), args))
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(json.dumps(measured | {"rows": rows}, indent=1) + "\n")
            wrong += complaints(rows[-1])
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
