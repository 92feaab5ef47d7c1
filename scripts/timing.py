"""What the benchmarks share: arms that take turns, the time of each kernel, and what ran where."""

import datetime
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]


def graph_of(steps: list[Step]) -> torch.cuda.CUDAGraph:
    """One graph that runs every step once."""
    # What the steps read may still be on its way on another stream.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps:
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for step in steps:
                step()
    return graph


def alternate(arms: dict[str, Step], repeats: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Microseconds of each arm, one value per call; calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + warm_up):
        for name, step in arms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if repeat >= warm_up:
                times[name].append(start.elapsed_time(end) * 1e3)
    return times


def kernel_times(steps: list[Step]) -> dict[str, float]:
    """Microseconds of each kernel in one step, by name, the median over the steps.

    Launched one by one and without overlap, so that their sum is more than a graph's step where
    kernels overlap, and less where gaps between them count.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for step in steps:
            step()
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        found[event.name].append(event.device_time)
    return {
        name: statistics.median(times)
        for name, times in found.items()
        if len(times) == len(steps) and name.endswith("_kernel")
    }


def versions() -> dict[str, str]:
    import triton
    import vllm

    return {"torch": torch.__version__, "triton": triton.__version__, "vllm": vllm.__version__}


def checked_out() -> str:
    """The commit of this checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def about(commit: str | None) -> dict[str, Any]:
    """Which GPU, versions and commit a result belongs to, and its date.

    commit: for a copy of the code that is no checkout.
    """
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
        "commit": commit or checked_out(),
        "date": datetime.date.today().isoformat(),
    }
