"""The record that GPUs are compared with is what the reference generates today."""

import json
from pathlib import Path

import pytest

from .engines import engine

pytestmark = pytest.mark.engine

RECORD = json.loads(
    (Path(__file__).parents[1] / "gpu" / "reference-tokens.json").read_text(encoding="ascii")
)
PROMPTS = 6


@pytest.mark.parametrize("selector", ["topk", "gaussian"])
def test_the_longest_prompts_have_the_tokens_on_record(selector):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    longest = sorted(range(len(RECORD["prompts"])), key=lambda i: len(RECORD["prompts"][i]))
    chosen = longest[-PROMPTS:]
    requests = [TokensPrompt(prompt_token_ids=[*map(ord, RECORD["prompts"][i])]) for i in chosen]
    options = {"entmaxkv": RECORD["options"][selector]}
    expected = [RECORD["tokens"][selector][i] for i in chosen]
    sampling = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True)
    with engine(max_model_len=4096 + 64, additional_config=options) as llm:
        outputs = llm.generate(requests, sampling, use_tqdm=False)
    assert ["".join(map(chr, output.outputs[0].token_ids)) for output in outputs] == expected
