"""NAPE: ALiBi on some heads; no positions on the others, whose queries grow with theirs.

Vasylenko et al., "Long-Context Generalization with Sparse Attention", arXiv 2506.16640.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus
from transformers import LlamaConfig

from entmaxkv_vllm.config import ConfigurationError

ARCHITECTURE = "NapeLlamaForCausalLM"
SLOPES: Mapping[str, Callable[[int], list[float]]] = {
    "linear": lambda heads: [1 / head for head in range(1, heads + 1)],
    "exp": lambda heads: [2.0**-head for head in range(heads)],
    "geometric": lambda heads: [2 ** (-8 * head / heads) for head in range(1, heads + 1)],
}
ADAPTIVE = "adapt-softplus-tanh"
SCALES = (None, "learn", "nakanishi", ADAPTIVE)


class NapeLlamaConfig(LlamaConfig):
    """config.json of a Llama with NAPE. A type of its own, lest it be loaded with rotation."""

    model_type = "nape_llama"


@dataclass(frozen=True)
class Nape:
    """What :func:`read_nape` found: `slopes` of all query heads, 0 for those without positions,
    and how these scale their queries."""

    slopes: tuple[float, ...]
    scale_type: str | None
    delta: float
    gamma_range: float
    bias: bool


def read_nape(config: Mapping[str, Any]) -> Nape:
    """The positions of a model, from the entries of its config.json.

    Raises:
        ConfigurationError: for a value that cannot be served.
    """
    heads = config["num_attention_heads"]
    slopes = config.get("alibi_slopes")
    if slopes is None:
        count = config.get("alibi_num_heads")
        count = heads // 2 if count is None else count
        if type(count) is not int or not 0 <= count <= heads:
            problem = f"is not a number of the model's {heads} query heads"
            raise ConfigurationError("alibi_num_heads", count, problem, f"give 0 to {heads}")
        kind = _choice(config, "alibi_slope_type", "linear", tuple(SLOPES))
        slopes = [*SLOPES[kind](count), *[0.0] * (heads - count)]
    elif not isinstance(slopes, list | tuple) or len(slopes) != heads:
        raise ConfigurationError(
            "alibi_slopes",
            slopes,
            "is not a list with an entry for each query head",
            f"give {heads}",
        )
    for slope in slopes:
        if not _is_number(slope) or not 0 <= slope < float("inf"):
            raise ConfigurationError(
                "alibi_slopes", slope, "is no slope", "give finite numbers of at least 0"
            )
    scale_type = _choice(config, "attn_scale_type", None, SCALES)
    plain = sum(slope > 0 for slope in slopes)
    if scale_type and (plain == heads or any(slopes[plain:])):
        raise ConfigurationError(
            "attn_scale_type",
            scale_type,
            f"scales the last heads, those of slope 0, but the slopes are {list(slopes)}",
            "leave it out, or give slopes whose zeros are the last ones",
        )
    for name in ("attn_scale_delta", "attn_scale_gamma_range"):
        if not _is_number(config.get(name, 1)):
            raise ConfigurationError(name, config[name], "is not a number", "give a number")
    return Nape(
        tuple(map(float, slopes)),
        scale_type,
        config.get("attn_scale_delta", 1),
        config.get("attn_scale_gamma_range", 2),
        bool(config.get("attn_scale_proj_bias", False)),
    )


def _choice(config: Mapping[str, Any], name: str, default: Any, choices: tuple[Any, ...]) -> Any:
    value = config.get(name, default)
    if value not in choices:
        listed = ", ".join("null" if choice is None else choice for choice in choices)
        raise ConfigurationError(name, value, "is unknown", f"choose from {listed}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class QueryScale(nn.Module):
    """Multiplies queries of the heads without slope by delta + beta * log(position + 2) ** gamma.

    `learn` has weights beta and gamma [scaled heads]; `nakanishi` has beta, its delta is 0 and its
    gamma 1; `adapt-softplus-tanh` computes both from the layer's input.
    """

    def __init__(self, nape: Nape, hidden_size: int) -> None:
        super().__init__()
        self.nape = nape
        self.plain = sum(slope > 0 for slope in nape.slopes)
        scaled = len(nape.slopes) - self.plain
        if nape.scale_type == ADAPTIVE:
            self.beta_proj = nn.Linear(hidden_size, scaled, bias=nape.bias)
            self.gamma_proj = nn.Linear(hidden_size, scaled, bias=nape.bias)
            return
        # 1 / log(512): factors of a short text differ little from 1, or from 1 + delta.
        self.beta = nn.Parameter(torch.full((scaled,), 0.16))
        if nape.scale_type == "learn":
            self.gamma = nn.Parameter(torch.ones(scaled))

    def factors(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """[...] and [..., hidden size] -> [..., scaled heads] in float32."""
        growth = (positions + 2).float().log()[..., None]
        if self.nape.scale_type == "nakanishi":
            return self.beta.float() * growth
        if self.nape.scale_type == "learn":
            beta, gamma = self.beta.float(), self.gamma.float()
        else:
            beta = softplus(self.beta_proj(hidden).float())
            gamma = self.nape.gamma_range * self.gamma_proj(hidden).float().tanh()
        return self.nape.delta + beta * growth**gamma

    def forward(
        self, query: Tensor, positions: Tensor, hidden: Tensor, first_head: int = 0
    ) -> Tensor:
        """query [..., heads, head size] of the heads from `first_head` on, scaled."""
        heads = query.shape[-2]
        first = max(0, first_head - self.plain)
        last = max(0, first_head + heads - self.plain)
        factors = self.factors(positions, hidden)[..., first:last]
        factors = pad(factors, (heads - factors.shape[-1], 0), value=1.0)
        return (query * factors[..., None]).to(query.dtype)
