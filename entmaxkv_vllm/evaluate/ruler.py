"""Tasks after RULER (arXiv 2404.06654), made offline, in the form of `entmaxkv_vllm.retrieval`.

One and many keys, and tracked variables, are that module's own. Here are a key with several values,
a question about several keys, and words to count.
"""

import random
from collections.abc import Callable

from entmaxkv_vllm.retrieval import (
    Fact,
    NeedleTask,
    TrainingText,
    answered_text,
    code_fact,
    code_facts,
    distinct_words,
    document_with,
    needle_prompt,
    random_digits,
)

Questions = list[tuple[str, str]]
"""Questions and their answers."""

Document = tuple[Callable[[int], str], Questions]
"""What makes the document of a given length, and what can be asked about it."""

COUNTED = 3
"""Words that a question about counts asks for."""

COUNTABLE = 512
"""Characters of the shortest training document whose words are counted: in a shorter one chance
decides which are frequent."""


def multi_value(rng: random.Random, keys: int, values: int, held_out: bool) -> Document:
    """Facts that give each key several values; each question is about all values of one key."""
    facts, depths, questions = [], [], []
    for key in distinct_words(rng, keys, held_out):
        codes = [random_digits(rng) for _ in range(values)]
        facts += [code_fact(key, code) for code in codes]
        # Values come in the order of the answer.
        depths += sorted(rng.random() for _ in codes)
        questions.append((f"What are all the access codes for {key}?", f" {', '.join(codes)}."))
    return lambda tokens: document_with(rng, facts, tokens, depths, held_out), questions


def multi_query(rng: random.Random, keys: int, asked: int, held_out: bool) -> Document:
    """Facts about many keys, and questions about several of them at once."""
    facts = code_facts(rng, keys, held_out)
    names = {fact.value: fact.line.split()[4] for fact in facts}
    depths = [rng.random() for _ in facts]

    def question(chosen: list[Fact]) -> tuple[str, str]:
        pairs = ", ".join(f"{names[fact.value]} {fact.value}" for fact in chosen)
        listed = ", ".join(names[fact.value] for fact in chosen)
        return f"What are the access codes for {listed}?", f" {pairs}."

    questions = [question(rng.sample(facts, min(asked, keys))) for _ in range(max(1, keys // 4))]
    return lambda tokens: document_with(rng, facts, tokens, depths, held_out), questions


def common_words(rng: random.Random, held_out: bool) -> Document:
    """A list of words in which three are ten times as frequent as all others."""
    common = distinct_words(rng, COUNTED, held_out)
    rare = distinct_words(rng, 60, held_out)
    weights = [10.0] * COUNTED + [1.0] * len(rare)
    answer = f" {', '.join(sorted(common))}."
    return (
        lambda tokens: listed_words(rng, common + rare, weights, tokens),
        [(f"What are the {COUNTED} most common words, in alphabetical order?", answer)],
    )


def frequent_words(rng: random.Random, held_out: bool) -> Document:
    """A list of words, of which three are 32, 16 and 8 times as frequent as all others."""
    words = distinct_words(rng, 60, held_out)
    weights = [32.0, 16.0, 8.0] + [1.0] * (len(words) - COUNTED)
    answer = f" {', '.join(words[:COUNTED])}."
    return (
        lambda tokens: listed_words(rng, words, weights, tokens),
        [(f"What are the {COUNTED} most frequent words, the most frequent first?", answer)],
    )


def listed_words(rng: random.Random, words: list[str], weights: list[float], tokens: int) -> str:
    """A random list of words, separated by spaces, of exactly `tokens` characters."""
    text = " ".join(rng.choices(words, weights, k=tokens // 5))
    return text[:tokens]


TASKS: dict[str, Callable[[random.Random], Document] | tuple[str, int]] = {
    "single needle": ("codes", 1),
    "multi-key needles": ("codes", 16),
    "multi-value needles": lambda rng: multi_value(rng, 4, 4, True),
    "multi-query needles": lambda rng: multi_query(rng, 8, 4, True),
    "variable tracking": ("variables", 8),
    "common words": lambda rng: common_words(rng, True),
    "frequent words": lambda rng: frequent_words(rng, True),
}
"""The evaluation's tasks: kind and number of facts of `needle_prompt`, or a maker of documents."""


def ruler_task(rng: random.Random, name: str, characters: int) -> NeedleTask:
    """A held-out task whose prompt has so many characters.

    Raises KeyError if there is no such task, ValueError if its facts do not fit.
    """
    task = TASKS[name]
    if isinstance(task, tuple):
        return needle_prompt(rng, tokens=characters + 1, keys=task[1], kind=task[0])
    make, questions = task(rng)
    question, answer = questions[0]
    rest = NeedleTask("", question, answer, answer)
    return NeedleTask(make(characters - len(rest.prompt)), question, answer, answer)


def ruler_training_text(rng: random.Random, length: int) -> TrainingText:
    """A training document of exactly `length` characters about values, several keys or counts."""
    # Facts and questions are to leave room even in the shortest text.
    room = max(1, min(4, length // 400))
    kind = rng.choice(("values", "keys", "counts") if length >= COUNTABLE else ("values", "keys"))
    if kind == "values":
        make, questions = multi_value(rng, rng.randint(1, room), rng.randint(1, room), False)
    elif kind == "keys":
        make, questions = multi_query(rng, rng.randint(1, 2 * room), rng.randint(1, 4), False)
    else:
        make, questions = rng.choice((common_words, frequent_words))(rng, False)
    return answered_text(make, questions, length)
