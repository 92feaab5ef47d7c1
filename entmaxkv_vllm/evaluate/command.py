"""The subcommand: a checkpoint, selectors and contexts in, one JSON file out."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from entmaxkv_kernels.selectors import needs_entmax
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.config import ConfigurationError
from entmaxkv_vllm.evaluate.attention import attention_rows
from entmaxkv_vllm.evaluate.checkpoint import Checkpoint, alpha_of, load
from entmaxkv_vllm.evaluate.errors import EvaluationError
from entmaxkv_vllm.evaluate.paged_model import PagedModel
from entmaxkv_vllm.evaluate.predictions import perplexity_rows, task_rows
from entmaxkv_vllm.evaluate.selectors import page_statistics, parse_selector
from entmaxkv_vllm.retrieval import add_packages

GPU_CHUNK_ELEMENTS = 1 << 28
"""Elements that the reference gathers at a time on a GPU."""
ROOM = {"attention": 0, "perplexity": 1, "tasks": 256}
"""Tokens that a sequence of each part takes beyond its context."""
SEED = 20261127


@contextmanager
def chunks_of(elements: int | None) -> Iterator[None]:
    """Let the reference gather so many elements at a time, or as many as it does by itself."""
    # `reference.decode` is a function, too, which hides its module from an import statement.
    names = ("decode", "select")
    modules: list[Any] = [import_module(f"entmaxkv_kernels.reference.{name}") for name in names]
    before = [module.CHUNK_ELEMENTS for module in modules]
    for module in modules:
        module.CHUNK_ELEMENTS = elements or module.CHUNK_ELEMENTS
    try:
        yield
    finally:
        for module, elements in zip(modules, before, strict=True):
            module.CHUNK_ELEMENTS = elements


def command(args: argparse.Namespace) -> int:
    """Measure, and write the file anew after every result. 2 if something is refused."""
    try:
        _evaluate(args)
    except (ConfigurationError, EvaluationError) as error:
        print(f"entmaxkv evaluate: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    _check(args)
    longest = max(args.contexts) + max(ROOM[part] for part in args.parts)
    alpha = alpha_of(args.model, args.alpha, longest)
    _check_selectors(args.selectors, alpha)
    checkpoint = load(args.model, alpha)
    training = args.model / "training.json"
    result: dict[str, Any] = about(args.commit) | {
        "model": args.model.name,
        "alpha": alpha,
        "training": json.loads(training.read_text()) if training.exists() else None,
        "arguments": {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
    }
    on_gpu = checkpoint.model.device.type == "cuda"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with chunks_of(GPU_CHUNK_ELEMENTS if on_gpu else None):
        for part in args.parts:
            result[part] = []
            for row in _rows(part, checkpoint, args):
                result[part].append(row)
                args.out.write_text(json.dumps(result) + "\n")


def _check(args: argparse.Namespace) -> None:
    """Refuse before a model is loaded what can be known to fail."""
    if args.steps >= min(args.contexts):
        raise EvaluationError(
            f"--steps {args.steps} leaves nothing to prefill of a context of {min(args.contexts)}; "
            "give fewer"
        )
    if args.inputs is not None and not args.inputs.is_dir():
        raise EvaluationError(f"--inputs {str(args.inputs)!r} is no folder; make it first")
    try:
        for name in args.selectors:
            parse_selector(name)
        add_packages(args.packages)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def _check_selectors(names: list[str], alpha: float | tuple[float, ...]) -> None:
    softmax = 1.0 in (alpha if isinstance(alpha, tuple) else (alpha,))
    for name in names:
        if needs_entmax(parse_selector(name)) and softmax:
            raise EvaluationError(
                f"selector {name!r} needs an entmax threshold, which softmax (alpha 1) does not "
                "have; give exact or topk"
            )


def _rows(part: str, checkpoint: Checkpoint, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one part, with a progress bar."""
    end = time.monotonic() + 60 * args.minutes
    units = len(args.contexts) * len(args.selectors)
    units *= {"attention": args.sequences, "perplexity": 1, "tasks": len(args.tasks)}[part]
    longest = max(args.contexts) + ROOM[part]
    batch = 1 if part == "attention" else args.batch
    kept = page_statistics(args.selectors)
    try:
        paged = PagedModel(checkpoint.model, checkpoint.alpha, batch, longest, kept)
    except ValueError as error:
        raise EvaluationError(f"the model's pages: {error}") from error
    selectors, contexts = args.selectors, args.contexts
    with tqdm(total=units, desc=part, disable=None, leave=False) as bar:
        watched: dict[str, Any] = {"over": lambda: time.monotonic() > end, "done": bar.update}
        what = checkpoint, paged, selectors, contexts
        if part == "attention":
            watched |= {"sequences": args.sequences, "positions": args.positions}
            rows = attention_rows(*what, seed=SEED, inputs=args.inputs, **watched)
        elif part == "perplexity":
            rows = perplexity_rows(*what, steps=args.steps, **watched)
        else:
            rows = task_rows(*what, tasks=args.tasks, seed=SEED, **watched)
        for row in rows:
            if not bar.disable:
                tqdm.write(describe(part, row))
            else:
                print(describe(part, row), flush=True)
            yield row


def describe(part: str, row: dict[str, Any]) -> str:
    """One line of a result."""
    known: dict[str, Any] = {
        key: row[key] for key in ("context", "task", "selector", "layer") if key in row
    }
    read = row["pages_read"]
    known["pages_read"] = f"{read if isinstance(read, float) else read['mean']:.3g}"
    if "solved" in row:
        known["right"] = sum(row["solved"]) / row["tasks"]
    if "nats_per_byte" in row:
        known["nats_per_byte"] = round(row["nats_per_byte"], 5)
    if "dropped_mass" in row:
        known["dropped_mass"] = f"{row['dropped_mass']['mean']:.3g}"
    return f"{part}: " + ", ".join(f"{key} {value}" for key, value in known.items())
