"""Write reference-tokens.json: what the PyTorch reference generates on a CPU, in float32.

The prompts are those of tests/engine/test_exact.py, where an independent oracle gives the same
tokens. Token ids are below 259, so a list of them is stored as a string of as many characters.

Usage: PYTHONPATH=tests python tests/gpu/record.py
"""

import json
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  settings of vLLM
from engine.engines import engine
from engine.test_exact import NEW_TOKENS, prompts
from transformers import AutoTokenizer

from entmaxkv_vllm import DEMO_MODEL

SPARSE = {
    "topk": {"selector": "topk", "token_budget": 256, "exact_below": 256},
    "gaussian": {"selector": "gaussian", "exact_below": 256},
}
PATH = Path(__file__).parent / "reference-tokens.json"


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def generate(options: dict[str, Any], requests: list[list[int]]) -> list[str]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with engine(max_model_len=4096 + 64, additional_config={"entmaxkv": options}) as llm:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in requests], sampling, use_tqdm=False
        )
    return [text_of(list(output.outputs[0].token_ids)) for output in outputs]


def main() -> None:
    requests = prompts(AutoTokenizer.from_pretrained(DEMO_MODEL))
    record = {
        "options": {"exact": {"selector": "exact"}} | SPARSE,
        "prompts": [text_of(ids) for ids in requests],
    }
    record["tokens"] = {
        name: generate(options, requests) for name, options in record["options"].items()
    }
    PATH.write_text(json.dumps(record, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
