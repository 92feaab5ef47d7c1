"""`entmaxkv bench kernels`: one batch after another, all arms in one run, taking turns."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from entmaxkv_vllm.bench.arms import EntmaxArm, selector_of
from entmaxkv_vllm.bench.batch import Request, parse_batch
from entmaxkv_vllm.bench.options import Options, from_arguments
from entmaxkv_vllm.bench.peers import ARMS, Unavailable
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.reference_system import reference_system, use_checkout
from entmaxkv_vllm.bench.report import table
from entmaxkv_vllm.bench.timing import Step, graph_of, kernel_times, per_step
from entmaxkv_vllm.bench.workload import Pool, Shape, Workload

POOL_BYTES = 1 << 32
"""Keys and values that steps rotate over, at least: a sparse step reads few of them, and what all
steps read has to exceed the L2 cache."""
MOST_SETS = 1024
CPU_SETS = 2
CPU_TOKENS = 1 << 17
"""More of them in one batch take a CPU minutes."""
PROFILED_SETS = 8
PREFILL_TOKENS = 1 << 16
"""New tokens of the calls of a turn that prefills, about: enough that the GPU does not wait for the
host."""
WARM_UP = 2
REFERENCE = "reference"
"""The paper's own code, whose steps no graph can hold."""
CPU_NOTE = "PyTorch on a CPU, in float32: these are not the GPU kernels and not GPU numbers"


def run(
    batches: Sequence[str],
    selectors: Sequence[str],
    peers: Sequence[str],
    options: Options,
    *,
    profile: bool = False,
    reference_checkout: Path | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Time every batch; the result, ready for JSON.

    Its `rows` are one for each batch and arm, `left_out` the batches of each peer that did not run,
    by peer and reason, and `refused` which rows of sparse arms were no measurement and are not
    there.

    Raises ValueError for a batch that cannot be read, and on a CPU for one that is too large.
    """
    parsed = {text: parse_batch(text) for text in batches}
    if not torch.cuda.is_available():
        for text, requests in parsed.items():
            _refuse_what_takes_minutes(text, requests)
    if reference_checkout is not None:
        use_checkout(reference_checkout)
    result: dict[str, Any] = about(commit) | {"benchmark": "kernels", **asdict(options)}
    if not torch.cuda.is_available():
        result |= {"dtype": "float32", "note": CPU_NOTE}
    result |= {"batches": list(parsed), "rows": [], "left_out": {}, "refused": []}
    turns = len(parsed) * (options.repeats + WARM_UP)
    with tqdm(total=turns, unit="turn", disable=None, leave=False) as bar:
        for text, requests in parsed.items():
            bar.set_description(text)
            torch.manual_seed(options.seed)
            work = _workload(requests, options)
            arms = _own_arms(work, selectors, options.share)
            makers: dict[str, Callable[[], dict[str, list[Step]]]] = {
                peer: partial(ARMS[peer], work) for peer in peers
            }
            if reference_checkout is not None:
                makers[REFERENCE] = partial(reference_system, work, options.share)
            _measure(text, work, arms, makers, options.repeats, profile, result, bar.update)
            # The next batch takes its memory.
            del work, arms, makers
    return result


def _measure(
    text: str,
    work: Workload,
    own: dict[str, EntmaxArm],
    makers: dict[str, Callable[[], dict[str, list[Step]]]],
    repeats: int,
    profile: bool,
    result: dict[str, Any],
    turned: Callable[[], object],
) -> None:
    """Add one batch to the result: own arms and those of the peers that `makers` make."""
    on_gpu = work.shape.device == "cuda"
    graphs = on_gpu and work.kind == "decode"
    arms = {name: arm.steps for name, arm in own.items()}
    for peer, make in makers.items():
        try:
            arms |= _peer(make, graphs and peer != REFERENCE)
        except Unavailable as reason:
            result["left_out"].setdefault(f"{peer} {reason}", []).append(text)
    eager = [name for name in arms if name.startswith(REFERENCE)]
    times = per_step(arms, repeats, graphs=graphs, eager=eager, warm_up=WARM_UP, turned=turned)
    for name, taken in times.items():
        place = {"batch": text, "kind": work.kind, "arm": name}
        row: dict[str, Any] = {**place, **_summary(taken), "sets": work.sets}
        if arm := own.get(name):
            row |= {"selector": arm.selector.name, **arm.counted()}
            if complaint := arm.complaint() or _fits_in_cache(row):
                result["refused"].append(f"{text}, {name}: {complaint}")
                continue
            if profile and on_gpu:
                row["kernels_us"] = kernel_times(arm.steps[:PROFILED_SETS])
        result["rows"].append(row)


def _refuse_what_takes_minutes(text: str, requests: Sequence[Request]) -> None:
    tokens = sum(request.query * request.tokens for request in requests)
    if tokens > CPU_TOKENS * 8 or sum(request.tokens for request in requests) > CPU_TOKENS:
        raise ValueError(
            f"batch {text!r} takes minutes without a GPU; give smaller ones, such as 2q1s4k or q512"
        )


def _shape(options: Options) -> Shape:
    on_gpu = torch.cuda.is_available()
    return Shape(
        options.query_heads,
        options.kv_heads,
        options.head_size,
        options.page_size,
        getattr(torch, options.dtype) if on_gpu else torch.float32,
        "cuda" if on_gpu else "cpu",
    )


def _workload(requests: Sequence[Request], options: Options) -> Workload:
    shape = _shape(options)
    pages = sum(-(-request.tokens // shape.page_size) for request in requests)
    tokens = pages * shape.page_size
    sets = CPU_SETS
    if shape.device == "cuda":
        sets = max(1, min(MOST_SETS, POOL_BYTES // (tokens * shape.token_bytes)))
        if not all(request.decodes for request in requests):
            new = sum(request.query for request in requests)
            sets = max(1, min(sets, PREFILL_TOKENS // new))
    pool = Pool.of(shape, sets * tokens, options.data)
    return Workload.over(pool, requests, sets, options.support, options.table_tokens)


def _own_arms(work: Workload, selectors: Sequence[str], share: float) -> dict[str, EntmaxArm]:
    """Prefill is the same under every selector."""
    if work.kind == "prefill":
        return {"entmax": EntmaxArm(work, selector_of("exact", 0, share, work.shape.page_size))}
    longest = max(request.tokens for request in work.requests[: work.decodes])
    size = work.shape.page_size
    return {name: EntmaxArm(work, selector_of(name, longest, share, size)) for name in selectors}


def _peer(make: Callable[[], dict[str, list[Step]]], graphs: bool) -> dict[str, list[Step]]:
    """A peer's arms, whose steps have run once.

    graphs: whether its steps will be captured.

    Raises Unavailable if they cannot.
    """
    try:
        made = make()
        for steps in made.values():
            steps[0]()
            if graphs:
                graph_of(steps[:1])
    except Unavailable:
        raise
    except Exception as error:  # another project's kernels may fail in any way
        raise Unavailable(f"failed: {type(error).__name__}: {error}") from error
    return made


def _summary(taken: list[float]) -> dict[str, float]:
    return {
        "us": statistics.median(taken),
        "us_spread": max(taken) - min(taken),
        "us_lowest": min(taken),
        "us_highest": max(taken),
    }


def _fits_in_cache(row: dict[str, Any]) -> str | None:
    """Why the pages that all sets' steps read may have come from the L2 cache."""
    if not torch.cuda.is_available() or "bytes" not in row:
        return None
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    if row["bytes"] * row["sets"] > cache:
        return None
    return f"what its steps read fits in the L2 cache of {cache >> 20} MiB; give more tokens"


def command(args: Any) -> int:
    """The subcommand: 0 if every arm that was asked for of this project is a measurement."""
    try:
        result = run(
            args.batches,
            args.selectors,
            args.peers,
            from_arguments(Options, args),
            profile=args.profile,
            reference_checkout=args.reference_system,
            commit=args.commit,
        )
    except ValueError as error:
        print(f"entmaxkv bench: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 1 if result["refused"] else 0
