"""The programs that train twins, make RULER's tasks and measure fidelity, on tiny models."""

import importlib
import json
import random
import sys

import evaluate_fidelity
import paged_model
import pytest
import ruler
import study_selectors
import torch
import train
from llama import new_model, save_model
from paged_model import PagedModel, parse_selector
from training_data import training_batch

from entmaxkv_kernels import Adaptive, Exact, Gaussian, TopK

SHAPE = {"layers": 2, "hidden": 32, "intermediate": 32, "heads": 4, "key_heads": 2, "longest": 700}


def small_model(alpha):
    torch.manual_seed(1)
    model = new_model(alpha=alpha, **SHAPE)
    # Larger queries, so that entmax has zeros.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 12
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    save_model(small_model(1.5), path)
    return path


@pytest.mark.parametrize("name", ruler.TASKS)
@pytest.mark.parametrize("tokens", [2048, 5001])
def test_a_task_has_the_length_asked_for_and_its_answer_in_its_text(name, tokens):
    for task in ruler.ruler_tasks(name, tokens, 3, seed=5):
        assert len(task.prompt.encode()) + 1 == tokens
        for word in task.answer.replace(",", " ").replace("=", " ").rstrip(".").split():
            assert word in task.document or word in task.question


@pytest.mark.parametrize("name", ["common words", "frequent words"])
def test_the_words_asked_for_are_the_most_frequent_ones(name):
    for task in ruler.ruler_tasks(name, 4096, 5, seed=6):
        counts: dict[str, int] = {}
        for word in task.document.split():
            counts[word] = counts.get(word, 0) + 1
        most = sorted(counts, key=lambda word: -counts[word])[: ruler.COUNTED]
        asked = task.answer.strip(" .").split(", ")
        assert (most if name == "frequent words" else sorted(most)) == asked


def test_all_values_of_a_key_are_the_answer_in_their_order():
    for task in ruler.ruler_tasks("multi-value needles", 3000, 5, seed=7):
        key = task.question.rstrip("?").split()[-1]
        marked = f"The access code for {key} is "
        values = [part[:5] for part in task.document.split(marked)[1:]]
        assert f" {', '.join(values)}." == task.answer
        assert len(values) == 4


@pytest.mark.parametrize("length", [255, 256, 511, 512, 1025, 2048, 8704])
def test_training_texts_fit_whatever_is_drawn(length):
    rng = random.Random(length)
    for _ in range(300):
        sample = ruler.ruler_training_text(rng, length)
        assert len(sample.text) == length
        assert sample.answers
        assert all(sample.text[stop - 1] == "\x00" for _, stop in sample.answers)


def test_batches_hold_every_kind_of_text():
    tokens, weights = training_batch(random.Random(3), 9, 512, 0.3, 0.5)
    assert tokens.shape == (9, 513) and weights.shape == (9, 512)
    assert tokens.min() >= 0 and tokens.max() < 259


@torch.inference_mode()
@pytest.mark.parametrize("alpha, selectors", [(1.5, ["exact", "topk:4096"]), (1.0, ["exact"])])
def test_decoding_from_pages_predicts_what_the_whole_sequence_does(monkeypatch, alpha, selectors):
    monkeypatch.setattr(paged_model, "PREFILL_TOKENS", 130)  # two rows of 61 tokens at once
    model = small_model(alpha).float()
    tokens = torch.randint(0, 256, (3, 61), generator=torch.Generator().manual_seed(2))
    paged = PagedModel(small_model(alpha).float(), 3, 80)
    hidden = paged.prefill(tokens[:, :50])
    whole = paged.prefill(tokens)
    torch.testing.assert_close(whole[:, :50], hidden)
    expected = model.lm_head(whole)
    paged.prefill(tokens[:, :50])
    for name in selectors:
        for position in range(50, 61):
            logits = paged.decode(tokens[:, position], position, parse_selector(name))
            torch.testing.assert_close(logits, expected[:, position], atol=2e-5, rtol=1e-4)
    if alpha == 1.0:
        dense = model(input_ids=tokens).logits
        torch.testing.assert_close(expected, dense, atol=2e-5, rtol=1e-4)


def test_selectors_have_names():
    assert parse_selector("exact") == Exact()
    assert parse_selector("gaussian") == Gaussian()
    assert parse_selector("gaussian-paper") == Gaussian(shared_spread=True)
    assert parse_selector("topk:96") == TopK(96)
    assert parse_selector("adaptive:1.5") == Adaptive(reach=1.5)
    with pytest.raises(ValueError, match="selector is 'topk'; expected exact"):
        parse_selector("topk")


def test_the_reference_gathers_as_much_as_it_is_told_to_and_no_longer():
    module = importlib.import_module("entmaxkv_kernels.reference.decode")
    before = module.CHUNK_ELEMENTS
    with evaluate_fidelity.chunks_of(4096):
        assert module.CHUNK_ELEMENTS == 4096
    assert before == module.CHUNK_ELEMENTS


def evaluate(monkeypatch, folder, out, *options):
    arguments = ["evaluate", str(folder), "--out", str(out), "--batch", "2", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    evaluate_fidelity.main()
    return json.loads(out.read_text())


def test_an_evaluation_has_every_part_and_its_bounds_hold(monkeypatch, folder, tmp_path):
    sizes = ["--contexts", "1400", "--steps", "3", "--sequences", "2", "--positions", "12"]
    selectors = ["--selectors", "topk:64", "gaussian", "adaptive:0.5"]
    parts = ["--parts", "perplexity", "attention", "--inputs", str(tmp_path)]
    result = evaluate(monkeypatch, folder, tmp_path / "out.json", *sizes, *selectors, *parts)
    assert len(result["perplexity"]) == 3
    rows = {(row["selector"], row["layer"]): row for row in result["attention"]}
    assert len(rows) == 3 * 2
    for (name, _), row in rows.items():
        assert row["dropped_mass"]["worst"] <= 1
        assert row["dropped_mass"]["mean"] <= row["dropped_mass"]["p99"]
        assert row["output_error"]["worst"] >= row["output_error"]["p50"]
        assert row["support_recall"]["worst"] <= row["support_recall"]["p50"]
        assert row["served_error"]["mean"] == pytest.approx(row["output_error"]["mean"], abs=0.05)
        assert len(row["dropped_mass"]["by_head"]) == 4
        if name != "gaussian":
            assert row["least_slack_of_bound"] >= -1e-5
    assert rows["topk:64", 0]["dropped_mass"]["mean"] > 0.01
    saved = torch.load(tmp_path / "inputs-1400-1.pt")
    assert saved["keys"].shape[:2] == (2, 2) and saved["queries"].shape[:2] == (2, 12)
    recorded = list(study_selectors.study_recorded(tmp_path / "inputs-1400-1.pt", 6))
    assert {row["layer"] for row in recorded} == {0, 1, "all"}


def test_a_task_is_solved_by_who_answers_it(monkeypatch, folder, tmp_path):
    answers = {}

    def decode(self, tokens, position, selector):
        logits = torch.zeros(len(tokens), 259)
        for row, answer in enumerate(answers["rows"]):
            at = position - answers["first"]
            right = answer[at] if at < len(answer) else 0
            wrong = row == 1 and isinstance(selector, TopK) and at == 2
            logits[row, (right + wrong) % 259] = 1
        return logits

    def ruler_tasks(name, tokens, count, seed):
        tasks = ruler.ruler_tasks(name, tokens, count, seed)
        rows = [[*task.answer.encode(), evaluate_fidelity.EOS] for task in tasks]
        answers.update(rows=rows, first=tokens - 1)
        return tasks

    monkeypatch.setattr(PagedModel, "decode", decode)
    monkeypatch.setattr(evaluate_fidelity, "ruler_tasks", ruler_tasks)
    options = ["--contexts", "1024", "--parts", "tasks", "--selectors", "exact", "topk:32"]
    result = evaluate(monkeypatch, folder, tmp_path / "tasks.json", *options)
    assert {row["task"] for row in result["tasks"]} == set(ruler.TASKS)
    for row in result["tasks"]:
        assert row["solved"] == [True, row["selector"] == "exact"]


def test_twins_start_alike_and_are_saved_even_if_training_fails(monkeypatch, tmp_path):
    names = ("layers", "hidden", "intermediate", "heads", "key-heads", "longest")
    shape = [x for name in names for x in (f"--{name}", str(SHAPE[name.replace("-", "_")]))]
    options = ["--out", str(tmp_path), "--steps", "2", "--alpha", "1.0", "1.5", *shape]
    monkeypatch.setattr(sys, "argv", ["train", *options])
    arguments = train.parse_arguments()
    first, second = train.new_trainees(arguments)
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert ours.equal(theirs)
    monkeypatch.setattr(train, "warm_up", lambda *_: None)

    def fail(*_):
        raise KeyError("no batch")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(KeyError):
        train.main()
    assert (tmp_path / "alpha-1" / "model.safetensors").exists()
    assert (tmp_path / "alpha-1.5" / "training.json").exists()


@pytest.mark.parametrize("kind", study_selectors.KINDS)
def test_a_needle_takes_most_of_its_heads_weight(kind):
    head = study_selectors.synthetic(kind, 2048, True, seed=1)
    weights = study_selectors.solve_entmax(head.query @ head.key.mT, 1.5)[0]
    assert weights[0].max() > 0.4
    plain = study_selectors.synthetic(kind, 2048, False, seed=1)
    support = (study_selectors.solve_entmax(plain.query @ plain.key.mT, 1.5)[0] > 0).sum(1)
    assert (support.double() / 2048 - study_selectors.SUPPORTS[1]).abs().max() < 2e-3
