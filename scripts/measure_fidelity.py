"""Measure what a selector drops on the demo model, through the engine that serves it.

Each needle task is prefilled once. Its answer is then generated twice from the cached prompt:
exactly, and with the selector. While the selector decodes, every step is compared with the exact
one over the same cache. Writes one JSON file; `tabulate_fidelity.py` shows it in docs/fidelity.md.
"""

import argparse
import datetime
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from entmaxkv_kernels import Exact, analyze_decode
from entmaxkv_vllm import DEMO_MODEL, __version__
from entmaxkv_vllm.retrieval import NeedleTask, evaluation_tasks

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

LENGTHS = (2048, 4096, 8192)
KEYS = (1, 8)
ANSWER_TOKENS = 64
BATCH = 8
MEASURES = ("pages_read", "dropped_mass", "support_recall", "output_error")


def batched(tasks: Iterator[NeedleTask], size: int) -> Iterator[list[NeedleTask]]:
    while batch := list(islice(tasks, size)):
        yield batch


class Recorder:
    """Per layer, every decode step's measures, one value per sequence and head."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)

    def add(self, impl: Any, layer: Any, query: torch.Tensor, kv_cache: Any, metadata: Any) -> None:
        """Compare one decode step of one layer with the exact one."""
        rows = metadata.decode
        chosen = torch.ones(rows.count, dtype=torch.bool) if rows.exact is None else ~rows.exact
        if not chosen.any():
            return
        seq_lens = rows.seq_lens[chosen]
        report = analyze_decode(
            query[: rows.count][chosen],
            impl.pages(layer, kv_cache),
            rows.block_table[chosen],
            seq_lens,
            scale=impl.scale,
            alpha=impl.alpha,
            selector=impl.selector,
            exact_below=impl.config.exact_below,
        )
        page_size = impl.config.page_size
        held = (seq_lens[:, None] + page_size - 1) // page_size
        index = impl.index_of(layer)
        self.values[index, "pages_read"].append(report.selected.sum(-1) / held)
        for name in MEASURES[1:]:
            self.values[index, name].append(getattr(report, name))

    def summary(self) -> list[dict[str, Any]]:
        """One row per layer: mean, 99th percentile and worst of each measure."""
        rows = []
        for layer in sorted({layer for layer, _ in self.values}):
            row: dict[str, Any] = {"layer": layer}
            for name in MEASURES:
                values = torch.cat([v.flatten() for v in self.values[layer, name]]).double()
                row[f"{name}_mean"] = values.mean().item()
                if name == "support_recall":
                    row[f"{name}_worst"] = values.min().item()
                else:
                    row[f"{name}_p99"] = values.quantile(0.99).item()
                    row[f"{name}_worst"] = values.max().item()
            row["samples"] = sum(v.numel() for v in self.values[layer, "dropped_mass"])
            rows.append(row)
        return rows


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Let `recorder` see every decode step of every layer."""
    from entmaxkv_vllm.impl import EntmaxKVImpl

    forward: Callable[..., torch.Tensor] = EntmaxKVImpl.forward

    def forward_and_record(
        self: Any, layer: Any, query: Any, *others: Any, **outputs: Any
    ) -> torch.Tensor:
        output = forward(self, layer, query, *others, **outputs)
        kv_cache, metadata = others[2], others[3]
        if metadata is not None and metadata.decode is not None:
            recorder.add(self, layer, query, kv_cache, metadata)
        return output

    EntmaxKVImpl.forward = forward_and_record  # type: ignore[method-assign]
    try:
        yield
    finally:
        EntmaxKVImpl.forward = forward  # type: ignore[method-assign]


def measure(model: Path, selector: str, tasks: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Answers right with and without the selector, and what it dropped."""
    from vllm import LLM, SamplingParams

    options = {"selector": selector, "exact_below": 0}
    llm = LLM(
        str(model),
        attention_backend="ENTMAXKV",
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(lengths) + ANSWER_TOKENS,
        additional_config={"entmaxkv": options},
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    context = worker.vllm_config.compilation_config.static_forward_context
    layers = list(context.values())
    sparse = layers[0].impl.selector
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, stop="\n")

    def answers(prompts: list[str], chosen: Any) -> list[str]:
        for layer in layers:
            layer.impl.selector = chosen
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    recorder, results = Recorder(), []
    for length in lengths:
        for keys in KEYS:
            right: dict[str, int] = {"exact": 0, selector: 0}
            for batch in batched(evaluation_tasks("codes", keys, length, tasks, seed=1), BATCH):
                prompts = [task.prompt for task in batch]
                pairs = zip(batch, answers(prompts, Exact()), strict=True)
                right["exact"] += sum(task.is_correct(text) for task, text in pairs)
                with recorded(recorder):
                    pairs = zip(batch, answers(prompts, sparse), strict=True)
                right[selector] += sum(task.is_correct(text) for task, text in pairs)
            results.append(
                {
                    "context": length,
                    "keys": keys,
                    "tasks": tasks,
                    "exact_right": right["exact"],
                    f"{selector}_right": right[selector],
                }
            )
            print(results[-1], flush=True)
    return {"answers": results, "layers": recorder.summary()}


def table(result: dict[str, Any]) -> str:
    """The result as the two Markdown tables of docs/fidelity.md."""
    selector = result["selector"]
    lines = [
        f"| context | keys | tasks | `exact` right | `{selector}` right |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['context']} | {row['keys']} | {row['tasks']} "
        f"| {row['exact_right'] / row['tasks']:.1%} "
        f"| {row[f'{selector}_right'] / row['tasks']:.1%} |"
        for row in result["answers"]
    ]
    lines += [
        "",
        "| layer | pages read | dropped mass: mean | 99th percentile | worst "
        "| output error: mean | 99th percentile | worst | support recall: mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['layer']} | {row['pages_read_mean']:.1%} "
        f"| {row['dropped_mass_mean']:.2g} | {row['dropped_mass_p99']:.2g} "
        f"| {row['dropped_mass_worst']:.2g} | {row['output_error_mean']:.2g} "
        f"| {row['output_error_p99']:.2g} | {row['output_error_worst']:.2g} "
        f"| {row['support_recall_mean']:.4f} |"
        for row in result["layers"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--selector", default="gaussian")
    parser.add_argument("--tasks", type=int, default=50, help="for each length and number of keys")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    result = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "versions": {"entmaxkv-vllm": __version__, "torch": torch.__version__},
        "date": datetime.date.today().isoformat(),
        "model": arguments.model.name,
        "selector": arguments.selector,
        **measure(arguments.model, arguments.selector, arguments.tasks, tuple(arguments.lengths)),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
