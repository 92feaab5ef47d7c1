"""Boxes of 8-bit numbers around the keys of a page."""

import torch
from torch import Tensor

LARGEST = 2.0**126
"""Keys beyond it, as infinite ones are, count as this in a box: its arithmetic stays finite."""

SMALLEST = 2.0**-100
"""Keys far below it count as 0 in a mean, whose factors are normal numbers then."""

WIDENED = 1 + 2.0**-20
"""A half-width is made so much wider, more than fp32 rounding can make it too narrow."""

SQUARE_STEPS = 2.0**14
"""Parts of 1, in which squares are added up, so that the sum is exact in whatever order."""

MOST_STEPS = 2.0**24
"""Up to which it is, in fp32; keys of more steps, as infinite ones, are not within their box."""

RADIUS_WIDENED = 1 + 2.0**-8
"""A radius is made so much larger, twice as much as squares rounded to bf16 can make the norm that
it is multiplied by too small."""


def box_around(key: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of 8-bit numbers around the means of keys [..., rows, head_size] that hold them.

    valid: [..., rows, 1] bool, the keys that count; a NaN counts as 0 in a mean, and nowhere else.

    Returns centers and half-widths, integers [..., 2, head_size], and the scales of both and the
    radius, fp32 [..., 3]. Every key lies within half-width times scale of center times scale,
    exactly. A channel without a number has the box that holds 0 alone.
    """
    given, counted = key, valid
    count = valid.sum(-2).to(key.dtype)
    valid = valid & ~key.isnan()
    key = key.clamp(-LARGEST, LARGEST)
    low = key.masked_fill(~valid, torch.inf).amin(-2)
    high = key.masked_fill(~valid, -torch.inf).amax(-2)
    largest = torch.maximum(low.abs(), high.abs())
    center, center_scale = rounded_mean(key.masked_fill(~valid, 0), count, largest)
    middle = center * center_scale
    reach = torch.maximum(high - middle, middle - low).clamp_min(0) * WIDENED
    half_scale = _scale_of(reach)
    # A small quotient may vanish.
    half_width = torch.maximum((reach / half_scale).ceil(), (reach > 0).to(reach.dtype))
    radius = _radius(given, counted, middle, half_width * half_scale)
    scales = torch.cat((center_scale, half_scale, radius), -1).float()
    return torch.stack((center, half_width), -2), scales


def _radius(key: Tensor, valid: Tensor, center: Tensor, half_width: Tensor) -> Tensor:
    """How far the valid keys [..., rows, head_size] lie off the center [..., head_size] at most,
    [..., 1], in half-widths, as a Euclidean norm; infinite if one of them is not finite.

    Rounded up, and by RADIUS_WIDENED.
    """
    # Where a half-width is 0, keys that are numbers are at the center.
    narrow = 1 / torch.where(half_width > 0, half_width, 1)
    away = (key - center[..., None, :]) * narrow[..., None, :]
    steps = (away * away * SQUARE_STEPS).ceil().sum(-1)
    steps = torch.where(steps <= MOST_STEPS, steps, torch.inf)
    furthest = steps.masked_fill(~valid[..., 0], 0).amax(-1, keepdim=True)
    # A CPU's roots in fp32 are not always the nearest numbers, which those of compiled kernels are.
    return furthest.double().sqrt().to(key.dtype) * (RADIUS_WIDENED * SQUARE_STEPS**-0.5)


def rounded_mean(key: Tensor, count: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The mean as 8-bit whole numbers [..., head_size], and what they are multiplied by, [..., 1];
    arguments as in `_mean`."""
    mean = _mean(key, count, largest)
    scale = _scale_of(mean)
    return (mean / scale + 0.5).floor(), scale


def _mean(key: Tensor, count: Tensor, largest: Tensor) -> Tensor:
    """Mean [..., head_size] of count of the keys [..., rows, head_size], to 16 bits of the largest;
    the others are 0.

    They are rounded to whole numbers of at most 2 ** 16 first, so that the sum of up to 2 ** 8 of
    them is exact in fp32, in whatever order they are added up.
    """
    exponent = largest.clamp(SMALLEST, LARGEST).float().view(torch.int32) >> 23
    more, less = powers_of_two(269 - exponent, exponent - 15, key.dtype)
    total = (key * more[..., None, :] + 0.5).floor().sum(-2)
    return total * (1 / count) * less


def powers_of_two(one: Tensor, other: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A power of two and its reciprocal, of these exponents as fp32 holds them."""
    more, less = ((x << 23).view(torch.float32).to(dtype) for x in (one, other))
    return more, less


def _scale_of(x: Tensor) -> Tensor:
    """What x [..., head_size] is to be divided by for all to be within 127, [..., 1].

    It is above the least such number, has 17 significant bits, so that its products with 8-bit
    integers are exact in fp32, and is never 0.
    """
    least = (x.abs().amax(-1, keepdim=True) * (1 / 127)).float()
    return ((least.view(torch.int32) + 0x100) & -0x80).view(torch.float32).to(x.dtype)
