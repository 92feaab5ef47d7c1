"""Kernels that are compiled ahead of their first launch; see test_hopper, too."""

import pytest
import torch

from entmaxkv_kernels import PageLayout, allocate_pages, split_pages
from entmaxkv_kernels.triton.append import append
from entmaxkv_kernels.triton.launch import compile_ahead

from .device import DEVICE


@pytest.fixture
def raw_and_append():
    """The bytes of three pages, and a step that appends five tokens to them."""
    layout = PageLayout(16, 48, ("center", "half_width"))
    raw = allocate_pages(3, 2, layout, torch.float32, DEVICE)
    rows = torch.randn(5, 2, 48, device=DEVICE)
    slots = torch.arange(17, 22, device=DEVICE)
    return raw, lambda: append(split_pages(raw, layout), rows, rows, slots)


def test_nothing_is_written_while_kernels_are_compiled(raw_and_append):
    raw, append_some = raw_and_append
    before = raw.clone()
    with compile_ahead():
        append_some()
    assert torch.equal(raw, before)
    append_some()
    assert not torch.equal(raw, before)


def test_kernels_run_again_after_compiling_was_interrupted(raw_and_append):
    raw, append_some = raw_and_append
    before = raw.clone()
    with pytest.raises(KeyboardInterrupt), compile_ahead():
        raise KeyboardInterrupt
    append_some()
    assert not torch.equal(raw, before)
