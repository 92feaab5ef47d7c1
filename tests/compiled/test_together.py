"""Programs that work together, however many of them can run at once."""

import pytest
import torch
import triton
import triton.language as tl

from compiled.device import DEVICE
from entmaxkv_kernels.triton.together import WORDS, clear_words, join, meet


@triton.jit
def clear_kernel(p_words):
    clear_words(p_words)


@triton.jit
def sum_kernel(p_words, p_part, p_sum, p_done, SHARES: tl.constexpr):
    """Squares of the shares, and from all of them their sum, by every program that takes part."""
    number, together = join(p_words, tl.minimum(tl.num_programs(0), SHARES))
    if number < together:
        for i in range(number, SHARES, together):
            i_share = tl.full([], 0, tl.int32) + i
            tl.store(p_part + i_share, i_share * i_share)
        meet(p_words, 0, together)
        o_share = tl.arange(0, SHARES)
        tl.store(p_sum + number, tl.sum(tl.load(p_part + o_share), 0))
    tl.atomic_add(p_done, 1)


@pytest.mark.parametrize("programs", [1, 3, 131, 5001 if DEVICE == "cuda" else 257])
@pytest.mark.parametrize("shares", [1, 128])
def test_every_share_is_done_before_anyone_adds_them_up(programs, shares):
    words = torch.full((WORDS,), -7, dtype=torch.int32, device=DEVICE)
    part, total = (torch.full((128,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    done = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for _ in range(3):
        clear_kernel[(1,)](words)
        sum_kernel[(programs,)](words, part, total, done, SHARES=shares)
    together = words.tolist()[1]
    assert 1 <= together <= min(programs, shares)
    assert (total[:together] == sum(i * i for i in range(shares))).all()
    assert done.item() == 3 * programs
