"""Two bits of every channel of every key: page statistics that tell the keys of a page apart.

A page has the mean of its keys, in 8-bit numbers, and what is left of each key: rotated, so that
its channels are alike whatever the keys are, and rounded to one of four levels, -1.5, -0.5, 0.5 and
1.5 steps of the key's own. Scores of the rounded keys are nearly those of the keys; how far a key
lies off its rounded one at most bounds the difference, by the inequality of Cauchy and Schwarz.

Steps are such that the product of a key with its rounded one is that with itself, as in RaBitQ
(arXiv 2405.12497). The steps that leave the smallest errors would shorten keys by an eighth, and so
the scores of those that a query resembles, which are the ones that matter.

The rotation is a Hadamard matrix over groups of channels, signs and nothing else but for a factor.
What is left of a key is rounded to whole numbers of 16 bits first. So sums are of whole numbers,
exact in fp32 in whatever order, and compiled kernels find the same bits. Queries are rotated
likewise and rounded to 15 bits, and their products with levels are exact, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import LARGEST, RADIUS_WIDENED, SMALLEST, powers_of_two, rounded_mean

MOST_UNITS = 127
"""The steps of the keys of a page are so many units at most."""

STEP_OF_MEAN = 1.248
"""What separates small levels from large ones, in means of the magnitudes: best for normal
numbers."""

SHORTENED = 0.875
"""Rounded keys that are so much shorter lie nearest to the keys: bounds are by them."""

SPREADS = 4
"""A page's largest step is so many spreads, which are about what rounding moves scores by."""

ERROR_STEPS = 2.0**12
"""Parts of 1 in which the squares of errors, in steps, are added up: their sum is exact in fp32,
because no error is longer than its rounded key, of at most 1.5 steps in 256 channels."""


class Codes(NamedTuple):
    """What pages [...] hold of their keys.

    center: [..., head_size] whole numbers within 127
    levels: [..., page_size, head_size] whole numbers from 0 to 3
    units: [..., page_size] whole numbers from 1 to 127, what each key's step is
    scales: [..., 3] fp32, of the centers, of `span` units, and the radius: how far keys lie off the
        rounded ones, shortened, at most, in spreads, as a Euclidean norm
    """

    center: Tensor
    levels: Tensor
    units: Tensor
    scales: Tensor

    def packed(self) -> Tensor:
        """But for the scales, as a page holds them, [..., 1, bytes] int8.

        Four channels side by side are a byte, the first in its lowest bits.
        """
        four = self.levels.to(torch.uint8).unflatten(-1, (-1, 4))
        byte = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
        parts = self.center, byte.view(torch.int8).flatten(-2), self.units
        return torch.cat([part.to(torch.int8) for part in parts], -1)[..., None, :]


def unpack(statistics: Tensor, scales: Tensor, page_size: int, dtype: torch.dtype) -> Codes:
    """Codes of that dtype, of pages that hold statistics [..., 1, bytes] and scales [..., 3]."""
    head_size = (statistics.shape[-1] - page_size) * 4 // (page_size + 4)
    sizes = head_size, page_size * head_size // 4, page_size
    center, byte, units = statistics[..., 0, :].split(sizes, -1)
    byte = byte.view(torch.uint8).unflatten(-1, (page_size, -1))
    levels = torch.stack([byte >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    return Codes(*(x.to(dtype) for x in (center, levels, units, scales)))


def block_size(head_size: int) -> int:
    """Channels that are rotated together: the largest power of two that divides their number."""
    return head_size & -head_size


def span(head_size: int) -> int:
    """Units that are kept as one number, a power of two: in what is left of a key, unrotated, no
    channel is larger than 127 times that, which is above `span` steps.

    A channel is at most the sum of the magnitudes of its block, times block_size ** -0.5, and they
    are at most 1.5 steps in the mean.
    """
    # Compiled kernels call this, which must not call another function then.
    block, power = head_size & -head_size, 1
    while power < 1.5 * head_size * block**-0.5:
        power *= 2
    return power


def rotation(head_size: int, like: Tensor) -> Tensor:
    """Signs [head_size, head_size], symmetric, and 0 between blocks; with the factor
    block_size ** -0.5 a rotation, which is its own inverse."""
    channel, block = torch.arange(head_size, device=like.device), block_size(head_size)
    common = channel[:, None] & channel & (block - 1)
    signs = torch.ones_like(common)
    for bit in range(block.bit_length() - 1):
        signs *= 1 - 2 * (common >> bit & 1)
    return (signs * (channel[:, None] // block == channel // block)).to(like.dtype)


def turn(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., head_size], of no channel larger than `largest`, rotated, but for the factor,
    as whole numbers of 16 bits, and what one is."""
    exponent = largest.clamp_min(SMALLEST).float().view(torch.int32) >> 23
    more, least = powers_of_two(268 - exponent, exponent - 14, x.dtype)
    return (x * more + 0.5).floor() @ rotation(x.shape[-1], x), least


def codes_of(key: Tensor, valid: Tensor) -> Codes:
    """Of the keys [..., rows, head_size] that are valid [..., rows, 1]; others count as the mean.

    A NaN counts as 0 in the mean, and then as the mean. The radius is infinite if a key is beyond
    LARGEST or no number.
    """
    head_size, dtype = key.shape[-1], key.dtype
    finite = ((key.abs() <= LARGEST) | ~valid).flatten(-2).all(-1, keepdim=True)
    number = valid & ~key.isnan()
    key = key.clamp(-LARGEST, LARGEST).masked_fill(~number, 0)
    count = valid.sum(-2).to(dtype)
    center, center_scale = rounded_mean(key, count, key.abs().amax(-2))
    rest = (key - (center * center_scale)[..., None, :]).masked_fill(~number, 0)
    turned, least = turn(rest, rest.abs().amax((-2, -1), keepdim=True))

    # Once more as whole numbers, of 8 bits of each key's largest: sums of squares are exact, too.
    size = turned.abs()
    exponent = size.amax(-1, keepdim=True).clamp_min(1).float().view(torch.int32) >> 23
    more, less = powers_of_two(261 - exponent, exponent - 7, dtype)
    whole = (size * more + 0.5).floor()
    large = whole >= whole.sum(-1, keepdim=True) * (STEP_OF_MEAN / head_size)
    magnitude = torch.where(large, 1.5, 0.5).to(dtype)
    square, product = (whole * x for x in (whole, magnitude))
    step = (square.sum(-1) / product.sum(-1).clamp_min(0.5)) * less[..., 0]
    most = step.amax(-1, keepdim=True)
    some = most > 0
    units = (step + most * 2.0**-8) * (MOST_UNITS * (1 / torch.where(some, most, 1)))
    units = units.floor().clamp(1, MOST_UNITS)
    # Of 12 significant bits: its products with units and levels, shortened, are exact.
    unit = ((most * (1 / MOST_UNITS)).float().view(torch.int32) & -0x1000).view(torch.float32)
    unit = torch.where(some, unit.to(dtype), 1)

    furthest = _furthest(size, magnitude, (units * unit)[..., None])
    radius = furthest + 2.0 ** slack(head_size) * (MOST_UNITS * unit) + head_size
    radius = radius * RADIUS_WIDENED / (unit * (MOST_UNITS / SPREADS))
    radius = torch.where(finite, radius, torch.inf)
    second = unit * least[..., 0] * (span(head_size) * block_size(head_size) ** -0.5)
    levels = torch.where(turned >= 0, 1.5 + magnitude, 1.5 - magnitude)
    return Codes(center, levels, units, torch.cat((center_scale, second, radius), -1).float())


def _furthest(size: Tensor, magnitude: Tensor, step: Tensor) -> Tensor:
    """Largest norm of how far keys [..., rows, head_size] lie off the rounded ones, shortened,
    [..., 1]."""
    error = (size - magnitude * SHORTENED * step).abs() * (1 / step)
    parts = (error * error * ERROR_STEPS).ceil().sum(-1, keepdim=True)
    # A CPU's roots in fp32 are not always the nearest numbers, which those of compiled kernels are.
    norm = parts.double().sqrt().to(step.dtype) * (ERROR_STEPS**-0.5) * step
    return norm.amax(-2)


def slack(head_size: int) -> int:
    """Exponent of what the radius has more, in a page's largest step: what queries lose when they
    are rounded. That is head_size ** 0.5 / 2 ** 13 of their length, and rounded keys are at most
    1.5 * head_size ** 0.5 steps long.

    What is left of keys, too, was rounded to whole numbers, by head_size of them in all at most.
    """
    return (3 * head_size // 2 - 1).bit_length() - 13


def turn_queries(query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [..., head_size] rotated, as whole numbers of 15 bits, and what one is, [..., 1]."""
    turned, least = turn(query, query.abs().amax(-1, keepdim=True))
    exponent = turned.abs().amax(-1, keepdim=True).clamp_min(1).float().view(torch.int32) >> 23
    more, less = powers_of_two(267 - exponent, exponent - 13, query.dtype)
    factor = less * (block_size(query.shape[-1]) ** -0.5)
    return (turned * more + 0.5).floor(), least * factor
