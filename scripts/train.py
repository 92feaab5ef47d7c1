"""Trains byte-level Llamas with entmax or softmax attention to retrieve, and evaluates them.

Sequences grow with the budget: retrieval forms on short documents and then stretches to long ones,
because a long document gives entmax no gradient to a key outside its support.

Several values of --alpha train twins: from the same first weights, step by step on the same batches
with the same learning rates. Their folders are named after alpha, inside that of --out.
"""

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from evaluate_model import score, write_evaluation
from llama import POSITIONS, attention_of, new_model, save_model
from torch.nn.functional import cross_entropy
from training_data import prefetched, training_batch
from transformers import LlamaForCausalLM

from entmaxkv_vllm.retrieval import add_packages, haystack

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


def stage_lengths(progress: float, longest: int) -> tuple[int, ...]:
    stage = max(stage for stage in CURRICULUM if stage[0] <= progress)[1]
    return tuple(length for length in stage if length <= longest) or (longest,)


def repeated_share(progress: float, until: float) -> float:
    """Share of documents that are repeated random bytes: many until induction has formed."""
    return 0.5 if progress < until else 0.1


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
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    weights = weights.flatten()
    answers = weights > 1
    answer_loss = (losses.detach() * answers).sum() / answers.sum().clamp(min=1)
    return (losses * weights).sum() / weights.sum(), answer_loss


def probe(model: LlamaForCausalLM) -> str:
    """A quick look at the 8-key scores per length."""
    lengths = (512, 2048, 8192, 16384, 32768)
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        scores = [
            f"{length}: {score(model, 'codes', 8, length, 32):.2f}"
            for length in lengths
            if length < model.config.max_position_embeddings
        ]
    model.train()
    return ", ".join(scores)


class Trainee:
    """A model, its optimizer and the folder that it is saved to."""

    def __init__(self, model: LlamaForCausalLM, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.alpha: float = model.config.entmax_alpha
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        self.loss = self.answer_loss = self.norm = torch.zeros(())

    def differentiate(self, tokens: torch.Tensor, weights: torch.Tensor) -> None:
        self.loss, self.answer_loss = weighted_loss(self.model, tokens, weights)
        self.optimizer.zero_grad()
        self.loss.backward()

    def step(self, tokens: torch.Tensor, weights: torch.Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.differentiate(tokens, weights)
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def save(self, record: dict[str, Any]) -> None:
        """Write the model, and beside it how it was trained."""
        save_model(self.model, self.folder)
        (self.folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")

    def describe(self) -> str:
        """Its last losses; reading them waits for the device."""
        return (
            f"alpha {self.alpha:g}: loss {self.loss.item():.3f} "
            f"answers {self.answer_loss.item():.4f} norm {self.norm.item():.2f}"
        )


def train(
    trainees: list[Trainee],
    budget: Budget,
    arguments: argparse.Namespace,
    trained: dict[str, Any],
) -> None:
    """Trains until the budget is spent, printing progress and saving checkpoints and models.

    trained: receives the numbers of steps and tokens.
    """
    rng = random.Random(arguments.seed)
    device = trainees[0].model.device
    made = itertools.count()

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        progress = min(1.0, budget.progress(next(made)))
        length = rng.choice(stage_lengths(progress, arguments.longest))
        rows = max(1, arguments.tokens_per_step // length)
        repeated = repeated_share(progress, arguments.repeat_until)
        tokens, weights = training_batch(rng, rows, length, repeated, arguments.ruler_share)
        return torch.from_numpy(tokens), torch.from_numpy(weights)

    batches = prefetched(make)
    seen, step, probed, logged = 0, 0, 0.0, 0.0
    while (progress := budget.progress(step)) < 1:
        tokens, weights = (x.to(device) for x in next(batches))
        rate = learning_rate(progress, arguments.learning_rate)
        for trainee in trainees:
            trainee.step(tokens, weights, rate)
        step += 1
        seen += weights.numel()
        trained |= {"steps": step, "tokens": seen}
        if budget.elapsed - logged > arguments.log_seconds:
            # Reading the losses waits for the device, so the speed is right after it.
            values = "; ".join(trainee.describe() for trainee in trainees)
            remaining = budget.elapsed * (1 - progress) / max(progress - budget.start, 1e-9)
            logged = budget.elapsed
            print(
                f"{progress:.3f} step {step} length {weights.shape[1]} {values} "
                f"tokens {seen / 1e6:.1f}M {seen / logged / 1e6:.2f}M/s eta {remaining:.0f}s",
                flush=True,
            )
        if budget.elapsed - probed > arguments.probe_seconds:
            for trainee in trainees:
                print(f"probe, alpha {trainee.alpha:g}: {probe(trainee.model)}", flush=True)
                state = {"model": trainee.model.state_dict(), "progress": progress}
                torch.save(state, trainee.folder / "checkpoint.pt")
                trainee.save(trained)
            probed = budget.elapsed
    print(f"trained {step} steps, {seen} tokens, {budget.elapsed:.0f} s", flush=True)


def warm_up(trainees: list[Trainee], arguments: argparse.Namespace) -> None:
    """Compile, and draw the haystack, before the clock of the schedule starts."""
    length = min(512, arguments.longest)
    batch = training_batch(random.Random(0), 1, length, 0.0)
    tokens, weights = (torch.from_numpy(x).to(trainees[0].model.device) for x in batch)
    for trainee in trainees:
        trainee.differentiate(tokens, weights)
        trainee.describe()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.5], help="1, softmax, to 2")
    parser.add_argument(
        "--positions",
        choices=sorted(POSITIONS),
        default="rotary",
        help="nape: ALiBi on half of the heads, learned scales of queries on the others",
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--tokens-per-step", type=int, default=66560)
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens of a sequence")
    parser.add_argument(
        "--packages",
        nargs="*",
        default=[],
        help="installed packages whose sources are text, besides the standard library",
    )
    parser.add_argument(
        "--repeat-until",
        type=float,
        default=0.05,
        help="share of the budget in which half of the documents repeat random bytes",
    )
    parser.add_argument(
        "--ruler-share", type=float, default=0.0, help="share of documents with tasks of ruler.py"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--samples", type=int, default=400, help="evaluation tasks per score, 0 for none"
    )
    parser.add_argument("--log-seconds", type=float, default=5)
    parser.add_argument("--probe-seconds", type=float, default=75)
    parser.add_argument(
        "--resume", type=Path, help="a checkpoint.pt; continues at its share of the budget"
    )
    return parser.parse_args()


def new_trainees(arguments: argparse.Namespace) -> list[Trainee]:
    """One for each alpha, all with the same weights."""
    trainees = []
    for alpha in arguments.alpha:
        folder = arguments.out if len(arguments.alpha) == 1 else arguments.out / f"alpha-{alpha:g}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(arguments.seed)
        model = new_model(
            alpha=alpha,
            layers=arguments.layers,
            hidden=arguments.hidden,
            intermediate=arguments.intermediate,
            heads=arguments.heads,
            key_heads=arguments.key_heads,
            longest=arguments.longest,
            positions=arguments.positions,
        )
        trainees.append(Trainee(model.to("cuda" if torch.cuda.is_available() else "cpu"), folder))
    return trainees


def main() -> None:
    arguments = parse_arguments()
    if arguments.resume and len(arguments.alpha) > 1:
        raise SystemExit("--resume continues one model; give one --alpha")
    if arguments.positions == "nape" and 1.0 in arguments.alpha:
        raise SystemExit("--positions nape trains entmax alone; leave --alpha 1 out")
    try:
        for alpha in arguments.alpha:
            attention_of(alpha)
        add_packages(arguments.packages)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    trainees = new_trainees(arguments)
    start = 0.0
    if arguments.resume:
        model = trainees[0].model
        state = torch.load(arguments.resume, map_location=model.device)
        model.load_state_dict(state["model"])
        start = state["progress"]
    parameters = sum(p.numel() for p in trainees[0].model.parameters())
    print(f"{parameters:,} parameters, {len(haystack(False)):,} bytes of text", flush=True)
    warm_up(trainees, arguments)
    settings = {
        name: value.name if isinstance(value, Path) else str(value)
        for name, value in vars(arguments).items()
    }
    trained: dict[str, Any] = {"parameters": parameters, "arguments": settings}
    try:
        train(trainees, Budget(arguments.minutes, arguments.steps, start), arguments, trained)
    finally:
        for trainee in trainees:
            trainee.save(trained)
    for trainee in trainees:
        if arguments.samples:
            write_evaluation(trainee.folder, arguments.samples)


if __name__ == "__main__":
    main()
