"""Scratch memory: enough for every step, bounded, and one block for all layers."""

import pytest
import torch

from entmaxkv_kernels import Exact, Gaussian, TopK
from entmaxkv_kernels.triton.workspace import Shape, processors
from entmaxkv_vllm import scratch

CPU = torch.device("cpu")


def plan(
    selector, max_tokens=1 << 17, max_sequences=256, heads=(32, 8, 128, 16), certificate=False
):
    dtypes = torch.bfloat16, torch.bfloat16
    return scratch.plan(
        *heads, *dtypes, max_tokens, max_sequences, selector, 2048, certificate, CPU
    )


@pytest.mark.parametrize("selector", [Exact(), Gaussian(), TopK(2048)])
@pytest.mark.parametrize("max_tokens", [64, 8192, 1 << 17])
def test_every_batch_that_a_decode_call_takes_fits(selector, max_tokens):
    size = plan(selector, max_tokens)
    heads = 32, 8, 128, 16, torch.bfloat16
    for rows in range(1, scratch.DECODE_ROWS + 1):
        shape = Shape(rows, *heads, max_tokens, processors(CPU), selector.name)
        assert shape.least_size <= size


def test_scratch_does_not_grow_with_the_sequences_that_a_server_takes_at_a_time():
    assert plan(Gaussian(), max_sequences=1024) == plan(Gaussian(), max_sequences=128)
    assert plan(Exact(), max_sequences=8) < plan(Exact(), max_sequences=128)


def test_scratch_of_128k_tokens_is_what_the_documentation_says():
    assert max(map(plan, (Exact(), Gaussian(), TopK(2048)))) <= scratch.MOST_BYTES


def test_all_layers_share_one_block_that_does_not_move_once_it_is_locked(monkeypatch):
    from vllm.v1.worker import workspace

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager(CPU))
    gpu = torch.device("cuda")
    scratch.take(1000, gpu)
    large = scratch.take(5000, gpu)
    workspace.lock_workspace()
    small = scratch.take(1000, gpu)
    assert small.data_ptr() == large.data_ptr() == scratch.take(5000, gpu).data_ptr()
    assert (len(small), len(large)) == (1000, 5000)
    with pytest.raises(AssertionError, match="locked"):
        scratch.take(6000, gpu)


def test_certificates_have_room_for_bounds():
    pages, heads, rows = (1 << 17) // 16, 32, 4
    selector = TopK(4096)
    more = plan(selector, max_sequences=rows, certificate=True) - plan(selector, max_sequences=rows)
    assert more >= 4 * pages * heads * rows
    assert plan(Exact(), certificate=True) == plan(Exact())
