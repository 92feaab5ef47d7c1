"""Scores a model on held-out retrieval tasks and writes evaluation.json beside its weights.

A task counts as solved when every token of the answer and the end-of-sequence token after it is
the most likely one given the tokens before it. That is the case exactly when greedy decoding
answers the prompt with that text, and it takes one forward pass.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from byte_tokenizer import BOS, EOS, PAD
from llama import load_model
from transformers import LlamaForCausalLM

from entmaxkv_vllm.retrieval import NeedleTask, evaluation_tasks

# Prompt lengths in tokens, and the share of the samples that each is scored on.
LENGTHS = {
    256: 1.0,
    512: 1.0,
    1024: 1.0,
    2048: 1.0,
    4096: 1.0,
    6144: 1.0,
    8192: 1.0,
    16384: 0.25,
    32768: 0.25,
}
# Each task's kind, its number of facts, and the shortest prompt that they fit into.
TASKS = {
    "single needle": ("codes", 1, 256),
    "8 keys": ("codes", 8, 512),
    "16 keys": ("codes", 16, 1024),
    "8 similar keys": ("similar codes", 8, 512),
    "associative recall, 8 pairs": ("associations", 8, 512),
    "variable tracking, 8 assignments": ("variables", 8, 512),
    "copying 24 characters, 4 strings": ("copying", 4, 512),
}
TOKENS_PER_BATCH = 131072
SEED = 20261123


def encode(task: NeedleTask) -> tuple[list[int], list[int]]:
    return [BOS, *task.prompt.encode()], [*task.answer.encode(), EOS]


@torch.inference_mode()
def solved(model: LlamaForCausalLM, tasks: list[NeedleTask]) -> list[bool]:
    """Whether greedy decoding gives each task's answer; the prompts must have one length."""
    pairs = [encode(task) for task in tasks]
    longest = max(len(answer) for _, answer in pairs)
    rows = [prompt + answer + [PAD] * (longest - len(answer)) for prompt, answer in pairs]
    tokens = torch.tensor(rows, device=model.device)
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    predicted = model.lm_head(hidden[:, -longest:]).argmax(-1)
    targets = tokens[:, -longest:]
    return ((predicted == targets) | (targets == PAD)).all(-1).tolist()


def score(
    model: LlamaForCausalLM, kind: str, keys: int, length: int, samples: int, seed: int = SEED
) -> float:
    """Share of held-out tasks solved with prompts of `length` tokens."""
    tasks = list(evaluation_tasks(kind, keys, length, samples, seed))
    size = max(1, TOKENS_PER_BATCH // length)
    batches = [tasks[start : start + size] for start in range(0, samples, size)]
    return sum(sum(solved(model, batch)) for batch in batches) / samples


def evaluate(model: LlamaForCausalLM, samples: int) -> dict[str, dict[str, float]]:
    """Scores per task and prompt length, for the lengths that the model has positions for."""
    longest = model.config.max_position_embeddings
    scores: dict[str, dict[str, float]] = {}
    for name, (kind, keys, shortest) in TASKS.items():
        scores[name] = {
            str(length): score(model, kind, keys, length, max(1, int(share * samples)))
            for length, share in LENGTHS.items()
            if shortest <= length < longest
        }
        print(name, scores[name], flush=True)
    return scores


def write_evaluation(folder: Path, samples: int) -> None:
    """Evaluates the saved weights, in their saved dtype, and writes evaluation.json."""
    model = load_model(folder, "cuda" if torch.cuda.is_available() else "cpu")
    counts = {str(length): max(1, int(share * samples)) for length, share in LENGTHS.items()}
    report = {
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "seed": SEED,
        "samples": counts,
        "scores": evaluate(model, samples),
    }
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    write_evaluation(arguments.folder, arguments.samples)
