"""A server that gives its memory back for a while."""

import pytest
import torch

from entmaxkv_vllm.telemetry import engine_counters

from .test_serving import ALONE, GRAPHS, generate, started

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_captured_steps_answer_as_before_after_each_level_of_sleep():
    # One engine for both levels: vLLM lets only one of a process sleep.
    with started("gaussian", compilation_config=GRAPHS, enable_sleep_mode=True) as llm:

        def answers():
            llm.reset_prefix_cache()
            return [list(output.token_ids) for output in generate(llm, ALONE)]

        before = answers()
        counted = engine_counters(llm)["sparse_steps"]
        llm.sleep(level=1)  # weights go to the host
        llm.wake_up()
        assert answers() == before
        llm.sleep(level=2)  # weights are dropped
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        assert answers() == before
        assert engine_counters(llm)["sparse_steps"] == 3 * counted > 0
