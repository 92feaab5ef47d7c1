"""matplotlib, if it is there, set up so that the same result gives the same file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLORS = {
    "exact": "#1f6f8b",
    "topk": "#c8553d",
    "topk-codes": "#e39b3b",
    "gaussian": "#7b9e42",
    "entmax": "#1f6f8b",
    "adaptive": "#8a4f9e",
    "adaptive-codes": "#d05fa2",
    "fixed reach": "#c9a6d6",
    "adaptive by reach": "#c9a6d6",
    "gaussian-paper": "#2f4b1c",
    "fa3": "#555555",
    "triton_attn": "#a08cc0",
    "sdpa": "#b0a070",
    "flashinfer": "#d0a020",
}
NAMES = {
    "fa3": "FlashAttention-3",
    "triton_attn": "TRITON_ATTN",
    "sdpa": "PyTorch SDPA",
    "flashinfer": "FlashInfer",
}
"""Of peers, as people know them."""
SETTINGS = {
    # Element ids are hashes; with a salt they are the same in every run.
    "svg.hashsalt": "entmaxkv",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


class MissingMatplotlib(RuntimeError):
    """matplotlib is not installed; the message says how to."""


def pyplot() -> Any:
    """matplotlib.pyplot with these settings, without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingMatplotlib(
            "matplotlib is not installed; run pip install 'matplotlib>=3.8', or install this "
            "package with its extra: pip install '.[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcdefaults()
    pyplot.rcParams.update(SETTINGS)
    return pyplot


def finish(figure: Any, title: str, caption: str) -> None:
    """Say above what is drawn, and below of what, where and when."""
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.08 / height, title, ha="left", va="top", weight="bold", size=11)
    place = {"x": 0.01, "y": 0.06 / height, "ha": "left", "va": "bottom"}
    figure.text(s=caption, fontsize=7, color="#555555", **place)
    below = 0.12 + 0.13 * (1 + caption.count("\n"))
    figure.tight_layout(rect=(0, below / height, 1, 1 - 0.3 / height))


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot().close(figure)


def thousands(tokens: float) -> str:
    """8192: `8k`; 1048576: `1M`."""
    if tokens < 1024:
        return f"{tokens:g}"
    return f"{tokens / 1024:g}k" if tokens < 1 << 20 else f"{tokens / (1 << 20):g}M"


def contexts_below(axis: Any, contexts: list[int]) -> None:
    """A logarithmic axis with a mark at each context."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [thousands(context) for context in contexts])
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")


def provenance(result: Mapping[str, Any]) -> str:
    """Where and when a result was measured, and by which commit."""
    # A CPU's results may name it beside, or instead of, a GPU that is not there.
    machine = result.get("gpu") or f"CPU ({result.get('cpu', 'unknown')})"
    commit = f", commit {result['commit'][:12]}" if result.get("commit") else ""
    note = f"\n{result['note']}" if result.get("note") else ""
    return f"{machine}{commit}, {result.get('date', 'no date')}{note}"
