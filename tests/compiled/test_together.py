"""Programs that work together, however many of them can run at once."""

import pytest
import torch
import triton
import triton.language as tl

from entmaxkv_kernels.triton.together import WORDS, clear_words, join, meet

from .device import DEVICE


@triton.jit
def clear_kernel(p_words):
    clear_words(p_words)


@triton.jit
def sum_kernel(p_words, p_part, p_sum, p_done, SHARES: tl.constexpr, MOST: tl.constexpr):
    """Squares of the shares, and from all of them their sum, by every program that takes part;
    then the same with numbers that are one more."""
    number, together = join(p_words, tl.minimum(tl.num_programs(0), SHARES))
    if number < together:
        meetings = tl.full([], 0, tl.int32)
        for more in tl.static_range(2):
            for i in range(number, SHARES, together):
                i_share = tl.full([], 0, tl.int32) + i
                tl.store(p_part + i_share, i_share * i_share + more)
            meetings = meet(p_words, meetings, together)
            o_share = tl.arange(0, SHARES)
            tl.store(p_sum + more * MOST + number, tl.sum(tl.load(p_part + o_share), 0))
            meetings = meet(p_words, meetings, together)
    tl.atomic_add(p_done, 1)


@pytest.mark.parametrize("programs", [1, 3, 131, 5001 if DEVICE == "cuda" else 257])
@pytest.mark.parametrize("shares", [1, 128])
def test_every_share_is_done_before_anyone_adds_them_up(programs, shares):
    words = torch.full((WORDS.value,), -7, dtype=torch.int32, device=DEVICE)
    done = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    squares = sum(i * i for i in range(shares))
    for _ in range(3):
        part = torch.full((shares,), -1, dtype=torch.int32, device=DEVICE)
        total = torch.full((2, 128), -1, dtype=torch.int32, device=DEVICE)
        clear_kernel[(1,)](words)
        sum_kernel[(programs,)](words, part, total, done, SHARES=shares, MOST=128)
        together = words.tolist()[1]
        assert 1 <= together <= min(programs, shares)
        assert (total[0, :together] == squares).all()
        assert (total[1, :together] == squares + shares).all()
        assert (total[:, together:] == -1).all()
    assert done.item() == 3 * programs
