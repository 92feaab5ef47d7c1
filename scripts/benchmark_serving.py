"""Time per output token inside vLLM beside FLASH_ATTN, and write docs/results/serving-*.json.

Models are Llama shapes with dummy weights. Each arm is an engine in a process of its own, on the
same GPU and in the same run, one after the other, once all have imported vLLM.

Prompts are not computed: as vLLM's DecodeBenchConnector does, the pages of a request are filled
with normal numbers, and for ENTMAXKV written again through `append`, which makes the statistics
those of the keys. The keys are scaled so that scores have the standard deviation --score-spread,
with norms of weight one and embeddings of ordinary size in place of the dummy weights, which would
give queries of zero. `support` in a row says how many tokens had weight.

One captured graph can take 1.4% longer than the next one of the same kernels. With --captures each
engine captures its graphs that many times, and `tpot_ms` is the median of the captures' medians.

ENTMAXKV refuses KV connectors, which could leave statistics stale; only here, where the connector
keeps them, it is made to accept one.
"""

import argparse
import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from entmaxkv_vllm.bench.provenance import about

SHAPES: dict[str, dict[str, int]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
TOKENS = 144
SKIPPED = 16
WINDOW = 8
"""Tokens that are timed together: an engine that is a step ahead returns tokens unevenly."""
REQUESTS = 3
PROFILED = 32
ROOM = 512
CONTEXTS = [2048, 8192, 32768, 131072, 524288]
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"selector": "topk"},
    "topk-codes": {"selector": "topk", "codes": True},
    "exact": {},
    "gaussian": {"selector": "gaussian"},
    "adaptive": {"selector": "adaptive"},
    "pruned": {"prune": True},
}


def model_folder(shape: str) -> Path:
    """A folder with a config.json and nothing else."""
    folder = Path(tempfile.mkdtemp(prefix=f"llama-{shape}-"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 1 << 21,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": shape == "1B",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "entmax_alpha": 1.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config | SHAPES[shape]))
    return folder


def accept_the_connector() -> None:
    """Let ENTMAXKV run with DecodeBenchConnector, whose filled pages get their statistics."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import decode_bench_connector

    from entmaxkv_kernels import append
    from entmaxkv_vllm.backend import EntmaxKVBackend

    worker = decode_bench_connector.DecodeBenchConnectorWorker
    fill = worker._fill_blocks

    def fill_blocks(self: Any, group: int, block_ids: list[int], num_tokens: int) -> None:
        fill(self, group, block_ids, num_tokens)
        for name in self.group_to_layers[group]:
            layer = LAYERS[name]
            pages, size = layer.impl.pages(layer, layer.kv_cache), layer.impl.config.page_size
            ids = torch.tensor(block_ids, device=pages.key.device)
            slots = (ids[:, None] * size + torch.arange(size, device=ids.device)).flatten()
            key, value = (x[ids].transpose(1, 2).flatten(0, 1) for x in pages[:2])
            append(pages, key, value, slots, implementation=layer.impl.kernels)

    worker._fill_blocks = fill_blocks
    EntmaxKVBackend.supports_kv_connector = classmethod(lambda cls: True)  # type: ignore


LAYERS: dict[str, Any] = {}


def cache_bytes(shape: str, context: int, requests: int) -> int:
    """Bytes of a cache of bf16 that holds the requests, page statistics included."""
    sizes = SHAPES[shape]
    token = 2 * 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    return int(1.2 * requests * context * token) + (1 << 28)


def engine(shape: str, arm: str, contexts: list[int], requests: int, args: Any) -> Any:
    """An engine whose cache holds the requests at their longest."""
    from vllm import LLM

    longest, sizes = max(contexts) + ROOM, SHAPES[shape]
    options: dict[str, Any] = {"attention_backend": "FLASH_ATTN"}
    if arm != "FLASH_ATTN":
        accept_the_connector()
        settings: dict[str, Any] = dict(SETTINGS[arm])
        if arm.startswith("topk"):
            settings["token_budget"] = max(contexts) // 20
        options = {
            "attention_backend": "ENTMAXKV",
            "additional_config": {"entmaxkv": settings},
        }
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": sorted({1, requests})}
    if not args.compile:
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    # Weights are uniform within +-0.001, and what they multiply was normalised.
    spread = args.score_spread / (1e-3 * (sizes["hidden_size"] / 3) ** 0.5)
    llm = LLM(
        str(model_folder(shape)),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=max(2, requests),
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=cache_bytes(shape, longest, requests),
        compilation_config=graphs,
        kv_transfer_config={
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": spread},
        },
        seed=0,
        **options,
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    LAYERS.update(worker.vllm_config.compilation_config.static_forward_context)
    for name, weight in worker.model_runner.model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1)
        elif "embed" in name:
            weight.data.mul_(1000)
    return llm


def decode(llm: Any, context: int, requests: int) -> Iterator[float]:
    """Times at which `requests` requests at `context` tokens got each of their tokens."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for number in range(requests):
        prompt = TokensPrompt(prompt_token_ids=[5 + number] * context)
        llm.llm_engine.add_request(str(number), prompt, params)
    while llm.llm_engine.has_unfinished_requests():
        if llm.llm_engine.step():
            yield time.perf_counter()


def time_per_token(llm: Any, context: int, requests: int) -> list[float]:
    """Milliseconds between output tokens, window after window."""
    kept = list(decode(llm, context, requests))[SKIPPED:-1:WINDOW]
    return [(end - start) / WINDOW * 1e3 for start, end in itertools.pairwise(kept)]


def capture_anew(llm: Any) -> None:
    """Replace the captured graphs of an engine of vLLM's default model runner."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    torch.cuda.synchronize()
    worker.model_runner.cudagraph_manager.release_graphs()
    worker.model_runner.capture_model()


def measure(llm: Any, context: int, requests: int, captures: int) -> dict[str, Any]:
    """Milliseconds for each output token: of all requests, and of each capture and request."""
    by_capture = []
    for capture in range(captures):
        if capture:
            capture_anew(llm)
        by_capture.append([time_per_token(llm, context, requests) for _ in range(REQUESTS)])
    windows = list(itertools.chain(*by_capture))
    medians = [statistics.median(itertools.chain(*each)) for each in by_capture]
    return {
        "tpot_ms": statistics.median(medians),
        "captures_ms": medians,
        "mean_ms": [statistics.fmean(each) for each in windows],
        "slowest_ms": [max(each) for each in windows],
    }


def busy_per_token(llm: Any, context: int, requests: int) -> float:
    """Milliseconds for each output token in which the GPU runs a kernel.

    Where it is less than the time per token, the host sets the pace.
    """
    tokens = decode(llm, context, requests)
    list(itertools.islice(tokens, SKIPPED))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        list(itertools.islice(tokens, PROFILED))
        torch.cuda.synchronize()
    list(tokens)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, last = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy / PROFILED / 1e3


def run_arm(
    shape: str,
    arm: str,
    contexts: list[int],
    requests: int,
    args: argparse.Namespace,
    imported: Any,
    turn: Any,
    out: Any,
) -> None:
    """Measure one engine in this process, alone on the GPU, and send rows."""
    # Imports are done at once, and before the first arm is timed: they would slow its host.
    try:
        import vllm.model_executor.models.llama
        import vllm.v1.worker.gpu.model_runner  # noqa: F401
        from vllm import LLM  # noqa: F401

        from entmaxkv_vllm.telemetry import engine_counters
    except BaseException:
        imported.abort()  # the others would wait for it
        raise

    imported.wait(args.limit)
    turn.wait()
    # An arm that hangs says where, and makes room for the next.
    faulthandler.dump_traceback_later(args.limit, exit=True)
    start = time.perf_counter()
    llm = engine(shape, arm, contexts, requests, args)
    print(f"{shape} {arm}: started in {time.perf_counter() - start:.0f} s", flush=True)
    for context in contexts:
        before = engine_counters(llm) if arm != "FLASH_ATTN" else {}
        row: dict[str, Any] = {
            "run": args.run,
            "model": shape,
            "requests": requests,
            "context": context,
            "selector": arm,
            **measure(llm, context, requests, args.captures),
            "gpu_busy_ms": busy_per_token(llm, context, requests),
            "compiled": args.compile,
            "score_spread": args.score_spread,
        }
        if before:
            row |= shares(before, engine_counters(llm))
        print(json.dumps(row), flush=True)
        out.put(row)
    out.close()
    out.join_thread()
    os._exit(0)  # an engine takes seconds to take down


def shares(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """What decoding read between two looks at the counters."""
    counted = {name: after[name] - before[name] for name in after}
    return {
        "steps": counted["steps"],
        "sparse_steps": counted["sparse_steps"],
        "pages_read_share": counted["pages_read"] / max(1, counted["pages_held"]),
        "support": counted["support"] / max(1, counted["query_heads"]),
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row of ours beside FLASH_ATTN's of the same shape."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["requests"], row["context"]

    flash = {place(row): row for row in rows if row["selector"] == "FLASH_ATTN"}
    result = []
    for row in rows:
        if row["selector"] != "FLASH_ATTN" and place(row) in flash:
            other = flash[place(row)]
            more = {
                "tpot_ms_flash_attn": other["tpot_ms"],
                "ratio_flash_attn": other["tpot_ms"] / row["tpot_ms"],
                "gpu_busy_ms_flash_attn": other["gpu_busy_ms"],
                "ratio_gpu_busy": other["gpu_busy_ms"] / row["gpu_busy_ms"],
            }
            row = row | more
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--arm", nargs="+", default=["FLASH_ATTN", "topk", "exact", "gaussian"])
    parser.add_argument("--context", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--cache-limit", type=float, default=100e9, help="bytes of a cache")
    parser.add_argument("--score-spread", type=float, default=1.0)
    parser.add_argument("--limit", type=int, default=600, help="seconds for one engine")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--captures", type=int, default=1, help="of the graphs of each engine")
    parser.add_argument("--run", default="A", help="name of this run in its rows")
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    args = parser.parse_args()
    if args.captures < 1:
        parser.error(f"--captures is {args.captures}: give at least 1")
    measured = about(args.commit)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    spawn = multiprocessing.get_context("spawn")
    out: Any = spawn.Queue()
    engines: list[tuple[str, str, list[int], int]] = []
    for shape, requests in itertools.product(args.shape, args.requests):
        contexts = [c for c in args.context if cache_bytes(shape, c, requests) < args.cache_limit]
        for context in sorted(set(args.context) - set(contexts)):
            print(
                f"{shape}: {requests} requests of {context} tokens exceed --cache-limit: left out"
            )
        for arm in args.arm if contexts else []:
            # The budget is a share of the context and one for an engine.
            parts = [[c] for c in contexts] if arm.startswith("topk") else [contexts]
            engines += [(shape, arm, part, requests) for part in parts]
    imported = spawn.Barrier(len(engines) + 1)
    arms = []
    for work in engines:
        turn = spawn.Event()
        rest = (args, imported, turn, out)
        arms.append((spawn.Process(target=run_arm, args=(*work, *rest), daemon=True), turn))
    for process, _ in arms:
        process.start()
    imported.wait(args.limit)
    rows: list[dict[str, Any]] = []
    for process, turn in arms:
        turn.set()
        while process.is_alive() or not out.empty():
            with contextlib.suppress(queue.Empty):
                rows.append(out.get(timeout=0.2))
                result = measured | {"rows": with_ratios(rows)}
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
