"""What a selector drops in each layer and head at positions of whole sequences."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entmaxkv_kernels import Exact, Selector, analyze_decode, decode
from entmaxkv_vllm.evaluate.checkpoint import Checkpoint
from entmaxkv_vllm.evaluate.errors import EvaluationError
from entmaxkv_vllm.evaluate.paged_model import PagedModel, Recorded
from entmaxkv_vllm.evaluate.selectors import parse_selector
from entmaxkv_vllm.evaluate.summary import place_summaries

LAST_POSITIONS = 64
"""Of the positions measured, so many are the last ones of a window: the answers of questions."""
ROOM_FOR_KEYS = 2048
"""Tokens of a window that has room for many facts."""


def measured_windows(checkpoint: Checkpoint, count: int, length: int, seed: int) -> Tensor:
    """Windows [count, length] of held-out text; each second one ends with a question about one of
    16 facts in it (the only one, if it is short) and the answer."""
    windows = checkpoint.windows(count, length)
    begin = len(checkpoint.begin)
    for index in range(1, count, 2):
        name = "single needle" if length < ROOM_FOR_KEYS else "multi-key needles"
        task = checkpoint.tasks(name, length - LAST_POSITIONS, index + 1, seed)[index]
        ending = [*task.prompt[begin:], *task.answer][begin - length :]
        windows[index, length - len(ending) :] = torch.tensor(ending)
    return windows


def measure_selector(
    paged: PagedModel, layer: int, recorded: Recorded, positions: Tensor, selector: Selector
) -> dict[str, Tensor]:
    """Measures [positions, heads] of one layer; each position is a sequence that ends there."""
    cache = paged.caches[paged.statistics_of(selector)][layer]
    rows = recorded.query[positions].contiguous()
    seq_lens = (positions + 1).int()
    table = paged.block_table[:1].expand(len(positions), -1).contiguous()
    shared = rows, cache, table, seq_lens
    settings: dict[str, Any] = {
        "scale": recorded.scale,
        "alpha": paged.alpha,
        "alibi_slopes": recorded.slopes,
    }
    report = analyze_decode(*shared, selector=selector, **settings)
    serves = paged.implementation
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
    paged: PagedModel, recorded: dict[int, Recorded], positions: Tensor, path: Path
) -> None:
    """The keys [layers, kv_heads, tokens, head_size] of a sequence, and queries [layers, positions,
    heads, head_size] at positions of it.

    Raises EvaluationError for a model whose scores have slopes besides.
    """
    if recorded[0].slopes is not None:
        raise EvaluationError("--inputs saves no ALiBi slopes, which this model has; leave it out")
    caches = next(iter(paged.caches.values()))
    pages = -(-len(recorded[0].query) // paged.page_size)
    keys = [
        c.key[paged.block_table[0, :pages].long()].transpose(0, 1).flatten(1, 2) for c in caches
    ]
    chosen = [recorded[layer].query[positions] for layer in sorted(recorded)]
    saved = {"keys": torch.stack(keys), "queries": torch.stack(chosen), "positions": positions}
    torch.save({name: x.cpu() for name, x in saved.items()}, path)


def attention_rows(
    checkpoint: Checkpoint,
    paged: PagedModel,
    selectors: list[str],
    contexts: list[int],
    *,
    sequences: int,
    positions: int,
    seed: int,
    inputs: Path | None,
    over: Callable[[], bool],
    done: Callable[[], object],
) -> Iterator[dict[str, Any]]:
    """What each selector drops, by layer, head and position.

    sequences, positions: how many windows of each context, and how many positions of each.
    inputs: a folder for the keys and queries of every sequence, if given.
    over: whether nothing new is to begin.
    done: called after each selector of each sequence.
    """
    device = paged.model.device
    for context in contexts:
        last = min(LAST_POSITIONS, positions // 2)
        spread = torch.linspace(context // 8, context - 1 - last, positions - last).long()
        spread = torch.cat((spread, torch.arange(context - last, context))).to(device)
        measured: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        for index, window in enumerate(measured_windows(checkpoint, sequences, context, seed)):
            if over():
                break
            recorded: dict[int, Recorded] = {}
            paged.prefill(window[None].to(device), recorded)
            if inputs is not None:
                save_inputs(paged, recorded, spread, inputs / f"inputs-{context}-{index}.pt")
            for name in selectors:
                if over():
                    break
                for layer in sorted(recorded):
                    place = paged, layer, recorded[layer], spread, parse_selector(name)
                    measured.setdefault((name, layer), []).append(measure_selector(*place))
                done()
        for (name, layer), parts in measured.items():
            yield {"context": context, "selector": name, "layer": layer, **_row(parts)}


def _row(parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Measures [positions, heads] of each sequence, summed up."""
    values = {key: torch.stack([part[key] for part in parts], 1) for key in parts[0]}
    row: dict[str, Any] = {"sequences": len(parts), "positions": len(values["dropped_mass"])}
    for key, value in values.items():  # [positions, sequences, heads]
        worst = "min" if key == "support_recall" else "max"
        row[key] = place_summaries(value.flatten(0, 1), worst)
    if "dropped_bound" in values:
        slack = values["dropped_bound"].double() - values["dropped_mass"].double()
        row["least_slack_of_bound"] = slack.min().item()
        row["certified"] = (values["dropped_bound"] == 0).double().mean().item()
    row["nothing_dropped"] = (values["dropped_mass"] == 0).double().mean().item()
    return row
