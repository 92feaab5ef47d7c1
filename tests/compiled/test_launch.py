"""Kernels that are compiled ahead of their first launch; see test_hopper, too."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from triton.runtime._async_compile import AsyncCompileMode, active_mode

from entmaxkv_kernels import PageLayout, allocate_pages, split_pages
from entmaxkv_kernels.triton import launch as launching
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


def test_kernels_are_compiled_ahead_again_after_one_could_not_be(monkeypatch):
    def fail(mode, *error):
        raise RuntimeError("does not compile")

    with monkeypatch.context() as patch:
        # As Triton 3.6 ends: the mode stays active.
        patch.setattr(AsyncCompileMode, "__exit__", fail)
        with pytest.raises(RuntimeError, match="does not compile"), compile_ahead():
            pass
    with compile_ahead():
        assert active_mode.get() is not None
    assert active_mode.get() is None


@pytest.mark.parametrize(
    "processes, compilers", [(1, 12), (5, 2), (64, 1)], ids=["alone", "five", "too many"]
)
def test_processes_of_a_machine_share_its_processors(processes, compilers, monkeypatch):
    made = []
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)))

    def executor(count):
        made.append(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(launching, "ThreadPoolExecutor", executor)
    with compile_ahead(processes):
        pass
    assert made == [compilers]


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
