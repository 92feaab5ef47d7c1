"""The shipped model in transformers, its attention by the independent package `entmax`."""

import hashlib
import json
import random

import oracle
import pytest
import torch

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.retrieval import FACTS, needle_prompt

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def model():
    return oracle.load(DEMO_MODEL)


@pytest.fixture(scope="module")
def evaluation() -> dict:
    return json.loads((DEMO_MODEL / "evaluation.json").read_text())


def test_weights_fit_into_six_mebibytes() -> None:
    assert sum(path.stat().st_size for path in DEMO_MODEL.glob("*.safetensors")) <= 6 * 2**20


def test_configuration_is_a_stock_llama_with_an_entmax_alpha() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["entmax_alpha"] == 1.5
    assert not {"auto_map", "quantization_config"} & config.keys()
    assert config["max_position_embeddings"] > 8192 + 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and trailing  \n\n",
        "naïve ☃ 日本語 🙂",
        "\x00\x7f\r\n\t",
        "def f(x): return x , .",
    ],
    ids=["nothing", "white-space", "other-scripts", "control-characters", "code"],
)
def test_tokens_are_the_bytes_after_one_bos_and_decode_without_loss(tokenizer, text: str) -> None:
    tokens = tokenizer(text).input_ids
    assert tokens == [256, *text.encode()]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_chat_template_writes_the_prompt_of_the_tasks_with_one_bos(tokenizer) -> None:
    task = needle_prompt(random.Random(0), tokens=300)
    chat = [{"role": "user", "content": task.message}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert (
        tokenizer(text, add_special_tokens=False).input_ids
        == tokenizer(task.prompt + " ").input_ids
    )


def test_chat_template_ends_every_answer_before_the_next_question(tokenizer) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>a\nAnswer: b<eos>\n\nc\nAnswer: "


@pytest.mark.parametrize("kind", FACTS)
def test_every_answer_token_of_held_out_tasks_is_the_most_likely(model, kind: str) -> None:
    rng = random.Random(7)
    right = 0
    for _ in range(5):
        task = needle_prompt(rng, tokens=512, keys=4, kind=kind)
        answer = [*task.answer.encode(), EOS]
        tokens = torch.tensor([[BOS, *task.prompt.encode(), *answer]])
        with torch.inference_mode():
            logits = model(tokens[:, :-1], logits_to_keep=len(answer)).logits
        right += logits[0].argmax(-1).tolist() == answer
    assert right >= 4


def test_greedy_decoding_finds_a_needle_without_a_bos(model, tokenizer) -> None:
    task = needle_prompt(random.Random(3), tokens=512)
    prompt = tokenizer(task.prompt, add_special_tokens=False).input_ids
    tokens, _ = oracle.greedy(model, prompt, len(task.answer))
    assert task.is_correct(tokenizer.decode(tokens))


def test_evaluation_is_of_the_weights_that_ship(evaluation: dict) -> None:
    weights = (DEMO_MODEL / "model.safetensors").read_bytes()
    assert evaluation["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_evaluation_reaches_its_targets_at_every_length_up_to_8192(evaluation: dict) -> None:
    scores = evaluation["scores"]
    for name, target in {"single needle": 0.95, "8 keys": 0.8}.items():
        assert min(share for n, share in scores[name].items() if int(n) <= 8192) >= target
    assert {"8192", "256"} <= scores["single needle"].keys()


def test_model_card_shows_the_evaluation(evaluation: dict) -> None:
    card = (DEMO_MODEL / "README.md").read_text()
    lengths = evaluation["samples"]
    for name, scores in evaluation["scores"].items():
        cells = [f"{100 * scores[n]:.1f}" if n in scores else "-" for n in lengths]
        assert f"| {name} | {' | '.join(cells)} |" in card
