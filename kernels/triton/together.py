"""How programs of one launch work together without waiting for any that may not have been started.

They come, and the first one waits for others for a while; those that have come by then are the ones
that work together, and can wait for each other, as all of them run.
"""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

# How often the first program looks whether others have come, each time for some 0.7 us.
LOOKS = tl.constexpr(64)
# What is added to the number of those that have come when it is too late to come.
CLOSED = tl.constexpr(1 << 20)

WORDS = tl.constexpr(4)
# How many programs have come, how many of them work together, how often one has come to a meeting,
# and whether there is any work.
COME, TOGETHER, MET, WANTED = map(tl.constexpr, range(WORDS.value))


@triton.jit
def clear_words(p_words):
    """What an earlier launch does."""
    tl.store(p_words + tl.arange(0, WORDS), tl.zeros([WORDS], tl.int32))


@triton.jit
def join(p_words, most):
    """The number of this program, and how many work together: at most `most`. A program that has
    no smaller number is not one of them."""
    number = tl.atomic_add(p_words + COME, 1, sem="acq_rel")
    together = tl.full([], 0, tl.int32)
    if number == 0:
        come, looks = together + 1, together
        while (come < most) & (looks < LOOKS):
            come = tl.atomic_add(p_words + COME, 0, sem="acq_rel")
            looks += 1
        come = tl.atomic_add(p_words + COME, CLOSED, sem="acq_rel")
        together = tl.minimum(come, most)
        tl.atomic_add(p_words + TOGETHER, together, sem="acq_rel")
    elif number < most:
        while together == 0:
            together = tl.atomic_add(p_words + TOGETHER, 0, sem="acq_rel")
    return number, together


@triton.jit
def meet(p_words, meetings, together):
    """Waits until all of those that work together have come here, and counts the meetings."""
    tl.debug_barrier()
    come = tl.atomic_add(p_words + MET, 1, sem="acq_rel") + 1
    while come < (meetings + 1) * together:
        come = tl.atomic_add(p_words + MET, 0, sem="acq_rel")
    tl.debug_barrier()
    return meetings + 1
