"""Batches of training documents as byte tokens with a weight for each target."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from byte_tokenizer import BOS, EOS

from entmaxkv_vllm.evaluate.ruler import ruler_training_text
from entmaxkv_vllm.retrieval import END_OF_ANSWER, TrainingText, training_text

T = TypeVar("T")

ANSWER_WEIGHT = 8.0
# Prompts usually start with <bos>, but a model that needs it fails where a caller leaves it out.
SHARE_WITHOUT_BOS = 0.15


def repeated_text(rng: random.Random, length: int) -> TrainingText:
    """Random bytes repeated to `length`: nothing but induction predicts the repetitions."""
    period = rng.randint(8, length // 2)
    symbols = rng.choice((range(97, 123), range(32, 127), range(1, 256)))
    unit = "".join(map(chr, rng.choices(symbols, k=period)))
    return TrainingText((unit * (length // period + 1))[:length], [])


def training_batch(
    rng: random.Random, rows: int, length: int, repeated_share: float, ruler_share: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, length + 1] int64 and the weights [rows, length] float32 of the targets.

    Of the documents, `repeated_share` repeat random bytes and, of the others, `ruler_share` ask
    what only RULER's tasks ask.
    """
    tokens = np.full((rows, length + 1), BOS, dtype=np.int64)
    weights = np.ones((rows, length), dtype=np.float32)
    end = ord(END_OF_ANSWER)
    for row in range(rows):
        first = 0 if rng.random() < SHARE_WITHOUT_BOS else 1
        make = repeated_text if rng.random() < repeated_share else training_text
        if make is training_text and ruler_share and rng.random() < ruler_share:
            make = ruler_training_text
        sample = make(rng, length + 1 - first)
        codes = np.frombuffer(sample.text.encode("latin-1"), dtype=np.uint8)
        tokens[row, first:] = codes
        tokens[row, tokens[row] == end] = EOS
        for start, stop in sample.answers:
            weights[row, start + first - 1 : stop + first - 1] = ANSWER_WEIGHT
    return tokens, weights


def prefetched(make: Callable[[], T], depth: int = 8) -> Iterator[T]:
    """Endless results of `make`, computed in order in a thread, up to `depth` ahead."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        ahead = deque(executor.submit(make) for _ in range(depth))
        while True:
            yield ahead.popleft().result()
            ahead.append(executor.submit(make))
