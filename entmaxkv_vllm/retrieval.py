"""Retrieval tasks hidden in real text, for training, evaluating and showing the demo model.

A task is a document, which is Python standard-library source with facts on lines of their own, one
question about a fact, and the only right answer. Documents are ASCII, so with the demo model's
byte-level tokenizer a prompt has one token per character and one for the beginning of sequence.
Everything is drawn from the caller's `random.Random`, and keys and source files are split in two
by a hash, so held-out tasks share neither a key nor a haystack with training.
"""

import importlib.util
import random
import string
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CONSONANTS = "bdfghjklmnprstvz"
VOWELS = "aeiou"
HELD_OUT_SHARE = 8
SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "site-packages",
    "test",
    "tests",
}
LARGEST_SOURCE_FILE = 256 * 1024

TEXT_FOLDERS = [Path(sysconfig.get_paths()["stdlib"])]
"""Folders whose source files are the haystack; to be added to before the first is drawn from."""


def add_packages(names: Iterable[str]) -> None:
    """Let the sources of installed packages be text, besides the standard library's.

    Raises ValueError for one that is not installed.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise ValueError(f"--packages: {name} is not installed; leave it out or install it")
        TEXT_FOLDERS.append(Path(found.origin).parent)


@dataclass(frozen=True)
class Fact:
    """A line to hide in a document, a question about it, and the answer with its value."""

    line: str
    question: str
    answer: str
    value: str


@dataclass(frozen=True)
class NeedleTask:
    """One question after one document; `answer` starts with the space that follows "Answer:"."""

    document: str
    question: str
    answer: str
    value: str

    @property
    def message(self) -> str:
        """The user's turn of a chat; the chat template adds the rest of the prompt."""
        return f"{self.document}{question_text(self.question)}"

    @property
    def prompt(self) -> str:
        """The text to complete, without the beginning-of-sequence token."""
        return f"{self.message}\nAnswer:"

    def is_correct(self, text: str) -> bool:
        """Whether a completion gives the value, and nothing longer, in its first line."""
        words = text.strip().partition("\n")[0].removesuffix(".").split()
        return bool(words) and words[-1] == self.value


def question_text(question: str) -> str:
    return f"\n\nQuestion: {question}"


def is_held_out(name: str) -> bool:
    """Whether a key or a source file's relative path belongs to the held-out part."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


@cache
def haystack(held_out: bool) -> str:
    """The ASCII source files of TEXT_FOLDERS of one part, joined in a fixed shuffled order."""
    texts = []
    for root in TEXT_FOLDERS:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIPPED_DIRECTORIES.intersection(relative.parts):
                continue
            in_part = is_held_out(relative.as_posix()) is held_out
            if in_part and path.stat().st_size <= LARGEST_SOURCE_FILE:
                source = path.read_bytes()
                if source.isascii():
                    texts.append(source.decode().replace("\r\n", "\n"))
    random.Random(0).shuffle(texts)
    return "\n".join(texts)


def random_word(rng: random.Random, held_out: bool, syllables: int | None = None) -> str:
    """A pronounceable word of the training or the held-out part."""
    while True:
        count = syllables or rng.choice((3, 3, 4, 4, 5))
        word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(count))
        if is_held_out(word) is held_out:
            return word


def distinct_words(rng: random.Random, count: int, held_out: bool) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[random_word(rng, held_out)] = None
    return list(words)


def similar_words(rng: random.Random, count: int, held_out: bool) -> list[str]:
    """Words of four syllables that differ from a common word in one syllable each."""
    base = random_word(rng, held_out, syllables=4)
    words = {base: None}
    while len(words) < count:
        place = 2 * rng.randrange(4)
        word = base[:place] + rng.choice(CONSONANTS) + rng.choice(VOWELS) + base[place + 2 :]
        if is_held_out(word) is held_out:
            words[word] = None
    return list(words)


def random_digits(rng: random.Random) -> str:
    return "".join(rng.choices(string.digits, k=5))


def code_fact(key: str, code: str) -> Fact:
    statement = f"The access code for {key} is {code}."
    return Fact(statement, f"What is the access code for {key}?", f" {statement}", code)


def code_facts(rng: random.Random, count: int, held_out: bool) -> list[Fact]:
    return [code_fact(key, random_digits(rng)) for key in distinct_words(rng, count, held_out)]


def similar_code_facts(rng: random.Random, count: int, held_out: bool) -> list[Fact]:
    return [code_fact(key, random_digits(rng)) for key in similar_words(rng, count, held_out)]


def association_facts(rng: random.Random, count: int, held_out: bool) -> list[Fact]:
    """Pairs of words: associative recall."""
    words = distinct_words(rng, 2 * count, held_out)
    return [
        Fact(
            f"{key} maps to {value}.", f"What does {key} map to?", f" {key} maps to {value}.", value
        )
        for key, value in zip(words[::2], words[1::2], strict=True)
    ]


def variable_facts(rng: random.Random, count: int, held_out: bool) -> list[Fact]:
    """A chain of assignments, then unrelated ones; the first fact asks for the chain's end.

    Each answer spells the chain out, and the facts are in an order in which each right-hand side
    is assigned before it is used.
    """
    names = distinct_words(rng, count, held_out)
    chain = names[: min(count, rng.randint(2, 4))]
    value = random_digits(rng)
    lines = [f"let {name} = {source}" for name, source in zip(chain, [value, *chain], strict=False)]
    facts = []
    for last in reversed(range(len(chain))):
        name = chain[last]
        answer = " " + " = ".join([*chain[last::-1], value]) + "."
        facts.append(Fact(lines[last], f"What is the value of {name}?", answer, value))
    for name in names[len(chain) :]:
        other = random_digits(rng)
        facts.append(
            Fact(
                f"let {name} = {other}",
                f"What is the value of {name}?",
                f" {name} = {other}.",
                other,
            )
        )
    return facts


def copying_facts(rng: random.Random, count: int, held_out: bool) -> list[Fact]:
    """Named random strings of 24 letters and digits, to be copied out."""
    facts = []
    for key in distinct_words(rng, count, held_out):
        value = "".join(rng.choices(string.ascii_letters + string.digits, k=24))
        statement = f"The string {key} reads {value}."
        facts.append(Fact(statement, f"How does the string {key} read?", f" {statement}", value))
    return facts


FACTS: dict[str, Callable[[random.Random, int, bool], list[Fact]]] = {
    "codes": code_facts,
    "similar codes": similar_code_facts,
    "associations": association_facts,
    "variables": variable_facts,
    "copying": copying_facts,
}


def hide_lines(text: str, lines: list[str], depths: list[float]) -> str:
    """Puts each line at the line boundary at or after its depth, a share of the text's length."""
    starts = []
    for depth in depths:
        newline = text.find("\n", int(depth * len(text)))
        starts.append(len(text) if newline < 0 else newline + 1)
    pieces, position = [], 0
    for index in sorted(range(len(lines)), key=lambda i: (starts[i], depths[i])):
        start = starts[index]
        pieces.append(text[position:start])
        if start == len(text) and not text.endswith("\n"):
            pieces.append(f"\n{lines[index]}")
        else:
            pieces.append(f"{lines[index]}\n")
        position = start
    pieces.append(text[position:])
    return "".join(pieces)


def haystack_window(rng: random.Random, length: int, held_out: bool) -> str:
    text = haystack(held_out)
    if length > len(text):
        raise ValueError(f"a haystack of {length} tokens is asked for, {len(text)} are there")
    start = rng.randrange(len(text) - length + 1)
    return text[start : start + length]


def document_with(
    rng: random.Random,
    facts: list[Fact],
    tokens: int,
    depths: list[float],
    held_out: bool,
) -> str:
    """A haystack window with the facts at their depths, of exactly `tokens` characters."""
    filler = tokens - sum(len(fact.line) + 1 for fact in facts)
    if filler < 0:
        raise ValueError(f"{len(facts)} facts do not fit into {tokens} tokens")
    window = haystack_window(rng, filler, held_out)
    return hide_lines(window, [fact.line for fact in facts], depths)


def needle_prompt(
    rng: random.Random,
    *,
    tokens: int,
    keys: int = 1,
    depth: float | None = None,
    held_out: bool = True,
    kind: str = "codes",
) -> NeedleTask:
    """A document with `keys` facts and a question about one of them.

    Args:
        rng: the source of every random choice.
        tokens: length of the prompt in tokens, the beginning-of-sequence token included.
        keys: number of facts in the document.
        depth: place of the fact asked for, 0 (start) to 1 (end); uniformly random if None. The
            other facts are always at random depths. Kind "variables" keeps its assignments in
            order and ignores it.
        held_out: draw the keys and the haystack from the part that training never sees.
        kind: one of FACTS.

    Raises:
        ValueError: if the facts do not fit, or the haystack is too short.
        KeyError: if there is no such kind.
    """
    facts = FACTS[kind](rng, keys, held_out)
    asked = facts[0]
    depths = fact_depths(rng, facts)
    if depth is not None and kind != "variables":
        depths[0] = depth
    rest = NeedleTask("", asked.question, asked.answer, asked.value)
    document = document_with(rng, facts, tokens - 1 - len(rest.prompt), depths, held_out)
    return NeedleTask(document, asked.question, asked.answer, asked.value)


def fact_depths(rng: random.Random, facts: list[Fact]) -> list[float]:
    """Uniformly random depths; assignments that use one another stay in order of use."""
    depths = [rng.random() for _ in facts]
    chain = [i for i, fact in enumerate(facts) if fact.value == facts[0].value]
    ordered = sorted((depths[i] for i in chain), reverse=True)
    for i, depth in zip(chain, ordered, strict=True):
        depths[i] = depth
    return depths


@dataclass(frozen=True)
class TrainingText:
    """A document followed by questions, and the half-open character ranges of the answers."""

    text: str
    answers: list[tuple[int, int]]


END_OF_ANSWER = "\x00"


def training_text(rng: random.Random, length: int) -> TrainingText:
    """A training document of exactly `length` characters with several answered questions.

    END_OF_ANSWER stands for the end-of-sequence token after each answer.
    """
    kind = rng.choice(list(FACTS))
    facts = FACTS[kind](rng, rng.randint(1, max(1, min(16, length // 96))), False)
    asked = rng.sample(facts, min(len(facts), rng.randint(1, max(1, min(12, length // 256)))))
    return answered_text(
        lambda room: document_with(rng, facts, room, fact_depths(rng, facts), False),
        [(fact.question, fact.answer) for fact in asked],
        length,
    )


def answered_text(
    make: Callable[[int], str], questions: list[tuple[str, str]], length: int
) -> TrainingText:
    """A document followed by questions and their answers, `length` characters in all.

    make: gives a document of exactly so many characters.
    """
    tails = [f"{question_text(question)}\nAnswer:" for question, _ in questions]
    answers = [f"{answer}{END_OF_ANSWER}" for _, answer in questions]
    pieces = [make(length - sum(map(len, tails)) - sum(map(len, answers)))]
    position, ranges = len(pieces[0]), []
    for tail, answer in zip(tails, answers, strict=True):
        start = position + len(tail)
        position = start + len(answer)
        ranges.append((start, position))
        pieces += [tail, answer]
    return TrainingText("".join(pieces), ranges)


def evaluation_tasks(
    kind: str, keys: int, tokens: int, count: int, seed: int
) -> Iterator[NeedleTask]:
    """`count` held-out tasks of one kind and length, the same for the same seed."""
    rng = random.Random(f"{seed} {kind} {keys} {tokens}")
    for _ in range(count):
        yield needle_prompt(rng, tokens=tokens, keys=keys, kind=kind)
