"""Two GPUs, by heads and by layers, against the tokens of the reference on a CPU."""

import pytest
import torch
from engine.engines import engine

from entmaxkv_vllm.telemetry import engine_counters

from .test_serving import PROMPTS, RECORD, differing, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("selector", ["exact", "topk", "gaussian"])
@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_give_the_tokens_of_the_reference(split, selector):
    options = {
        split: 2,
        "enforce_eager": False,
        "max_model_len": 4096 + 64,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 24,
        "additional_config": {"entmaxkv": RECORD["options"][selector]},
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 8, 24],
        },
    }
    with engine(**options) as llm:
        outputs = generate(llm, PROMPTS)
        counters = engine_counters(llm)
    assert differing(outputs, selector) == []
    assert counters["steps"] > 0
    if selector == "exact":
        assert counters["pages_read"] == counters["pages_held"]
    else:
        assert counters["sparse_steps"] > 0
        assert counters["pages_read"] < counters["pages_held"]
