"""Measure a trained model under selectors and budgets, through the kernels that serve.

Three parts, each of which fills a section of one JSON file:

- attention: at positions spread over whole held-out sequences, what each selector drops in each
  layer and head beside what `dropped_bound` says, and the error of the output;
- perplexity: of held-out text whose last tokens are decoded one by one;
- tasks: the share of RULER's tasks (ruler.py) that greedy decoding solves.

Text is prefilled exactly, once; then each selector decodes the same tokens. The file is written
anew after every result, and no new one is begun once --minutes are over.
"""

import argparse
import datetime
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from byte_tokenizer import BOS, EOS, PAD
from llama import load_model
from paged_model import PagedModel, implementation_for, parse_selector
from ruler import TASKS, ruler_tasks
from torch import Tensor
from train import add_packages

from entmaxkv_kernels import Exact, Selector, analyze_decode, decode
from entmaxkv_vllm.bench.provenance import checked_out
from entmaxkv_vllm.retrieval import haystack

PARTS = ("tasks", "perplexity", "attention")
QUANTILES = (0.5, 0.9, 0.99, 0.999)
POSITION_BINS = 8
GPU_CHUNK_ELEMENTS = 1 << 28
"""Elements that the reference gathers at a time on a GPU."""
LAST_POSITIONS = 64
"""Of the positions measured, so many are the last ones of a window: the answers of questions."""
LONGEST_ANSWER = 48
ANSWER_ROOM = 256
"""Tokens that a sequence may grow by."""
SEED = 20261127


class Clock:
    """Says when no new measurement is to begin."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


@contextmanager
def chunks_of(elements: int | None) -> Iterator[None]:
    """Let the reference gather so many elements at a time, or as many as it does by itself."""
    # `reference.decode` is a function, too, which hides its module from an import statement.
    names = ("adaptive", "decode", "select")
    modules: list[Any] = [import_module(f"entmaxkv_kernels.reference.{name}") for name in names]
    before = [module.CHUNK_ELEMENTS for module in modules]
    for module in modules:
        module.CHUNK_ELEMENTS = elements or module.CHUNK_ELEMENTS
    try:
        yield
    finally:
        for module, elements in zip(modules, before, strict=True):
            module.CHUNK_ELEMENTS = elements


def held_out_windows(count: int, length: int) -> Tensor:
    """Windows [count, length] of held-out text, evenly spread, each after one <bos>."""
    text = haystack(True)
    if len(text) < length:
        raise SystemExit(f"--contexts: {length} is longer than the held-out text, {len(text)}")
    rows = []
    for index in range(count):
        start = (len(text) - length + 1) * index // count
        rows.append([BOS, *text[start : start + length - 1].encode()])
    return torch.tensor(rows)


def measured_windows(count: int, length: int) -> Tensor:
    """Windows [count, length] of held-out text; each second one ends with a question about one of
    16 facts in it and the answer."""
    windows = held_out_windows(count, length)
    for index in range(1, count, 2):
        task = ruler_tasks("multi-key needles", length - LONGEST_ANSWER, index + 1, SEED)[index]
        tokens = [BOS, *f"{task.prompt}{task.answer}".encode()]
        windows[index] = torch.tensor(tokens + [EOS] * (length - len(tokens)))
    return windows


def summary(values: Tensor, worst: str) -> dict[str, float]:
    """Mean, quantiles and worst of all values; quantiles are of what is worse than most."""
    flat = values.flatten().double()
    bad = flat if worst == "max" else -flat
    sign = 1 if worst == "max" else -1
    order = bad.sort().values
    at = [min(len(order) - 1, math.ceil(q * len(order)) - 1) for q in QUANTILES]
    found = {"mean": flat.mean().item()}
    found |= {f"p{100 * q:g}": sign * order[i].item() for q, i in zip(QUANTILES, at, strict=True)}
    found["worst"] = sign * order[-1].item()
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def place_summaries(values: Tensor, worst: str) -> dict[str, Any]:
    """Of values [positions, heads]: all together, by head, and by position."""

    def short(part: Tensor) -> dict[str, float]:
        whole = summary(part, worst)
        return {key: whole[key] for key in ("mean", "p99", "worst")}

    return {
        **summary(values, worst),
        "by_head": [short(head) for head in values.unbind(1)],
        "by_position": [short(part) for part in values.chunk(POSITION_BINS)],
    }


def measure_selector(
    paged: PagedModel, layer: int, queries: Tensor, positions: Tensor, selector: Selector
) -> dict[str, Tensor]:
    """Measures [positions, heads] of one layer; each position is a sequence that ends there."""
    cache = paged.caches[paged.statistics_of(selector)][layer]
    rows = queries[positions].contiguous()
    seq_lens = (positions + 1).int()
    table = paged.block_table[:1].expand(len(positions), -1).contiguous()
    shared = rows, cache, table, seq_lens
    settings: dict[str, Any] = {"scale": rows.shape[-1] ** -0.5, "alpha": paged.alpha}
    report = analyze_decode(*shared, selector=selector, **settings)
    serves = implementation_for(selector, paged.implementation)
    served = decode(*shared, selector=selector, implementation=serves, **settings)
    exact = decode(*shared, selector=Exact(), implementation=serves, **settings)
    norm = exact.float().norm(dim=-1).clamp_min(1e-30)
    held = -(-seq_lens[:, None] // paged.page_size)
    group = rows.shape[1] // cache.key.shape[1]
    measures = {
        "pages_read": (report.selected.sum(-1) / held).repeat_interleave(group, 1),
        "dropped_mass": report.dropped_mass,
        "support_recall": report.support_recall,
        "output_error": report.output_error,
        "served_error": (served.float() - exact.float()).norm(dim=-1) / norm,
    }
    if report.dropped_bound is not None:
        measures["dropped_bound"] = report.dropped_bound
    return measures


def save_inputs(
    paged: PagedModel, queries: dict[int, Tensor], positions: Tensor, path: Path
) -> None:
    """The keys [layers, kv_heads, tokens, head_size] of a sequence, and queries [layers, positions,
    heads, head_size] at positions of it."""
    caches = next(iter(paged.caches.values()))
    pages = -(-len(queries[0]) // paged.page_size)
    keys = [
        c.key[paged.block_table[0, :pages].long()].transpose(0, 1).flatten(1, 2) for c in caches
    ]
    chosen = [queries[layer][positions] for layer in sorted(queries)]
    saved = {"keys": torch.stack(keys), "queries": torch.stack(chosen), "positions": positions}
    torch.save({name: x.cpu() for name, x in saved.items()}, path)


def attention_part(
    paged: PagedModel,
    selectors: list[str],
    contexts: list[int],
    sequences: int,
    positions: int,
    inputs: Path | None,
    clock: Clock,
) -> Iterator[dict[str, Any]]:
    """What each selector drops, by layer, head and position.

    inputs: a folder for the keys and queries of every sequence, if given.
    """
    for context in contexts:
        last = min(LAST_POSITIONS, positions // 2)
        spread = torch.linspace(context // 8, context - 1 - last, positions - last).long()
        spread = torch.cat((spread, torch.arange(context - last, context)))
        spread = spread.to(paged.model.device)
        measured: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        for index, window in enumerate(measured_windows(sequences, context)):
            if clock.over:
                break
            queries: dict[int, Tensor] = {}
            paged.prefill(window[None].to(paged.model.device), queries)
            if inputs is not None:
                save_inputs(paged, queries, spread, inputs / f"inputs-{context}-{index}.pt")
            for name in selectors:
                for layer in sorted(queries):
                    place = paged, layer, queries[layer], spread, parse_selector(name)
                    measured.setdefault((name, layer), []).append(measure_selector(*place))
        for (name, layer), parts in measured.items():
            values = {key: torch.stack([part[key] for part in parts], 1) for key in parts[0]}
            row: dict[str, Any] = {"context": context, "selector": name, "layer": layer}
            row["sequences"], row["positions"] = len(parts), positions
            for key, value in values.items():  # [positions, sequences, heads]
                worst = "min" if key == "support_recall" else "max"
                merged = value.flatten(1).unflatten(1, (len(parts), -1))
                row[key] = place_summaries(merged.transpose(0, 1).flatten(0, 1), worst)
            if "dropped_bound" in values:
                slack = values["dropped_bound"].double() - values["dropped_mass"].double()
                row["least_slack_of_bound"] = slack.min().item()
                row["certified"] = (values["dropped_bound"] == 0).double().mean().item()
            row["nothing_dropped"] = (values["dropped_mass"] == 0).double().mean().item()
            yield row


def perplexity_part(
    paged: PagedModel, selectors: list[str], contexts: list[int], steps: int, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Nats per byte of the last `steps` tokens of held-out windows."""
    for context in contexts:
        if clock.over:
            return
        windows = held_out_windows(paged.batch, context + 1).to(paged.model.device)
        first = context - steps
        paged.prefill(windows[:, :first])
        for name in selectors:
            if clock.over:
                return
            loss = torch.zeros(paged.batch, device=windows.device, dtype=torch.float64)
            selector = parse_selector(name)
            for position in range(first, context):
                logits = paged.decode(windows[:, position], position, selector).double()
                chosen = logits.gather(1, windows[:, position + 1, None])[:, 0]
                loss += logits.logsumexp(-1) - chosen
            nats = loss / steps
            yield {
                "context": context,
                "selector": name,
                "steps": steps,
                "nats_per_byte": nats.mean().item(),
                "by_sequence": nats.tolist(),
            }


def tasks_part(
    paged: PagedModel, selectors: list[str], contexts: list[int], clock: Clock
) -> Iterator[dict[str, Any]]:
    """How many tasks greedy decoding solves.

    Greedy decoding gives an answer exactly if each of its tokens is the most likely one after those
    before it: so the right answer is decoded, and every step compared.
    """
    for context in contexts:
        for task in TASKS:
            if clock.over:
                return
            tasks = ruler_tasks(task, context, paged.batch, SEED)
            answers = [[*one.answer.encode(), EOS] for one in tasks]
            longest = max(map(len, answers))
            rows = [
                [BOS, *one.prompt.encode(), *answer, *[PAD] * (longest - len(answer))]
                for one, answer in zip(tasks, answers, strict=True)
            ]
            tokens = torch.tensor(rows, device=paged.model.device)
            paged.prefill(tokens[:, : context - 1])
            for name in selectors:
                selector = parse_selector(name)
                solved = torch.ones(len(rows), dtype=torch.bool, device=tokens.device)
                for position in range(context - 1, tokens.shape[1] - 1):
                    best = paged.decode(tokens[:, position], position, selector).argmax(-1)
                    target = tokens[:, position + 1]
                    solved &= (best == target) | (target == PAD)
                yield {
                    "context": context,
                    "task": task,
                    "selector": name,
                    "tasks": len(rows),
                    "solved": solved.tolist(),
                }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with weights, as train.py writes it")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--selectors", nargs="+", required=True, help="exact, gaussian, topk:TOKENS, adaptive:REACH"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[16384])
    parser.add_argument("--batch", type=int, default=32, help="tasks, and windows of text, at once")
    parser.add_argument("--steps", type=int, default=256, help="tokens of a window to decode")
    parser.add_argument("--sequences", type=int, default=2, help="whose attention is measured")
    parser.add_argument("--positions", type=int, default=384, help="of each of them")
    parser.add_argument("--inputs", type=Path, help="a folder to write keys and queries to")
    parser.add_argument("--packages", nargs="*", default=[], help="as in training")
    parser.add_argument("--eager", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing new after so many")
    parser.add_argument("--commit", default="", help="of the code, where there is no repository")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    clock = Clock(arguments.minutes)
    for name in arguments.selectors:
        parse_selector(name)
    add_packages(arguments.packages)
    model = load_model(arguments.model, "cuda" if torch.cuda.is_available() else "cpu")
    training = arguments.model / "training.json"
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "commit": arguments.commit or checked_out(),
        "date": datetime.date.today().isoformat(),
        "model": arguments.model.name,
        "alpha": model.config.entmax_alpha,
        "training": json.loads(training.read_text()) if training.exists() else None,
        "arguments": {
            name: value.name if isinstance(value, Path) else str(value)
            for name, value in vars(arguments).items()
        },
    }
    selectors, contexts = arguments.selectors, arguments.contexts
    with chunks_of(GPU_CHUNK_ELEMENTS if model.device.type == "cuda" else None):
        for part in arguments.parts:
            longest = max(contexts) + ANSWER_ROOM
            batch = 1 if part == "attention" else arguments.batch
            paged = PagedModel(model, batch, longest, graphs=not arguments.eager)
            if part == "attention":
                counts = arguments.sequences, arguments.positions, arguments.inputs
                rows = attention_part(paged, selectors, contexts, *counts, clock)
            elif part == "perplexity":
                rows = perplexity_part(paged, selectors, contexts, arguments.steps, clock)
            else:
                rows = tasks_part(paged, selectors, contexts, clock)
            result[part] = []
            for row in rows:
                result[part].append(row)
                arguments.out.write_text(json.dumps(result) + "\n")
                print(part, describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """One line of a result."""
    known: dict[str, Any] = {
        key: row[key] for key in ("context", "task", "selector", "layer") if key in row
    }
    if "solved" in row:
        known["right"] = sum(row["solved"]) / row["tasks"]
    if "nats_per_byte" in row:
        known["nats_per_byte"] = round(row["nats_per_byte"], 5)
    if "dropped_mass" in row:
        known |= {key: f"{row[key]['mean']:.3g}" for key in ("pages_read", "dropped_mass")}
    return ", ".join(f"{key} {value}" for key, value in known.items())


if __name__ == "__main__":
    main()
