"""Slopes of heads, factors of queries, and which of them a rank takes."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus

from entmaxkv_vllm import nape_model
from entmaxkv_vllm.nape import QueryScale, read_nape

POSITIONS = torch.tensor([0, 1, 5, 4000])
GROWTH = (POSITIONS + 2).double().log()[:, None]


@pytest.mark.parametrize(
    ("settings", "slopes"),
    [
        ({}, [1, 1 / 2, 1 / 3, 0, 0, 0]),
        ({"alibi_slope_type": "exp", "alibi_num_heads": 4}, [1, 0.5, 0.25, 0.125, 0, 0]),
        ({"alibi_slope_type": "geometric", "alibi_num_heads": 2}, [2**-4, 2**-8, 0, 0, 0, 0]),
        ({"alibi_num_heads": 0}, [0] * 6),
        ({"alibi_slopes": [0, 3, 0, 0.1, 0, 0]}, [0, 3, 0, 0.1, 0, 0]),
    ],
    ids=["half-linear", "exp", "geometric", "none", "listed"],
)
def test_heads_with_slopes_come_first_unless_they_are_listed(settings, slopes):
    assert read_nape({"num_attention_heads": 6} | settings).slopes == pytest.approx(slopes)


def scale_of(kind, **settings):
    config = {"num_attention_heads": 6, "attn_scale_type": kind, "attn_scale_delta": 0.7}
    torch.manual_seed(0)
    scale = QueryScale(read_nape(config | settings), 8)
    for parameter in scale.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.5)
    return scale


def factors(kind, scale, hidden):
    if kind == "nakanishi":
        return scale.beta * GROWTH
    if kind == "learn":
        return 0.7 + scale.beta * GROWTH**scale.gamma
    beta, gamma = (hidden @ x.weight.T + x.bias for x in (scale.beta_proj, scale.gamma_proj))
    return 0.7 + softplus(beta) * GROWTH ** (1.5 * gamma.tanh())


@pytest.mark.parametrize("kind", ["learn", "nakanishi", "adapt-softplus-tanh"])
def test_the_last_heads_scale_their_queries_on_every_rank(kind):
    scale = scale_of(kind, attn_scale_gamma_range=1.5, attn_scale_proj_bias=True)
    query, hidden = torch.randn(4, 6, 64), torch.randn(4, 8)
    expected = query.clone()
    expected[:, 3:] *= factors(kind, scale, hidden)[..., None].float()
    torch.testing.assert_close(scale(query, POSITIONS, hidden), expected)
    for heads in (1, 2, 3):
        ranks = [
            scale(part, POSITIONS, hidden, rank * heads)
            for rank, part in enumerate(query.split(heads, 1))
        ]
        torch.testing.assert_close(torch.cat(ranks, 1), expected)


def test_each_rank_takes_the_slopes_of_its_own_heads(monkeypatch):
    def half(hidden, size, heads, kv_heads, **options):
        return SimpleNamespace(num_heads=heads // 2, num_kv_heads=kv_heads // 2)

    config = SimpleNamespace(num_attention_heads=8, alibi_num_heads=6)
    monkeypatch.setattr(nape_model, "QKVParallelLinear", half)
    monkeypatch.setattr(nape_model, "RowParallelLinear", lambda *sizes, **options: None)
    monkeypatch.setattr(nape_model, "Attention", lambda *sizes, **options: options)
    names = ("quant_config", "bias", "bias_o_proj", "cache_config", "prefix")
    for rank, slopes in enumerate(([1, 1 / 2, 1 / 3, 1 / 4], [1 / 5, 1 / 6, 0, 0])):
        monkeypatch.setattr(nape_model, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        layer = nape_model.NapeAttention(config, 512, 8, 4, **dict.fromkeys(names))
        assert layer.attn["alibi_slopes"] == pytest.approx(slopes)
        assert layer.attn["num_kv_heads"] == 2
