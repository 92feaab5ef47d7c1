"""Which pictures a result file has, and writing them."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from entmaxkv_vllm.plots.canvas import MissingMatplotlib, save
from entmaxkv_vllm.plots.dashboard import panels
from entmaxkv_vllm.plots.decode import bytes_read, latency, step_time
from entmaxkv_vllm.plots.fidelity import dropped_mass

PICTURES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "latency": latency,
    "step": step_time,
    "bytes": bytes_read,
    "dropped-mass": dropped_mass,
    "panels": panels,
}
"""Figures by the end of their file's name; None where a result has nothing to draw."""


def draw(files: Sequence[Path], folder: Path) -> list[Path]:
    """Write `RESULT-PICTURE.svg` for every picture that the results have.

    Raises ValueError for a file that is no JSON object, and MissingMatplotlib.
    """
    written = []
    for file in files:
        try:
            result = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is no result file: {error}") from error
        if not isinstance(result, dict):
            raise ValueError(f"{file} is no result file: its JSON is not an object")
        for name, picture in PICTURES.items():
            figure = picture(result)
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                written.append(folder / f"{file.stem}-{name}.svg")
                save(figure, written[-1])
    return written


def command(files: Sequence[Path], folder: Path) -> int:
    """The subcommand: 0 if there was something to draw."""
    try:
        written = draw(files, folder)
    except (ValueError, MissingMatplotlib) as error:
        print(f"entmaxkv plot: {error}", file=sys.stderr)
        return 2
    if not written:
        print(
            "entmaxkv plot: nothing to draw; give results of `entmaxkv bench kernels`, "
            "scripts/benchmark_decode.py or a fidelity measurement",
            file=sys.stderr,
        )
        return 1
    print(*written, sep="\n")
    return 0
