"""A server that gives its memory back for a while."""

import pytest
import torch

from entmaxkv_vllm.telemetry import engine_counters

from .test_serving import ALONE, GRAPHS, generate, started

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("level", [1, 2], ids=["weights-to-the-host", "weights-dropped"])
def test_captured_steps_answer_as_before_after_sleep_and_wake(level):
    with started("gaussian", compilation_config=GRAPHS, enable_sleep_mode=True) as llm:
        before = [list(output.token_ids) for output in generate(llm, ALONE)]
        counted = engine_counters(llm)["sparse_steps"]
        llm.sleep(level=level)
        if level == 1:
            llm.wake_up()
        else:
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
        llm.reset_prefix_cache()
        after = [list(output.token_ids) for output in generate(llm, ALONE)]
        assert engine_counters(llm)["sparse_steps"] == 2 * counted > 0
    assert after == before
