"""How well a model predicts text and answers tasks while a selector decodes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from entmaxkv_vllm.evaluate.checkpoint import Checkpoint
from entmaxkv_vllm.evaluate.paged_model import PagedModel
from entmaxkv_vllm.evaluate.selectors import parse_selector

NO_TARGET = -1


def perplexity_rows(
    checkpoint: Checkpoint,
    paged: PagedModel,
    selectors: list[str],
    contexts: list[int],
    *,
    steps: int,
    over: Callable[[], bool],
    done: Callable[[], object],
) -> Iterator[dict[str, Any]]:
    """Nats per byte of the last `steps` tokens of held-out windows.

    over: whether nothing new is to begin. done: called after each selector.
    """
    for context in contexts:
        if over():
            return
        windows = checkpoint.windows(paged.batch, context + 1).to(paged.model.device)
        first = context - steps
        paged.prefill(windows[:, :first])
        tokens, targets = windows[:, first:-1], windows[:, first + 1 :]
        sizes = [len(checkpoint.tokenizer.decode(row).encode()) for row in targets.tolist()]
        for name in selectors:
            if over():
                return
            predicted = paged.predict(tokens, first, parse_selector(name))
            losses = predicted.logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
            nats = -losses.double().sum(1).cpu() / torch.tensor(sizes)
            yield {
                "context": context,
                "selector": name,
                "steps": steps,
                "pages_read": predicted.pages_read,
                "nats_per_byte": nats.mean().item(),
                "by_sequence": nats.tolist(),
            }
            done()


def task_rows(
    checkpoint: Checkpoint,
    paged: PagedModel,
    selectors: list[str],
    contexts: list[int],
    *,
    tasks: list[str],
    seed: int,
    over: Callable[[], bool],
    done: Callable[[], object],
) -> Iterator[dict[str, Any]]:
    """How many tasks greedy decoding solves.

    Greedy decoding gives an answer exactly if each of its tokens is the most likely one after those
    before it: so the right answer is decoded, and every step compared.
    """
    for context in contexts:
        for name in tasks:
            if over():
                return
            drawn = checkpoint.tasks(name, context, paged.batch, seed)
            longest = max(len(task.answer) for task in drawn)
            filled = [t.answer + [NO_TARGET] * (longest - len(t.answer)) for t in drawn]
            targets = torch.tensor(filled, device=paged.model.device)
            prompts = torch.tensor([task.prompt for task in drawn], device=paged.model.device)
            paged.prefill(prompts[:, :-1])
            tokens = torch.cat((prompts[:, -1:], targets[:, :-1].clamp_min(0)), 1)
            for selector in selectors:
                predicted = paged.predict(tokens, context - 1, parse_selector(selector))
                right = (predicted.logits.argmax(-1) == targets) | (targets == NO_TARGET)
                yield {
                    "context": context,
                    "task": name,
                    "selector": selector,
                    "tasks": len(drawn),
                    "pages_read": predicted.pages_read,
                    "solved": right.all(1).tolist(),
                }
                done()
