"""An adapter of low rank on the projections, against a model into which its weights are merged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.telemetry import engine_counters

from .engines import engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="vLLM's LoRA kernels of a GPU take no float32"
    ),
]

RANK, SCALING = 8, 2.0
MODULES = ["q_proj", "v_proj"]
OPTIONS = {"entmaxkv": {"selector": "topk", "token_budget": 256, "exact_below": 256}}


def adapter_and_merged(folder):
    """Folders of a random adapter and of the demo model with the adapter's weights added."""
    adapter, merged = folder / "adapter", folder / "merged"
    adapter.mkdir()
    shutil.copytree(DEMO_MODEL, merged)
    weights = load_file(merged / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    low_rank = {}
    for name in [n for n in weights if any(f".{m}.weight" in n for m in MODULES)]:
        rows, columns = weights[name].shape
        down = torch.randn(RANK, columns, generator=generator) * 0.05
        up = torch.randn(rows, RANK, generator=generator) * 0.05
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        low_rank |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = (weights[name].float() + SCALING * up @ down).to(weights[name].dtype)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    save_file(low_rank, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": SCALING * RANK,
        "target_modules": MODULES,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, merged


def greedy(llm, **options):
    """Greedy tokens of two prompts."""
    from vllm import SamplingParams

    prompts = ["The magic number of the lighthouse is 4281. " * 20, "In the beginning " * 33]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def with_and_without(adapter):
    """Tokens with an adapter and without, and what was counted."""
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_lora_rank": RANK}
    with engine(max_model_len=2048, additional_config=OPTIONS, **lora) as llm:
        adapted = greedy(llm, lora_request=LoRARequest("test", 1, str(adapter)))
        return adapted, greedy(llm), engine_counters(llm)


def test_an_adapter_answers_as_a_model_that_has_its_weights(tmp_path):
    adapter, merged = adapter_and_merged(tmp_path)
    adapted, plain, counters = with_and_without(adapter)
    assert counters["sparse_steps"] > 0
    with engine(merged, max_model_len=2048, additional_config=OPTIONS) as llm:
        assert greedy(llm) == adapted
    assert plain != adapted
