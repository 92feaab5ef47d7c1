"""Training twins, making RULER's tasks and measuring fidelity, on tiny models."""

import importlib
import json
import random
import re
import shutil
import sys

import pytest
import study_selectors
import torch
import train
from llama import new_model, save_model
from training_data import training_batch

from entmaxkv_kernels import Adaptive, Exact, Gaussian, TopK
from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.cli import main
from entmaxkv_vllm.evaluate import paged_model, ruler
from entmaxkv_vllm.evaluate.checkpoint import load
from entmaxkv_vllm.evaluate.command import chunks_of
from entmaxkv_vllm.evaluate.paged_model import PagedModel, Predictions
from entmaxkv_vllm.evaluate.selectors import parse_selector

SHAPE = {"layers": 2, "hidden": 32, "intermediate": 32, "heads": 4, "key_heads": 2, "longest": 1300}


def small_model(alpha, positions="rotary"):
    torch.manual_seed(1)
    model = new_model(alpha=alpha, positions=positions, **SHAPE)
    # Larger queries, so that entmax has zeros.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 12
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    save_model(small_model(1.5), path)
    return path


def ruler_tasks(name, characters, count, seed):
    rng = random.Random(seed)
    return [ruler.ruler_task(rng, name, characters) for _ in range(count)]


@pytest.mark.parametrize("name", ruler.TASKS)
@pytest.mark.parametrize("characters", [2048, 5001])
def test_a_task_has_the_length_asked_for_and_its_answer_in_its_text(name, characters):
    for task in ruler_tasks(name, characters, 3, seed=5):
        assert len(task.prompt.encode()) == characters
        for word in task.answer.replace(",", " ").replace("=", " ").rstrip(".").split():
            assert word in task.document or word in task.question


@pytest.mark.parametrize("name", ["common words", "frequent words"])
def test_the_words_asked_for_are_the_most_frequent_ones(name):
    for task in ruler_tasks(name, 4096, 5, seed=6):
        counts: dict[str, int] = {}
        for word in task.document.split():
            counts[word] = counts.get(word, 0) + 1
        most = sorted(counts, key=lambda word: -counts[word])[: ruler.COUNTED]
        asked = task.answer.strip(" .").split(", ")
        assert (most if name == "frequent words" else sorted(most)) == asked


def test_all_values_of_a_key_are_the_answer_in_their_order():
    for task in ruler_tasks("multi-value needles", 3000, 5, seed=7):
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


def paged(alpha, batch, longest):
    return PagedModel(small_model(alpha).float(), alpha, batch, longest)


@pytest.mark.parametrize(
    "name",
    [
        "exact",
        "topk:32",
        "gaussian:quantile=1e-9,narrow_quantile=1e-9,narrow_safety=0",
        "adaptive:0.05,guard=0,first_pages=2",
    ],
)
def test_tokens_predicted_at_once_are_those_of_decoding_one_by_one(monkeypatch, name):
    monkeypatch.setattr(paged_model, "DECODE_STEPS", 7)
    monkeypatch.setattr(paged_model, "PREFILL_TOKENS", 130)  # two rows of 50 tokens at once
    tokens = torch.randint(0, 256, (3, 221), generator=torch.Generator().manual_seed(2))
    selector, model = parse_selector(name), paged(1.5, 3, 230)
    model.prefill(tokens[:, :200])
    at_once = model.predict(tokens[:, 200:], 200, selector)
    assert (at_once.pages_read < 1) is (name != "exact")
    model.prefill(tokens[:, :200])
    for position in range(200, 221):
        one = model.predict(tokens[:, position, None], position, selector).logits
        torch.testing.assert_close(one[:, 0], at_once.logits[:, position - 200])


@torch.inference_mode()
def test_exact_predictions_are_those_of_the_model_and_of_any_prefill():
    tokens = torch.randint(0, 256, (2, 61), generator=torch.Generator().manual_seed(3))
    softmax = paged(1.0, 2, 80)
    softmax.prefill(tokens[:, :40])
    dense = small_model(1.0).float()(input_ids=tokens).logits
    predicted = softmax.predict(tokens[:, 40:], 40, Exact()).logits
    torch.testing.assert_close(predicted, dense[:, 40:], atol=2e-5, rtol=1e-4)
    entmax = paged(1.5, 2, 80)
    entmax.prefill(tokens[:, :50])
    predicted = entmax.predict(tokens[:, 50:], 50, Exact()).logits
    entmax.prefill(tokens[:, :20])
    earlier = entmax.predict(tokens[:, 20:], 20, Exact()).logits
    torch.testing.assert_close(predicted, earlier[:, 30:], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_exact_predictions_with_slopes_and_scaled_queries_are_those_of_the_model():
    tokens = torch.randint(0, 256, (2, 61), generator=torch.Generator().manual_seed(4))
    model = small_model(1.5, "nape")
    dense = model(input_ids=tokens).logits
    nape = PagedModel(model, 1.5, 2, 80)
    nape.prefill(tokens[:, :40])
    predicted = nape.predict(tokens[:, 40:], 40, Exact()).logits
    torch.testing.assert_close(predicted, dense[:, 40:], atol=2e-5, rtol=1e-4)


def test_selectors_have_names_and_settings():
    assert parse_selector("exact") == Exact()
    assert parse_selector("gaussian") == Gaussian()
    assert parse_selector("gaussian-paper") == Gaussian(shared_spread=True)
    assert parse_selector("gaussian:quantile=0.9,safety=0") == Gaussian(quantile=0.9, safety=0)
    assert parse_selector("topk:96") == TopK(96)
    assert parse_selector("adaptive:1.5") == Adaptive(reach=1.5)
    assert parse_selector("adaptive:1.5,guard=0") == Adaptive(reach=1.5, guard=0)


@pytest.mark.parametrize(
    "name", ["topk", "best:3", "exact:1", "adaptive:-1", "topk:many", "gaussian:reach=2"]
)
def test_a_selector_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match=f"selector is '{name}'.*; expected exact, "):
        parse_selector(name)


def test_the_reference_gathers_as_much_as_it_is_told_to_and_no_longer():
    module = importlib.import_module("entmaxkv_kernels.reference.decode")
    before = module.CHUNK_ELEMENTS
    with chunks_of(4096):
        assert module.CHUNK_ELEMENTS == 4096
    assert before == module.CHUNK_ELEMENTS


def evaluate(folder, out, *options):
    assert main(["evaluate", str(folder), "--out", str(out), "--batch", "2", *options]) == 0
    return json.loads(out.read_text())


def test_an_evaluation_has_every_part_and_its_bounds_hold(folder, tmp_path):
    sizes = ["--contexts", "690", "--steps", "3", "--sequences", "2", "--positions", "12"]
    selectors = ["--selectors", "topk:64", "gaussian", "adaptive:0.5"]
    parts = ["--parts", "perplexity", "attention", "--inputs", str(tmp_path)]
    result = evaluate(folder, tmp_path / "out.json", *sizes, *selectors, *parts)
    assert len(result["perplexity"]) == 3
    rows = {(row["selector"], row["layer"]): row for row in result["attention"]}
    assert len(rows) == 3 * 2
    for (name, _), row in rows.items():
        assert row["dropped_mass"]["worst"] <= 1
        assert row["dropped_mass"]["mean"] <= row["dropped_mass"]["p99"]
        assert row["output_error"]["worst"] >= row["output_error"]["p50"]
        assert row["support_recall"]["worst"] <= row["support_recall"]["p50"]
        assert row["served_error"]["mean"] == pytest.approx(row["output_error"]["mean"], abs=0.05)
        by_head = row["dropped_mass"]["by_head"]
        assert [len(by_head[key]) for key in ("mean", "p99", "worst")] == [4, 4, 4]
        assert max(by_head["worst"]) == row["dropped_mass"]["worst"]
        if name != "gaussian":
            assert row["least_slack_of_bound"] >= -1e-5
    assert rows["topk:64", 0]["dropped_mass"]["mean"] > 0.01
    saved = torch.load(tmp_path / "inputs-690-1.pt")
    assert saved["keys"].shape[:2] == (2, 2) and saved["queries"].shape[:2] == (2, 12)
    compared = study_selectors.selectors_for
    recorded = list(study_selectors.study_recorded(tmp_path / "inputs-690-1.pt", 6, compared))
    assert {row["layer"] for row in recorded} == {0, 1, "all"}


def test_a_task_is_solved_by_who_answers_it(monkeypatch, folder, tmp_path):
    checkpoint = load(folder, 1.5)

    def predict(self, tokens, first, selector):
        """Right, but for one token of the second task under topk."""
        logits = torch.zeros(*tokens.shape, 259)
        known = torch.cat((tokens[:, 1:], torch.full((2, 1), checkpoint.end[0])), 1)
        known[1, 2] += isinstance(selector, TopK)
        return Predictions(logits.scatter(2, known[..., None], 1.0), 0.5)

    monkeypatch.setattr(PagedModel, "predict", predict)
    options = ["--contexts", "1030", "--parts", "tasks", "--selectors", "exact", "topk:32"]
    result = evaluate(folder, tmp_path / "tasks.json", *options, "--steps", "1")
    assert {row["task"] for row in result["tasks"]} == set(ruler.TASKS)
    for row in result["tasks"]:
        assert row["solved"] == [True, row["selector"] == "exact"]


def test_the_demo_model_answers_from_a_tenth_of_its_pages_and_its_picture_is_drawn(
    tmp_path, capsys
):
    out = tmp_path / "demo.json"
    sizes = ["--contexts", "800", "--steps", "8", "--sequences", "1", "--positions", "8"]
    selectors = ["--selectors", "exact", "topk:80", "topk:256"]
    result = evaluate(DEMO_MODEL, out, *sizes, *selectors)
    exact, few, more = result["perplexity"]
    assert exact["pages_read"] == 1 and few["pages_read"] < 0.13
    assert abs(more["nats_per_byte"] - exact["nats_per_byte"]) < 0.2
    assert main(["plot", str(out), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "demo-dropped-mass.svg").exists()
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--selectors", "best"], r"selector is 'best'; expected exact"),
        (["--contexts", "64"], r"--steps 128 leaves nothing to prefill of a context of 64"),
        (["--contexts", "1300"], r"takes 1301 positions, the model has 1300; give shorter"),
        (["--alpha", "3"], r"alpha .*=3.0 is outside \[1, 2\]"),
        (["--alpha", "1", "--selectors", "adaptive:2"], r"'adaptive:2' needs an entmax threshold"),
        (["--packages", "no_such_one"], r"--packages: no_such_one is not installed"),
        (["--inputs", "nowhere"], r"--inputs 'nowhere' is no folder; make it first"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    folder, tmp_path, capsys, options, message
):
    defaults = {"--contexts": "600", "--selectors": "exact"}
    given = dict(zip(options[::2], options[1::2], strict=True))
    line = [x for pair in (defaults | given).items() for x in pair]
    out = tmp_path / "none.json"
    assert main(["evaluate", str(folder), "--out", str(out), *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("entmaxkv evaluate: ")
    assert re.search(message, error)
    assert not out.exists()


def test_a_folder_that_is_no_checkpoint_is_refused(folder, tmp_path, capsys):
    for kept in ((), ("config.json",)):
        place = tmp_path / f"of {len(kept)} files"
        place.mkdir()
        for name in kept:
            shutil.copy(folder / name, place)
        assert (
            main(["evaluate", str(place), "--out", str(tmp_path / "no.json"), "--contexts", "600"])
            == 2
        )
        assert "cannot be loaded" in capsys.readouterr().err


def test_tokens_of_several_characters_fill_windows_and_prompts(folder):
    checkpoint = load(folder, 1.5)

    class Pairs:
        bos_token_id, eos_token_id = None, 3

        def encode(self, text, **_):
            return [ord(a) for a in text[::2]]

    checkpoint.tokenizer = Pairs()
    assert checkpoint.characters_per_token == 2
    assert checkpoint.windows(3, 400).shape == (3, 400)
    for task in checkpoint.tasks("multi-key needles", 900, 3, seed=1):
        assert len(task.prompt) == 900
        assert task.answer[-1] == 3
    with pytest.raises(ValueError, match="longer than the held-out text"):
        checkpoint.windows(1, 10**8)


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


def test_softmax_is_not_trained_with_nape(monkeypatch, tmp_path):
    options = ["--out", str(tmp_path), "--steps", "1", "--alpha", "1.0", "1.5"]
    monkeypatch.setattr(sys, "argv", ["train", *options, "--positions", "nape"])
    with pytest.raises(SystemExit, match="leave --alpha 1 out"):
        train.main()


@pytest.mark.parametrize("kind", study_selectors.KINDS)
def test_a_needle_takes_most_of_its_heads_weight(kind):
    head = study_selectors.synthetic(kind, 2048, True, seed=1)
    weights = study_selectors.solve_entmax(head.query @ head.key.mT, 1.5)[0]
    assert weights[0].max() > 0.4
    plain = study_selectors.synthetic(kind, 2048, False, seed=1)
    support = (study_selectors.solve_entmax(plain.query @ plain.key.mT, 1.5)[0] > 0).sum(1)
    assert (support.double() / 2048 - study_selectors.SUPPORTS[1]).abs().max() < 2e-3
