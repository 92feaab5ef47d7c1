"""Selectors by name with their settings, as the command line takes them."""

from collections.abc import Callable, Iterable
from functools import partial

from entmaxkv_kernels import Adaptive, Exact, Gaussian, Selector, TopK

KINDS: dict[str, tuple[Callable[..., Selector], str]] = {
    "exact": (Exact, ""),
    "gaussian": (Gaussian, ""),
    "gaussian-paper": (partial(Gaussian, shared_spread=True), ""),
    "topk": (TopK, "token_budget"),
    "adaptive": (Adaptive, "reach"),
    "pruned": (partial(Exact, prune=True), ""),
    "topk-codes": (partial(TopK, codes=True), "token_budget"),
    "adaptive-codes": (partial(Adaptive, codes=True), "margin"),
    "pruned-codes": (partial(Exact, prune=True, codes=True), ""),
}
"""What makes the selector of a name, and the setting that needs no name."""

EXAMPLES = (
    "exact, pruned, gaussian, gaussian-paper, topk:1024, adaptive, adaptive:1.75, "
    "adaptive:margin=1,guard=0, or topk-codes, adaptive-codes or pruned-codes"
)


def page_statistics(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The sets of page statistics that selectors of these names read, one at least."""
    read = dict.fromkeys(parse_selector(name).statistics for name in names)
    return tuple(statistics for statistics in read if statistics) or ((),)


def parse_selector(text: str) -> Selector:
    """`NAME` or `NAME:SETTINGS`, such as `topk:1024` or `gaussian:quantile=0.9,safety=0.1`.

    Settings are those of the classes in `entmaxkv_kernels`; that of a budget needs no name.

    Raises ValueError for a name, a setting or a value that there is not.
    """
    name, _, rest = text.partition(":")
    try:
        make, first = KINDS[name]
        settings = {}
        for setting in filter(None, rest.split(",")):
            key, equals, value = setting.rpartition("=")
            settings[key if equals else first] = int(value) if value.isdigit() else float(value)
        return make(**settings)
    except (KeyError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise ValueError(f"selector is {text!r}{reason}; expected {EXAMPLES}") from error
