"""The self-test passes on right kernels and fails on wrong ones."""

import pytest
import torch

from entmaxkv_kernels import Exact, api, selftest

FEW = [
    selftest.Check("decode exact", torch.float32, torch.float32, Exact()),
    selftest.Check("prefill", torch.float32, torch.float32),
]


@pytest.fixture
def few_checks(monkeypatch):
    monkeypatch.setattr(selftest, "checks_for", lambda device: FEW)


def test_right_kernels_pass(few_checks, capsys):
    assert selftest.main() == 0
    assert capsys.readouterr().out.count("ok ") == len(FEW)


@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros_like, lambda out: out.masked_fill(out == out.max(), torch.nan)],
    ids=["zeros", "one element that is no number"],
)
def test_a_wrong_kernel_is_found_out(monkeypatch, name, wrong):
    right = getattr(api, name)

    def broken(*arguments, implementation="reference", **options):
        # The reference in place of the compiled kernel, which takes long without a GPU.
        out = right(*arguments, **options)
        return wrong(out) if implementation == "triton" else out

    monkeypatch.setattr(api, name, broken)
    assert selftest.run_check(FEW[name == "prefill"], selftest.device()) > 1


def test_an_append_that_stores_something_else_is_found(monkeypatch):
    right = api.append

    def broken(cache, key, value, slots, **options):
        right(cache, key * 1.01, value, slots, **options)

    monkeypatch.setattr(api, "append", broken)
    with pytest.raises(AssertionError, match="append stored something else"):
        selftest.make_scene(FEW[0], selftest.device())


def test_every_function_and_selector_is_checked_on_a_cpu_and_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for device in ("cpu", "cuda"):
        checks = selftest.checks_for(torch.device(device))
        selectors = {check.selector.name for check in checks if check.selector}
        assert selectors == {"exact", "pruned", "topk", "gaussian"}
        assert any(check.selector is None for check in checks)
        assert any(check.alpha == 1 for check in checks)
