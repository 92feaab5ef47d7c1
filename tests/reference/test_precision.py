"""Low precision: no worse than straightforward PyTorch in the same dtype, by a small factor."""

import pytest
import torch
from entmax import entmax_bisect
from torch import Tensor

from entmaxkv_kernels import Exact, Gaussian, TopK

from .scene import make_scene

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
alphas = pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0], ids="alpha {}".format)
spreads = pytest.mark.parametrize("spread", [0.1, 1.0, 8.0], ids="score spread {}".format)

FACTOR = 1.5
"""How much larger than the yardstick's an error may be: the order of a sum is chance."""


def straightforward_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, alpha: float, slopes: Tensor | None
) -> Tensor:
    """Scores and weights materialised in the dtype of the inputs, [m, query_heads, head_size].

    For fp16 and bf16 the weights are found in fp32, as eager attention does with its softmax.
    """
    queries, group = len(query), query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("mhd,nhd->hmn", query, key) * scale
    position = torch.arange(len(key), device=key.device)
    relative = position - position[len(key) - queries :, None]
    if slopes is not None:
        scores = scores + (slopes[:, None, None] * relative).to(scores.dtype)
    scores = scores.float().masked_fill(relative > 0, -torch.inf)
    weights = scores.softmax(-1) if alpha == 1 else entmax_bisect(scores, alpha, dim=-1, n_iter=50)
    return torch.einsum("hmn,nhd->mhd", weights.to(value.dtype), value)


def assert_no_worse(actual: list[Tensor], yardstick: list[Tensor], exact: list[Tensor]) -> None:
    def error(tensors: list[Tensor]) -> float:
        pairs = zip(tensors, exact, strict=True)
        return torch.cat([(a.double() - e).flatten() for a, e in pairs]).norm().item()

    assert not any(tensor.isnan().any() for tensor in actual)
    assert error(actual) <= FACTOR * error(yardstick)


@dtypes
@alphas
@spreads
@pytest.mark.parametrize("alibi", [False, True], ids=["no ALiBi", "ALiBi"])
def test_attention_is_as_accurate_as_straightforward_pytorch(dtype, alpha, spread, alibi):
    scene = make_scene([1, 33, 150], dtype=dtype, spread=spread)
    slopes = torch.tensor([0.5, 0.0, 0.05, 0.004]) if alibi else None
    exact = scene.dense_prefill(alpha=alpha, slopes=slopes)
    yardstick = [
        straightforward_attention(q, k, v, scene.scale, alpha, slopes)
        for q, k, v in zip(scene.query, scene.key, scene.value, strict=True)
    ]
    prefilled = scene.prefill(alpha=alpha, alibi_slopes=slopes)
    assert all(out.dtype == dtype for out in prefilled)
    assert_no_worse(prefilled, yardstick, exact)
    decoded = scene.decode(alpha=alpha, alibi_slopes=slopes, selector=Exact())
    last = [[rows[-1] for rows in tensors] for tensors in (yardstick, exact)]
    assert_no_worse(list(decoded), *last)


@dtypes
@pytest.mark.parametrize("selector", [Gaussian(), TopK(96)], ids=lambda selector: selector.name)
def test_sparse_steps_find_the_pages_that_float64_finds(dtype, selector):
    options = {"statistics": selector.statistics, "spread": 4, "coherence": 0.8}
    scene = make_scene([1000, 600], dtype=dtype, **options)
    decoded = scene.decode(selector=selector)
    exact = scene.dense_decode()
    precise = make_scene([1000, 600], **options)
    for name in ("query", "key", "value"):
        setattr(precise, name, [tensor.double() for tensor in getattr(scene, name)])
    precise.append_all()
    sparse = precise.decode(selector=selector)
    yardstick = torch.cat(
        [
            straightforward_attention(q[-1:], k, v, scene.scale, 1.5, None)
            for q, k, v in zip(scene.query, scene.key, scene.value, strict=True)
        ]
    )
    rounding = FACTOR * (yardstick.double() - exact).norm() / exact.norm()
    assert (decoded.double() - sparse).norm() / exact.norm() <= rounding


@dtypes
def test_scores_far_apart_are_no_matter(dtype):
    """Outlier channels: scores in the thousands, beyond what fp16 can hold squared."""
    scene = make_scene([150], dtype=dtype, spread=300.0)
    decoded = scene.decode(selector=Exact())
    yardstick = torch.cat(
        [
            straightforward_attention(q[-1:], k, v, scene.scale, 1.5, None)
            for q, k, v in zip(scene.query, scene.key, scene.value, strict=True)
        ]
    )
    assert_no_worse([decoded], [yardstick], [scene.dense_decode()])
