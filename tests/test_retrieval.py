"""The retrieval tasks: their lengths, their split and their answers."""

import random
import subprocess
import sys
from itertools import pairwise

import pytest

from entmaxkv_vllm import retrieval
from entmaxkv_vllm.retrieval import FACTS, needle_prompt, training_text


@pytest.mark.parametrize("kind", FACTS)
@pytest.mark.parametrize("tokens", [512, 4096], ids=lambda n: f"{n}-tokens")
def test_prompt_has_the_length_asked_for_and_hides_the_fact_once(kind: str, tokens: int) -> None:
    task = needle_prompt(random.Random(1), tokens=tokens, keys=5, kind=kind)
    assert len(task.prompt.encode()) + 1 == tokens
    assert task.prompt.count(task.value) == 1
    assert task.is_correct(task.answer)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0], ids=["start", "middle", "end"])
def test_needle_stands_on_a_line_of_its_own_at_its_depth(depth: float) -> None:
    task = needle_prompt(random.Random(2), tokens=4096, depth=depth)
    line = task.answer.strip()
    assert line in task.document.splitlines()
    assert abs(task.document.index(line) / len(task.document) - depth) < 0.05


def test_same_seed_gives_the_same_task() -> None:
    first, second = (needle_prompt(random.Random(3), tokens=900, keys=4) for _ in range(2))
    assert first == second


def test_assignments_come_before_their_use() -> None:
    for seed in range(20):
        task = needle_prompt(random.Random(seed), tokens=2048, keys=6, kind="variables")
        chain = task.answer.strip(" .").split(" = ")
        lines = [f"let {name} = {source}" for name, source in pairwise(chain)]
        places = [task.document.index(line) for line in lines]
        assert places == sorted(places, reverse=True)


def test_held_out_and_training_keys_never_meet() -> None:
    rng = random.Random(4)
    held_out = set(retrieval.distinct_words(rng, 500, held_out=True))
    training = set(retrieval.distinct_words(rng, 500, held_out=False))
    assert all(map(retrieval.is_held_out, held_out))
    assert not any(map(retrieval.is_held_out, training))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" The access code for bolasirem is 48213.", True),
        ("48213", True),
        (" The access code for bolasirem is 482130.", False),
        (" The access code for bolasirem is 4821.", False),
        (" It is 99999.\n48213", False),
        ("", False),
    ],
    ids=["sentence", "value-alone", "longer-value", "shorter-value", "value-later", "nothing"],
)
def test_answer_is_right_only_with_the_whole_value(text: str, right: bool) -> None:
    fact = retrieval.code_fact("bolasirem", "48213")
    task = retrieval.NeedleTask("", fact.question, fact.answer, fact.value)
    assert task.is_correct(text) is right


@pytest.mark.parametrize("length", [256, 512, 8704], ids=lambda n: f"{n}-characters")
def test_training_text_fills_its_length_and_marks_its_answers(length: int) -> None:
    rng = random.Random(5)
    for _ in range(50):
        sample = training_text(rng, length)
        assert len(sample.text) == length
        assert sample.answers[-1][1] == length
        for start, stop in sample.answers:
            assert sample.text[:start].endswith("\nAnswer:")
            assert sample.text[stop - 1] == retrieval.END_OF_ANSWER


def test_facts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        needle_prompt(random.Random(6), tokens=256, keys=8)


def test_a_haystack_longer_than_the_sources_is_refused() -> None:
    with pytest.raises(ValueError, match="is asked for"):
        needle_prompt(random.Random(7), tokens=10**9)


def test_tasks_need_no_torch_and_no_vllm() -> None:
    heavy = "{'torch', 'vllm', 'numpy'}"
    source = f"import sys, entmaxkv_vllm.retrieval; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", source], check=True)
