"""What a decode step tells about itself: running counters, and a full comparison with exact."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Counter(IntEnum):
    """Positions in the int64 tensor that `append` and `decode` add to.

    A sequence of length 0 (a padding row) counts nowhere.
    """

    STEPS = 0
    """Sequences decoded: one per sequence and call, so sequences x layers in one model step."""

    SPARSE_STEPS = 1
    """Those of STEPS in which a sparse selector chose the pages."""

    PAGES_HELD = 2
    """Pages a dense read would touch, per KV head; under a sliding window those inside it."""

    PAGES_READ = 3
    """Pages whose keys were read, per KV head. Equal to PAGES_HELD in an exact step."""

    SUPPORT = 4
    """Tokens with a weight above zero, summed over query heads."""

    QUERY_HEADS = 5
    """Query heads that SUPPORT was summed over: SUPPORT / QUERY_HEADS is the mean support."""

    FALLBACKS = 6
    """Query heads whose keys were all read once more, because a guess was too high or lists were
    too short; the reference makes no guess."""

    APPENDED_PAGES = 7
    """Pages that `append` wrote to, per KV head: each once for every call that did."""

    CERTIFIED = 8
    """Query heads whose certificate is 0: their output is the exact one. This and the following
    count by the size of the certificate, where one is asked for."""

    BOUND_TO_1E_4 = 9
    """Query heads whose certificate is above 0 and at most 1e-4."""

    BOUND_TO_1E_3 = 10
    BOUND_TO_1E_2 = 11
    BOUND_TO_1E_1 = 12

    BOUND_BELOW_1 = 13
    """Those whose certificate is above 0.1 and below 1."""

    VACUOUS = 14
    """Those whose certificate is 1, which says nothing."""


BOUND_LIMITS = (1e-4, 1e-3, 1e-2, 1e-1)
"""The largest certificates that count as BOUND_TO_1E_4 and so on."""


@dataclass(frozen=True)
class DecodeReport:
    """How one decode step under a selector compares with the exact one.

    Per sequence and query head; 0 in rows of sequences of length 0.

    tau: [B, query_heads] threshold of the exact weights, in units of (alpha - 1) * score; for
        alpha = 1 the logarithm of the softmax denominator.
    selected: [B, kv_heads, P] bool, pages read, by position in the sequence; P is the number of
        pages of the longest sequence.
    dropped_mass: [B, query_heads] exact weight on tokens of unselected pages, in [0, 1].
    dropped_bound: [B, query_heads] what `dropped_mass` is at most, in [0, 1], by the statistics
        and what was read; 0 proves that nothing was dropped. None for a selector whose statistics
        bound nothing.
    support_recall: [B, query_heads] share of the exact support that lies in selected pages.
    output_error: [B, query_heads] norm of the difference between the selected and the exact
        output, divided by the norm of the exact output.
    """

    tau: Tensor
    selected: Tensor
    dropped_mass: Tensor
    dropped_bound: Tensor | None
    support_recall: Tensor
    output_error: Tensor
