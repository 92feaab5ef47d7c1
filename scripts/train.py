"""Trains a byte-level Llama with entmax or softmax attention to retrieve, and evaluates it.

Sequences grow with the budget: retrieval forms on short documents and then stretches to long ones,
because a long document gives entmax no gradient to a key outside its support.
"""

import argparse
import itertools
import math
import random
import time
from pathlib import Path

import torch
from evaluate_model import score, write_evaluation
from llama import ATTENTION, new_model, save_model
from torch.nn.functional import cross_entropy
from training_data import prefetched, training_batch
from transformers import LlamaForCausalLM

# The share of the budget after which each set of lengths is drawn from.
CURRICULUM = (
    (0.0, (256, 512)),
    (0.1, (512, 1024)),
    (0.2, (1024, 2048)),
    (0.3, (512, 2048, 4096)),
    (0.45, (1024, 4096, 8704)),
    (0.6, (1024, 8704, 16896)),
    (0.75, (1024, 4096, 8704, 16896, 33280)),
)
LONGEST = 33280
WARMUP = 0.02


def stage_lengths(progress: float) -> tuple[int, ...]:
    return max(stage for stage in CURRICULUM if stage[0] <= progress)[1]


def repeated_share(progress: float) -> float:
    """Share of documents that are repeated random bytes: many until induction has formed."""
    return 0.5 if progress < 0.05 else 0.1


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, progress / WARMUP + 0.01) * (0.05 + 0.95 * cosine)


class Budget:
    """Progress from 0 to 1 through a number of minutes or of steps."""

    def __init__(self, minutes: float | None, steps: int | None, start: float = 0.0) -> None:
        self.seconds = None if minutes is None else 60 * minutes
        self.steps = steps
        self.begin = time.monotonic()
        self.start = start

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def progress(self, step: int) -> float:
        if self.steps is not None:
            return self.start + step / self.steps
        assert self.seconds is not None
        return self.start + self.elapsed / self.seconds


def weighted_loss(
    model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean cross-entropy, and the mean over answers alone, in nats per byte."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    weights = weights.flatten()
    answers = weights > 1
    answer_loss = (losses.detach() * answers).sum() / answers.sum().clamp(min=1)
    return (losses * weights).sum() / weights.sum(), answer_loss


def probe(model: LlamaForCausalLM) -> str:
    """A quick look at the 8-key scores per length."""
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        scores = [
            f"{length}: {score(model, 'codes', 8, length, 32):.2f}"
            for length in (512, 2048, 8192, 16384, 32768)
        ]
    model.train()
    return ", ".join(scores)


def train(model: LlamaForCausalLM, budget: Budget, arguments: argparse.Namespace) -> None:
    """Trains until the budget is spent, printing progress and saving checkpoints."""
    rng = random.Random(arguments.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )

    made = itertools.count()

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        progress = min(1.0, budget.progress(next(made)))
        length = rng.choice(stage_lengths(progress))
        rows = max(1, arguments.tokens_per_step // length)
        tokens, weights = training_batch(rng, rows, length, repeated_share(progress))
        return torch.from_numpy(tokens), torch.from_numpy(weights)

    batches = prefetched(make)
    seen, step, probed, logged = 0, 0, 0.0, 0.0
    while (progress := budget.progress(step)) < 1:
        tokens, weights = (x.to(model.device) for x in next(batches))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, arguments.learning_rate)
        loss, answer_loss = weighted_loss(model, tokens, weights)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seen += weights.numel()
        if budget.elapsed - logged > arguments.log_seconds:
            # Reading the loss waits for the device, so the speed is right after it.
            values = f"loss {loss.item():.3f} answers {answer_loss.item():.4f} norm {norm:.2f}"
            remaining = budget.elapsed * (1 - progress) / max(progress - budget.start, 1e-9)
            logged = budget.elapsed
            print(
                f"{progress:.3f} step {step} length {weights.shape[1]} {values} "
                f"tokens {seen / 1e6:.1f}M {seen / logged / 1e6:.2f}M/s eta {remaining:.0f}s",
                flush=True,
            )
        if budget.elapsed - probed > arguments.probe_seconds:
            print(f"probe {probe(model)}", flush=True)
            state = {"model": model.state_dict(), "progress": progress}
            torch.save(state, arguments.out / "checkpoint.pt")
            probed = budget.elapsed
    print(f"trained {step} steps, {seen} tokens, {budget.elapsed:.0f} s", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--alpha", type=float, choices=sorted(ATTENTION), default=1.5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--tokens-per-step", type=int, default=66560)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=400, help="evaluation tasks per score")
    parser.add_argument("--log-seconds", type=float, default=5)
    parser.add_argument("--probe-seconds", type=float, default=75)
    parser.add_argument(
        "--resume", type=Path, help="a checkpoint.pt; continues at its share of the budget"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    model = new_model(
        alpha=arguments.alpha,
        layers=arguments.layers,
        hidden=arguments.hidden,
        intermediate=arguments.intermediate,
        heads=arguments.heads,
        key_heads=arguments.key_heads,
        longest=LONGEST,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    start = 0.0
    if arguments.resume:
        state = torch.load(arguments.resume, map_location=model.device)
        model.load_state_dict(state["model"])
        start = state["progress"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, Budget(arguments.minutes, arguments.steps, start), arguments)
    save_model(model, arguments.out)
    write_evaluation(arguments.out, arguments.samples)


if __name__ == "__main__":
    main()
