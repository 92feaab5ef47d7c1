"""scripts/soak.py in small, and that it would see what it looks for."""

import random

import pytest
import soak
import torch

from entmaxkv_vllm.telemetry import engine_counters

from .engines import engine, layers_of

pytestmark = pytest.mark.engine

BLOCKS = 288
OPTIONS = {"entmaxkv": {"selector": "topk", "token_budget": 256, "exact_below": 256}}


def test_what_random_requests_and_aborts_leave_behind_is_right_and_damage_is_seen():
    with engine(
        max_model_len=soak.LONGEST + 2 * soak.NEW_TOKENS,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=BLOCKS,
        additional_config=OPTIONS,
    ) as llm:
        done = soak.drive(llm.llm_engine, 16, random.Random(5))
        assert done["finished"] + done["aborted"] == done["requests"] == 16
        assert engine_counters(llm)["sparse_steps"] > 0
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == BLOCKS - 1

        right = soak.compare_statistics(llm)
        assert right["blocks_compared"] > 100
        assert right["blocks_wrong"] == 0
        block = next(block.block_id for block in pool.blocks if block.block_hash is not None)
        layer = layers_of(llm)[-1]
        with torch.inference_mode():
            layer.impl.pages(layer, layer.kv_cache).statistics[block, 1, 0, 5] += 1
        assert soak.compare_statistics(llm)["blocks_wrong"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks_wrong": 3}, "blocks_wrong is 3; expected 0"),
        ({"memory_growth": 512}, "memory_growth is 512; expected 0"),
        ({"finished": 90}, "100 requests, 90 finished"),
        ({"sparse_steps": 0}, "sparse_steps is 0; nothing was tested"),
    ],
)
def test_a_soak_that_went_wrong_says_what(change, message):
    row = {
        "selector": "gaussian",
        "requests": 100,
        "finished": 93,
        "aborted": 7,
        "blocks_wrong": 0,
        "blocks_not_free": 0,
        "memory_growth": 0,
        "blocks_compared": 900,
        "num_preemptions": 4,
        "prefix_cache_hits": 80,
        "sparse_steps": 1000,
    }
    assert soak.complaints(row) == []
    assert soak.complaints(row | change) == [message]
