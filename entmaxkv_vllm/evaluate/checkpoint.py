"""A checkpoint of transformers, its tokenizer and its alpha, and held-out text in its tokens."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import entmaxkv_vllm.nape_transformers  # noqa: F401, its model is one that transformers loads
from entmaxkv_vllm.config import resolve
from entmaxkv_vllm.evaluate.errors import EvaluationError
from entmaxkv_vllm.evaluate.ruler import ruler_task
from entmaxkv_vllm.retrieval import haystack

SPARE = 1.3
"""How many more characters are taken than a window needs on average, to fill it."""
SAMPLE = 20_000
"""Characters that say how many a token has."""


@dataclass
class Task:
    """prompt: tokens to prefill, all of the same number. answer: tokens that are right."""

    prompt: list[int]
    answer: list[int]


@dataclass
class Checkpoint:
    """What is evaluated: a model, its tokenizer and the alpha of its query heads."""

    model: PreTrainedModel
    tokenizer: Any
    alpha: float | tuple[float, ...]

    def encode(self, text: str) -> list[int]:
        """Its tokens, without any at the beginning or end of a sequence."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return tokens

    @cached_property
    def begin(self) -> list[int]:
        token = self.tokenizer.bos_token_id
        return [] if token is None else [token]

    @cached_property
    def end(self) -> list[int]:
        token = self.tokenizer.eos_token_id
        return [] if token is None else [token]

    @cached_property
    def characters_per_token(self) -> float:
        sample = haystack(True)[:SAMPLE]
        return len(sample) / len(self.encode(sample))

    def windows(self, count: int, length: int) -> Tensor:
        """Windows [count, length] of held-out text, evenly spread, each begun as a sequence.

        Raises EvaluationError if the text is shorter than one.
        """
        text = haystack(True)
        reach = math.ceil(length * self.characters_per_token * SPARE)
        rows = []
        for index in range(count):
            start = max(0, len(text) - reach) * index // count
            row = [*self.begin, *self.encode(text[start : start + reach])][:length]
            if len(row) < length:
                raise EvaluationError(
                    f"a context of {length} tokens is longer than the held-out text of "
                    f"{len(text)} characters; give a shorter one, or more text by --packages"
                )
            rows.append(row)
        return torch.tensor(rows)

    def tasks(self, name: str, context: int, count: int, seed: int) -> list[Task]:
        """`count` held-out tasks of ruler.py, the same for one seed, each of whose prompts has
        `context` tokens: where its own are fewer, other text precedes it.

        Raises EvaluationError if the facts or the text do not fit.
        """
        rng = random.Random(f"{seed} {name} {context}")
        try:
            return [self._task(rng, name, context) for _ in range(count)]
        except ValueError as error:
            raise EvaluationError(f"task {name!r} in a context of {context}: {error}") from error

    def _task(self, rng: random.Random, name: str, context: int) -> Task:
        characters = int((context - len(self.begin)) * self.characters_per_token)
        while True:
            task = ruler_task(rng, name, characters)
            tokens = self.encode(task.prompt)
            room = context - len(self.begin) - len(tokens)
            if room >= 0:
                break
            characters += math.floor(room * self.characters_per_token)
        before = self.encode(haystack(True)[: math.ceil(room * self.characters_per_token * SPARE)])
        answer = [*self.encode(task.answer), *self.end]
        return Task([*self.begin, *before[:room], *tokens], answer)


def alpha_of(folder: Path, given: float | None, longest: int) -> float | tuple[float, ...]:
    """alpha of the query heads of a checkpoint, whose weights are not read.

    given: in place of what config.json says.
    longest: tokens of the longest sequence it is to take.

    Raises EvaluationError for what is no checkpoint or too short for that, ConfigurationError for
    an alpha that cannot be computed.
    """
    config = _read(AutoConfig.from_pretrained, folder)
    if longest > config.max_position_embeddings:
        raise EvaluationError(
            f"the longest context takes {longest} positions, the model has "
            f"{config.max_position_embeddings}; give shorter --contexts"
        )
    return resolve(
        config.to_dict(),
        additional={} if given is None else {"entmaxkv": {"alpha": given}},
        num_query_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
    ).alpha


def load(folder: Path, alpha: float | tuple[float, ...]) -> Checkpoint:
    """The checkpoint on a GPU in the dtype of its weights, or on the CPU in float32.

    Raises EvaluationError for what is no checkpoint.
    """
    on_gpu = torch.cuda.is_available()
    tokenizer = _read(AutoTokenizer.from_pretrained, folder)
    model = _read(
        AutoModelForCausalLM.from_pretrained,
        folder,
        attn_implementation="eager",
        dtype="auto" if on_gpu else torch.float32,
    )
    return Checkpoint(model.to("cuda" if on_gpu else "cpu"), tokenizer, alpha)


def _read(read: Callable[..., Any], folder: Path, **options: Any) -> Any:
    try:
        return read(folder, **options)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"model {str(folder)!r} cannot be loaded: {error}; give a folder with config.json, "
            "weights and a tokenizer"
        ) from error
