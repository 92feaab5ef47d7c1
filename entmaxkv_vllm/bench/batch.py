"""Batches in the grammar of vLLM's attention benchmarks: `8q1s32k`, `q2k`, `2q1k_32q1s4k`."""

import re
from dataclasses import dataclass

_GROUP = re.compile(r"(?P<count>\d*)q(?P<query>\d+k?)(?:s(?P<tokens>\d+k?))?")


@dataclass(frozen=True)
class Request:
    """One sequence of a batch.

    query: new tokens, which attend; 1 decodes.
    tokens: tokens in the cache, the new ones included.
    """

    query: int
    tokens: int

    @property
    def decodes(self) -> bool:
        return self.query == 1


def parse_batch(text: str) -> tuple[Request, ...]:
    """The requests of a batch, those that decode first, as vLLM orders them.

    text: groups `[count]q<query>[s<tokens>]` with `_` between them; `k` means 1024. Without `s` the
        whole sequence is new.

    Raises ValueError for anything else, and for a query that is empty or longer than its sequence.
    """
    requests: list[Request] = []
    for group in text.split("_"):
        match = _GROUP.fullmatch(group)
        if match is None:
            raise ValueError(
                f"batch {text!r}: {group!r} is not [count]q<query>[s<tokens>]; "
                "write for example 8q1s32k (8 sequences decode at 32k tokens) or q2k (2k are new)"
            )
        query = _size(match["query"])
        tokens = _size(match["tokens"]) if match["tokens"] else query
        if not 1 <= query <= tokens:
            raise ValueError(
                f"batch {text!r}: {group!r} has {query} new of {tokens} tokens; "
                "expected at least 1 and no more than the sequence has"
            )
        requests += [Request(query, tokens)] * int(match["count"] or 1)
    if not requests:
        raise ValueError(f"batch {text!r} has no sequence; give a count of at least 1")
    return tuple(sorted(requests, key=lambda request: not request.decodes))


def _size(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)
