"""Kernels that are compiled ahead of their first launch; see test_hopper, too."""

from types import SimpleNamespace

import pytest
import torch

from entmaxkv_kernels import PageLayout, allocate_pages, split_pages
from entmaxkv_kernels.triton.append import append
from entmaxkv_kernels.triton.launch import compile_ahead, launch, prefer_shared_memory

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


def test_every_loaded_kernel_is_told_once_to_prefer_shared_memory(monkeypatch):
    asked = []

    def set_attribute(function, attribute, value):
        asked.append((function.value, attribute, value))
        return 0

    driver = SimpleNamespace(cuFuncSetAttribute=set_attribute)
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    kernels = [{(1,): lambda at=at: SimpleNamespace(function=at)} for at in (1 << 40, 5 << 40)]
    for kernel in (*kernels, *kernels):
        launch(kernel, (1,))
    assert asked == [(1 << 40, 9, 100), (5 << 40, 9, 100)]


def test_a_driver_that_refuses_is_an_error(monkeypatch):
    driver = SimpleNamespace(cuFuncSetAttribute=lambda *arguments: 400)
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    with pytest.raises(RuntimeError, match="CUDA error 400"):
        prefer_shared_memory(7 << 40)
