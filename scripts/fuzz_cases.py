"""Random batches in a paged cache, and what entmax attention makes of them in fp64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from entmaxkv_kernels import (
    Exact,
    Gaussian,
    PagedCache,
    PageLayout,
    Selector,
    TopK,
    append,
    split_pages,
)
from entmaxkv_kernels.reference.entmax import (
    entmax_threshold_bisect,
    entmax_threshold_sort,
    exponent,
    score_factor,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


EXACT = Exact()


@dataclass(frozen=True)
class Family:
    """What is compiled for: everything else of a case is random.

    width: pages in a row of the block table.
    """

    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    group: int = 4
    head_size: int = 128
    page_size: int = 16
    batch: int = 4
    width: int = 40
    alpha: float | tuple[float, ...] = 1.5
    selector: Selector = EXACT
    alibi: bool = False
    window: int | None = None
    prefill: bool = False
    weight: int = 4
    """How often its cases are drawn."""

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def alphas(self) -> list[float]:
        """alpha of every query head."""
        if isinstance(self.alpha, tuple):
            return [self.alpha[h % len(self.alpha)] for h in range(self.query_heads)]
        return [self.alpha] * self.query_heads


FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FAMILIES = {
    "exact bf16": Family(weight=12),
    "exact fp16": Family(FP16, weight=8),
    "exact fp32": Family(FP32, head_size=64, weight=12),
    "exact D 80": Family(FP32, head_size=80, group=3, kv_heads=1),
    "exact D 96, pages of 32": Family(BF16, head_size=96, group=1, page_size=32, width=20),
    "exact D 256, pages of 64": Family(BF16, head_size=256, group=2, page_size=64, width=10),
    "exact group 16": Family(BF16, head_size=64, kv_heads=1, group=16),
    "exact group 7": Family(FP32, head_size=64, kv_heads=1, group=7),
    "exact alpha 2": Family(FP32, head_size=64, alpha=2.0, weight=8),
    "exact alpha 4/3": Family(FP32, head_size=64, alpha=4 / 3, weight=6),
    "exact alpha 1.2": Family(FP32, head_size=64, alpha=1.2, weight=6),
    "softmax": Family(BF16, alpha=1.0),
    "alpha per head": Family(FP32, head_size=64, alpha=(1.0, 1.5, 2.0, 1.3)),
    "ALiBi": Family(FP32, head_size=64, alibi=True, weight=6),
    "window": Family(FP32, head_size=64, window=100, weight=6),
    "batch 64": Family(BF16, head_size=64, batch=64, width=16, weight=2),
    "long fp32": Family(FP32, 1, 2, 64, batch=2, width=2600, weight=6),
    "long bf16": Family(BF16, 2, 4, 128, batch=1, width=3000, weight=4),
    "long alpha 2": Family(FP32, 1, 2, 64, batch=1, width=2600, alpha=2.0, weight=3),
    "long alpha 1.2": Family(FP32, 1, 1, 64, batch=1, width=2600, alpha=1.2, weight=2),
    "top-k bf16": Family(selector=TopK(128), weight=8),
    "top-k fp32": Family(FP32, head_size=64, selector=TopK(96), alibi=True, weight=6),
    "top-k softmax": Family(BF16, selector=TopK(128), alpha=1.0),
    "top-k long": Family(BF16, 1, 4, 64, batch=1, width=9000, selector=TopK(4000), weight=1),
    "gaussian bf16": Family(selector=Gaussian(), weight=8),
    "gaussian fp32": Family(FP32, head_size=64, selector=Gaussian(), alibi=True, weight=4),
    "gaussian alpha 2": Family(FP32, head_size=64, selector=Gaussian(), alpha=2.0, weight=4),
    "prefill bf16": Family(prefill=True, weight=4),
    "prefill fp32": Family(FP32, head_size=64, prefill=True, weight=3),
    "prefill ALiBi": Family(FP16, head_size=64, prefill=True, alibi=True, weight=3),
}


class Draw:
    """Random numbers of one case, from its seed alone."""

    def __init__(self, seed: int) -> None:
        self.host = torch.Generator().manual_seed(seed)
        self.device = torch.Generator(DEVICE).manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.host))

    def choice(self, *options: int | float | str) -> int | float | str:
        return options[self.integer(0, len(options) - 1)]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.host))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.device, device=DEVICE)


@dataclass
class Batch:
    """One case: sequences in a cache in which everything that is not theirs is NaN.

    query: [tokens, query_heads, head_size]; key, value: [B, N, kv_heads, head_size], what was
    appended, zeros past each sequence.
    """

    cache: PagedCache
    block_table: Tensor
    seq_lens: Tensor
    query_lens: list[int]
    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor | None
    scale: float


def lengths(draw: Draw, family: Family) -> list[int]:
    size, most = family.page_size, family.width * family.page_size
    chosen = []
    for _ in range(family.batch):
        if family.width > 1000 and draw.uniform(0, 1) < 0.7:
            chosen.append(draw.integer(most * 3 // 4, most))
        else:
            edge = draw.choice(0, 1, size - 1, size, size + 1, 2 * size, -1, -1, -1, -1)
            chosen.append(int(edge) if int(edge) >= 0 else draw.integer(2, min(most, 600)))
    return chosen


def keys_of(draw: Draw, family: Family, query: Tensor, n: int, scale: float) -> Tensor:
    """Keys [n, kv_heads, head_size] of one of several structures, made for a query of each head."""
    shape = n, family.kv_heads, family.head_size
    structure = draw.choice("normal", "normal", "equal", "clusters", "needle", "heavy", "comb")
    key = draw.normal(*shape)
    if structure == "normal" or n < 2:
        return key
    # Keys along the query have the scores that are asked for.
    along = query / (query.square().sum(-1, keepdim=True) * scale)
    score = torch.zeros(n, 1, 1, device=DEVICE)
    if structure == "equal":
        return key[:1].expand(shape).clone()
    if structure == "needle":
        key[draw.integer(0, n - 1)] += along * draw.uniform(2, 40)
        return key
    if structure == "heavy":
        return along * torch.exp(draw.normal(n, 1, 1) * draw.uniform(0.5, 3))
    if structure == "clusters":
        score[:: draw.integer(2, 9)] = 10 ** draw.uniform(-4, 0.5)
        score[draw.integer(0, n - 1)] += draw.uniform(0, 3)
    else:
        # High at evenly spaced positions, where a sample may be taken, and nowhere else.
        taken = torch.arange(2048, device=DEVICE) * (n - 1) // 2047
        score[taken] = 1.8 + 0.2 * torch.rand(2048, 1, 1, generator=draw.device, device=DEVICE)
    return along * score


def make_batch(family: Family, seed: int) -> tuple[Batch, Draw]:
    draw = Draw(seed)
    lens = lengths(draw, family)
    most = max(1, *lens)
    scale = family.head_size**-0.5
    query_lens = [draw.integer(0, n) for n in lens] if family.prefill else [1] * family.batch
    spread = 10 ** draw.uniform(-3, 1.7)
    last = draw.normal(family.batch, family.query_heads, family.head_size) * spread
    key = torch.zeros(family.batch, most, family.kv_heads, family.head_size, device=DEVICE)
    for b, n in enumerate(lens):
        first_of_group = last[b, :: family.group]
        key[b, :n] = keys_of(draw, family, first_of_group, n, scale)
    value = draw.normal(*key.shape)
    inside = torch.arange(most, device=DEVICE) < torch.tensor(lens, device=DEVICE)[:, None]
    # Keys along a short query can leave the range of fp16.
    most_stored = min(1e6, torch.finfo(family.dtype).max / 4)
    key, value = (
        x.masked_fill(~inside[..., None, None], 0).clamp(-most_stored, most_stored).to(family.dtype)
        for x in (key, value)
    )
    query = last
    if family.prefill:
        query = draw.normal(sum(query_lens), family.query_heads, family.head_size) * spread

    layout = PageLayout(family.page_size, family.head_size, family.selector.statistics)
    pages = family.batch * family.width + 1
    shape = pages, family.kv_heads, family.page_size, layout.elements_per_token
    raw = torch.full(shape, torch.nan, dtype=family.dtype, device=DEVICE)
    cache = split_pages(raw, layout)
    order = torch.randperm(pages - 1, generator=draw.device, device=DEVICE)
    table = order.view(family.batch, family.width).int()
    held = torch.tensor([-(-n // family.page_size) for n in lens], device=DEVICE)
    slots = table.long().repeat_interleave(family.page_size, 1) * family.page_size
    slots += torch.arange(slots.shape[1], device=DEVICE) % family.page_size
    append(
        cache,
        key[inside].contiguous(),
        value[inside].contiguous(),
        slots[:, :most][inside],
        implementation="triton",
    )
    # Entries past the last page name one that belongs to nobody.
    table[torch.arange(family.width, device=DEVICE) >= held[:, None]] = pages - 1
    slopes = draw.normal(family.query_heads).abs() * 0.1 if family.alibi else None
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    query = query.to(family.dtype)
    return Batch(cache, table, seq_lens, query_lens, query, key, value, slopes, scale), draw


def attention(
    batch: Batch, family: Family, b: int, query: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [m, query_heads, head_size] in fp64 of the last m positions of sequence b, and the
    error [m, query_heads, 1] that the precision of the kernels explains.

    allowed: [kv_heads, n] bool, keys that are read; None for all of them.

    A score z has an error of about two fp32 roundings of |q||k|; b K ** (1 / b) is the most that
    the weights of a support of K keys can change, in sum, with a change of z. Values and outputs
    are rounded to the dtype of the cache.
    """
    n, m = int(batch.seq_lens[b]), len(query)
    key, value = (
        x[b, :n].double().repeat_interleave(family.group, 1).transpose(0, 1)
        for x in (batch.key, batch.value)
    )
    q = query.double().transpose(0, 1)  # [H, m, D]
    scores = q @ key.mT * batch.scale  # [H, m, n]
    relative = torch.arange(n, device=DEVICE) - torch.arange(n - m, n, device=DEVICE)[:, None]
    if batch.slopes is not None:
        scores += batch.slopes.double()[:, None, None] * relative
    hidden = relative > 0
    if family.window is not None:
        hidden = hidden | (relative <= -family.window)
    scores.masked_fill_(hidden, -torch.inf)
    if allowed is not None:
        group = allowed.repeat_interleave(family.group, 0)[:, None]
        scores.masked_fill_(~group, -torch.inf)
    weights, change = torch.empty_like(scores), torch.empty_like(scores[..., :1])
    largest = scores.masked_fill(hidden, 0).nan_to_num(neginf=0).abs().amax(-1, keepdim=True)
    reach = q.norm(dim=-1, keepdim=True) * key.norm(dim=-1).amax(-1)[:, None, None] * batch.scale
    alphas = torch.tensor(family.alphas)
    for alpha in set(family.alphas):
        heads = (alphas == alpha).to(DEVICE)
        z = scores[heads] * score_factor(alpha)
        if alpha == 1:
            weights[heads] = z.softmax(-1)
            change[heads] = 1.0
        else:
            solve = entmax_threshold_sort if alpha in (1.5, 2) else entmax_threshold_bisect
            power = exponent(alpha)
            w = (z - solve(z, alpha)[..., None]).clamp_min(0) ** power
            weights[heads] = w / w.sum(-1, keepdim=True)
            support = (w > 0).sum(-1, keepdim=True).double()
            change[heads] = score_factor(alpha) * power * support ** (1 / power)
    out = (weights @ value).transpose(0, 1)
    fp32, own = torch.finfo(torch.float32).eps, torch.finfo(family.dtype).eps
    bound = 4 * own + 2 * fp32 * change * (1 + reach + largest)
    return out, (bound * value.abs().amax((1, 2))[:, None, None]).transpose(0, 1)
