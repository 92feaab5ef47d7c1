"""The training attention against plain double-precision autograd."""

import os
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the training attention needs PyTorch")
pytest.importorskip("triton", reason="the training attention is a Triton kernel")

from entmax import entmax_bisect  # noqa: E402

from entmaxkv_kernels.triton.training import entmax_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = {"TRITON_INTERPRET": "1"}
# Triton takes its interpreter for good while it is imported, and vLLM's kernels must not get it.
ELSEWHERE = DEVICE == "cpu" and not INTERPRETER.items() <= os.environ.items()
runs_kernels = pytest.mark.skipif(ELSEWHERE, reason="runs in a process with Triton's interpreter")


@pytest.mark.skipif(not ELSEWHERE, reason="this process runs the kernels itself")
def test_all_tests_of_this_file_pass_in_a_process_with_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=os.environ | INTERPRETER, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout


def entmax15(scores: torch.Tensor) -> torch.Tensor:
    """1.5-entmax of the last dimension by sorting, differentiable by autograd. # [..., T]"""
    z = scores / 2
    ordered = z.sort(dim=-1, descending=True).values
    finite = ordered.isfinite()
    ordered = ordered.masked_fill(~finite, 0.0)
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = ordered.cumsum(-1) / count
    variance = (ordered**2).cumsum(-1) / count - mean**2
    tau = mean - ((1 / count - variance).clamp(min=1e-300)).sqrt()
    support = ((tau <= ordered) & finite).sum(-1, keepdim=True)
    return (z - tau.gather(-1, support - 1)).clamp(min=0) ** 2


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    slopes: Any = None,
    alpha: float = 1.5,
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    hidden = torch.ones(q.shape[2], q.shape[2], device=q.device).triu(1).bool()
    scores = scale * q @ k.mT
    if slopes is not None:
        position = torch.arange(q.shape[2], device=q.device)
        scores += torch.tensor(slopes).to(q)[:, None, None] * (position - position[:, None])
    scores = scores.masked_fill(hidden, -torch.inf)
    return (entmax15(scores) if alpha == 1.5 else entmax_bisect(scores, alpha)) @ v


@runs_kernels
@pytest.mark.parametrize("sharpness", [0.3, 4.0], ids=["dense-weights", "sparse-weights"])
@pytest.mark.parametrize("length", [1, 77, 128, 301], ids=lambda n: f"{n}-tokens")
@pytest.mark.parametrize(
    ("group", "slope"),
    [(1, None), (2, None), (2, 0.03)],
    ids=["one-head-per-key-head", "two-heads-per-key-head", "slopes"],
)
def test_output_and_gradients_equal_double_precision_autograd(
    length: int, group: int, sharpness: float, slope: float | None
) -> None:
    assert_differentiates(length, group, sharpness, slope)


@runs_kernels
@pytest.mark.parametrize("sharpness", [0.3, 4.0], ids=["dense-weights", "sparse-weights"])
@pytest.mark.parametrize("alpha", [2.0, 4 / 3, 1.7, 1.1], ids="alpha {:.3g}".format)
def test_other_alphas_do_too(alpha: float, sharpness: float) -> None:
    assert_differentiates(173, 2, sharpness, 0.03, alpha)


def assert_differentiates(
    length: int, group: int, sharpness: float, slope: float | None, alpha: float = 1.5
) -> None:
    generator = torch.Generator().manual_seed(length + group)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, length, 32, generator=generator, dtype=torch.float64)

    q, k, v, grad = normal(2 * group) * sharpness, normal(2), normal(2), normal(2 * group)
    scale = 32**-0.5
    exact = [x.to(DEVICE).detach().requires_grad_() for x in (q, k, v)]
    single = [x.detach().float().requires_grad_() for x in exact]
    slopes = slope and [0.0, *(slope / head for head in range(1, 2 * group))]
    expected = reference(*exact, scale, slopes, alpha)
    expected.backward(grad.to(DEVICE))
    actual = entmax_attention(*single, slopes=slopes, alpha=alpha)
    actual.backward(grad.to(DEVICE).float())

    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(single, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1.0)
        assert error < 1e-4


@runs_kernels
def test_strided_heads_are_read_in_place() -> None:
    packed = torch.randn(1, 50, 4, 16, device=DEVICE)
    q, k, v = packed[:, :, :2], packed[:, :, 2:3], packed[:, :, 3:]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = reference(q.double(), k.double(), v.double(), 0.25)
    torch.testing.assert_close(entmax_attention(q, k, v).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16 dot")
def test_bfloat16_gradients_are_within_rounding_on_the_gpu() -> None:
    q, k, v = (torch.randn(2, h, 1000, 64, device=DEVICE) for h in (8, 2, 2))
    exact = [x.bfloat16().double().requires_grad_() for x in (q * 3, k, v)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    grad = torch.randn(2, 8, 1000, 64, device=DEVICE)
    reference(*exact, 0.125).backward(grad.double())
    entmax_attention(*half).backward(grad.bfloat16())
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() / theirs.grad.norm() < 1e-2


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((1, 2, 8, 24), (1, 1, 8, 24)),
        ((1, 3, 8, 16), (1, 2, 8, 16)),
        ((1, 2, 8, 16), (1, 2, 9, 16)),
    ],
    ids=["a-head-dimension-of-24", "two-key-heads-for-three", "another-length"],
)
def test_shapes_that_do_not_fit_are_refused(query: tuple[int, ...], key: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        entmax_attention(torch.zeros(query), torch.zeros(key), torch.zeros(key))


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_other_alphas_than_those_above_one_and_up_to_two_are_refused(alpha: float) -> None:
    heads = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match=f"alpha is {alpha}"):
        entmax_attention(heads, heads, heads, alpha=alpha)


def test_slopes_must_be_as_many_as_query_heads() -> None:
    heads = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match="1 slopes are given for 2 query heads"):
        entmax_attention(heads, heads, heads, slopes=[0.5])
