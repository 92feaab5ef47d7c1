"""Thousands of requests through one engine with a small cache, and what they leave behind.

Random lengths, shared prefixes, aborts in the middle, preemption and reuse of every block. At the
end the statistics of every block whose keys are known (those that the prefix cache keeps, which
are full) must be those of its keys, made from scratch; no block may be missing and no memory.

Writes a JSON file, and exits with status 1 if anything is wrong.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from entmaxkv_vllm.bench.provenance import about

PREFIXES = 12
LONGEST = 4096
NEW_TOKENS = 128
SHARING = 0.5
"""Share of the requests that begin as others do."""
ABORTED = 0.15
"""Share of the requests that are aborted, after up to NEW_TOKENS steps."""


def start(args: argparse.Namespace) -> Any:
    """The shipped model in an engine whose cache holds a few of its requests."""
    from vllm import LLM

    from entmaxkv_vllm import DEMO_MODEL

    settings = {"selector": args.selector, "exact_below": 256}
    if args.selector == "topk":
        settings["token_budget"] = 256
    return LLM(
        str(DEMO_MODEL),
        attention_backend="ENTMAXKV",
        additional_config={"entmaxkv": settings},
        dtype=args.dtype,
        max_model_len=LONGEST + 2 * NEW_TOKENS,
        max_num_seqs=args.running,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=args.blocks,
        gpu_memory_utilization=0.3,
        enforce_eager=args.eager,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "NONE" if args.eager else "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [] if args.eager else [1, 8, args.running],
        },
        disable_log_stats=False,
        seed=0,
    )


def drive(engine: Any, count: int, rng: random.Random) -> dict[str, int]:
    """Send `count` requests as fast as the engine's queue empties; returns what became of them."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prefixes = [random_ids(rng, rng.randint(200, LONGEST // 2)) for _ in range(PREFIXES)]
    waiting, aborts = 2 * engine.vllm_config.scheduler_config.max_num_seqs, {}
    sent = finished = aborted = tokens = steps = 0
    while sent < count or engine.has_unfinished_requests():
        while sent < count and engine.get_num_unfinished_requests() < waiting:
            ids = rng.choice(prefixes) if rng.random() < SHARING else []
            # Most are short, as in service; some are as long as the model takes.
            ids = ids + random_ids(rng, int(2 ** rng.uniform(0, 11)))
            params = SamplingParams(
                temperature=0, max_tokens=rng.randint(1, NEW_TOKENS), ignore_eos=True
            )
            engine.add_request(str(sent), TokensPrompt(prompt_token_ids=ids), params)
            if rng.random() < ABORTED:
                aborts[str(sent)] = steps + rng.randint(0, NEW_TOKENS)
            sent += 1
        for output in engine.step():
            if output.finished:
                aborts.pop(output.request_id, None)
                finished += 1
                tokens += len(output.outputs[0].token_ids)
        steps += 1
        due = [name for name, step in aborts.items() if step <= steps]
        if due:
            engine.abort_request(due)
            aborted += len(due)
            for name in due:
                del aborts[name]
    return {
        "requests": sent,
        "finished": finished,
        "aborted": aborted,
        "tokens": tokens,
        "steps": steps,
    }


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


def compare_statistics(llm: Any) -> dict[str, int]:
    """Blocks of the prefix cache whose statistics are, and are not, those of their keys."""
    from entmaxkv_kernels import allocate_pages, append, split_pages

    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    known = [block.block_id for block in pool.blocks if block.block_hash is not None]
    worker = core.model_executor.driver_worker.worker
    wrong = compared = 0
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        pages = layer.impl.pages(layer, layer.kv_cache)
        ids = torch.tensor(known, device=pages.key.device)
        heads, size = pages.key.shape[1:3]
        fresh = split_pages(
            allocate_pages(len(known), heads, pages.layout, pages.key.dtype, ids.device),
            pages.layout,
        )
        key, value = (x[ids].transpose(1, 2).flatten(0, 1) for x in pages[:2])
        slots = torch.arange(len(known) * size, device=ids.device)
        append(fresh, key, value, slots, implementation=layer.impl.kernels)
        same = (fresh.statistics == pages.statistics[ids]).flatten(1).all(1)
        same &= (fresh.scales == pages.scales[ids]).flatten(1).all(1)
        compared, wrong = compared + len(same), wrong + int((~same).sum())
    return {"blocks_compared": compared, "blocks_wrong": wrong}


def memory() -> int:
    """Bytes that PyTorch holds of the GPU, 0 without one."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result."""
    from entmaxkv_vllm.telemetry import engine_counters

    llm, rng = start(args), random.Random(args.seed)
    engine = llm.llm_engine
    drive(engine, 2 * args.running, rng)  # whatever is allocated at first use
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    before, began = memory(), time.perf_counter()
    row: dict[str, Any] = {"selector": args.selector, "dtype": args.dtype, "blocks": args.blocks}
    row |= drive(engine, args.requests, rng)
    row["seconds"] = time.perf_counter() - began
    row["memory_growth"] = memory() - before
    row["blocks_not_free"] = args.blocks - 1 - pool.get_num_free_blocks()  # one is the null block
    row |= compare_statistics(llm)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    for name in ("num_preemptions", "prefix_cache_hits"):
        row[name] = int(metrics[f"vllm:{name}"].value)
    counters = engine_counters(llm)
    row["layer_steps"] = counters["steps"]
    for name in ("sparse_steps", "pages_read", "pages_held"):
        row[name] = counters[name]
    return row


def complaints(row: dict[str, Any]) -> list[str]:
    """What a row shows that must not be, or does not show that must."""
    wrong = [
        f"{name} is {row[name]}; expected 0"
        for name in ("blocks_wrong", "blocks_not_free", "memory_growth")
        if row[name]
    ]
    if row["finished"] + row["aborted"] != row["requests"]:
        wrong.append(f"{row['requests']} requests, {row['finished']} finished")
    needed = ["blocks_compared", "num_preemptions", "prefix_cache_hits", "aborted", "sparse_steps"]
    wrong += [f"{name} is 0; nothing was tested" for name in needed if not row[name]]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--selector", choices=["topk", "gaussian"], default="gaussian")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--running", type=int, default=32, help="sequences in one batch")
    parser.add_argument("--blocks", type=int, default=1024, help="of the cache, of 16 tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    measured = about(args.commit)
    row = soak(args)
    args.out.write_text(json.dumps(measured | {"rows": [row]}, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    if wrong := complaints(row):
        raise SystemExit("soak: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
