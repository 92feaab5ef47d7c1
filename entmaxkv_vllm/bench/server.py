"""Latency and throughput of a running server under mixed requests, and what it counted."""

import asyncio
import json
import random
import statistics
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from entmaxkv_vllm.bench.options import Load, from_arguments
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.server import read_metrics

COUNTERS = ("steps", "sparse_steps", "pages_read", "pages_held", "support", "query_heads")
PERCENTILES = (50, 90, 99)


def bodies_of(load: Load, model: str) -> list[dict[str, Any]]:
    """What is posted to /v1/completions, the same for every server."""
    rng = random.Random(load.seed)
    bodies = []
    for _ in range(load.requests):
        length = round(load.shortest * (load.longest / load.shortest) ** rng.random())
        bodies.append(
            {
                "model": model,
                "prompt": [rng.randrange(256) for _ in range(length)],
                "max_tokens": rng.randint(load.least_output, load.most_output),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        )
    return bodies


async def _send(url: str, body: dict[str, Any], session: Any) -> list[float]:
    """Seconds from sending to each piece of the answer; raises on any error of the server."""
    began = time.perf_counter()
    times: list[float] = []
    async with session.post(f"{url}/v1/completions", json=body) as reply:
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


async def send_all(url: str, bodies: list[dict[str, Any]], running: int) -> list[Any]:
    """What became of each request: times, or an exception."""
    import aiohttp

    gate = asyncio.Semaphore(running)
    with tqdm(total=len(bodies), unit="request", disable=None, leave=False) as bar:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def one(body: dict[str, Any]) -> list[float]:
                async with gate:
                    try:
                        return await _send(url, body, session)
                    finally:
                        bar.update()

            return await asyncio.gather(*map(one, bodies), return_exceptions=True)


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds of seconds."""
    if len(values) == 1:
        return {f"p{p}": values[0] * 1e3 for p in PERCENTILES}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{p}": cuts[p - 1] * 1e3 for p in PERCENTILES}


def measure(url: str, model: str, load: Load) -> dict[str, Any]:
    """A row: latency, throughput and counters of a server under all requests, after a few others.

    Of requests that failed only `failures` tells; without any, the row has percentiles.
    """
    bodies = bodies_of(load, model)
    first = [{**body, "max_tokens": 4} for body in bodies[: load.running]]
    asyncio.run(send_all(url, first, load.running))
    before, began = read_metrics(url), time.perf_counter()
    results = asyncio.run(send_all(url, bodies, load.running))
    seconds = time.perf_counter() - began
    after = read_metrics(url)
    times = [result for result in results if not isinstance(result, BaseException)]
    failures = [repr(result) for result in results if isinstance(result, BaseException)]
    served = [
        body["max_tokens"]
        for body, result in zip(bodies, results, strict=True)
        if not isinstance(result, BaseException)
    ]
    row: dict[str, Any] = {
        "requests": len(bodies),
        "running": load.running,
        "shortest": load.shortest,
        "longest": load.longest,
        "failures": failures,
        "seconds": seconds,
        "requests_per_second": len(times) / seconds,
        "output_tokens_per_second": sum(served) / seconds,
        "prompt_tokens": sum(len(body["prompt"]) for body in bodies),
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
    for name in COUNTERS:
        sample = f"entmaxkv_{name}_total"
        row[name] = round(after.get(sample, 0) - before.get(sample, 0))
    return row


def complaints(row: dict[str, Any], name: str, expected: str) -> list[str]:
    """Why a row is no measurement of what was expected, one of EXPECTATIONS.

    name: what the complaints begin with.
    """
    wrong = [f"{name}: {failure}" for failure in row["failures"]]
    if expected == "sparse" and not row["sparse_steps"]:
        wrong.append(f"{name}: the sparse path never ran")
    elif expected == "sparse" and row["pages_read"] >= row["pages_held"]:
        wrong.append(f"{name}: the sparse path read every page")
    if expected == "exact" and row["sparse_steps"]:
        wrong.append(f"{name}: {row['sparse_steps']} steps were sparse")
    if expected != "any" and (row["steps"] > 0) == (expected == "other"):
        wrong.append(f"{name}: ENTMAXKV decoded {row['steps']} steps")
    return wrong


def table(row: dict[str, Any]) -> str:
    """What a person wants to know of a row."""
    lines = [
        f"{row['requests']} requests, {row['running']} at once, prompts of {row['shortest']} to "
        f"{row['longest']} tokens, in {row['seconds']:.1f} s",
        f"{row['requests_per_second']:.2f} requests/s, "
        f"{row['output_tokens_per_second']:.0f} output tokens/s",
    ]
    for name, title in (
        ("first_token_ms", "first token"),
        ("per_output_token_ms", "each output token"),
        ("whole_ms", "whole answer"),
    ):
        if name in row:
            parts = (f"{p} {value:,.1f}" for p, value in row[name].items())
            lines.append(f"{title:<18}{'   '.join(parts)}   ms")
    if row["steps"]:
        lines += [
            f"steps             {row['steps']:,}, of which sparse {row['sparse_steps']:,}",
            f"pages             {row['pages_read']:,} read of {row['pages_held']:,} held "
            f"({row['pages_read'] / max(1, row['pages_held']):.1%})",
            f"support           {row['support'] / max(1, row['query_heads']):.1f} tokens a head",
        ]
    else:
        lines.append("no counters of ENTMAXKV: another backend decodes on this server")
    return "\n".join(lines)


def served_model(url: str) -> str:
    """The name of the model that a server serves first.

    Raises ValueError if no server answers there.
    """
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, urllib.error.URLError, KeyError, ValueError) as error:
        raise ValueError(f"{url}/v1/models does not answer as vLLM's server: {error}") from error


def command(args: Any) -> int:
    """The subcommand: 0 if all requests were answered, by the path that was expected."""
    url = args.url.rstrip("/")
    try:
        load = from_arguments(Load, args)
        model = args.model or served_model(url)
    except ValueError as error:
        print(f"entmaxkv bench: {error}", file=sys.stderr)
        return 2
    row = {"model": model, **measure(url, model, load)}
    wrong = complaints(row, model, args.expect)
    if args.out is not None and not wrong:
        header = about(args.commit) | {"benchmark": "server", "load": asdict(load)}
        args.out.write_text(json.dumps(header | {"rows": [row]}, indent=1) + "\n")
    print(table(row))
    for complaint in wrong:
        print(f"REFUSED: {complaint}", file=sys.stderr)
    return 1 if wrong else 0
