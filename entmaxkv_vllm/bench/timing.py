"""Arms that take turns, as CUDA graphs or as calls, and the time of each kernel."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch

Step = Callable[[], Any]

GRAPH_STEPS = 8
"""Steps of a graph, at least: to launch one takes some microseconds, which are no step's."""


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


def alternate(
    arms: dict[str, Step],
    repeats: int,
    warm_up: int = 3,
    turned: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Microseconds of each arm, one value per call; calls take turns.

    By the GPU's clock where there is one, else by the host's. turned: called after each turn.
    """
    measure = _gpu_microseconds if torch.cuda.is_available() else _host_microseconds
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + warm_up):
        for name, step in arms.items():
            taken = measure(step)
            if repeat >= warm_up:
                times[name].append(taken)
        turned()
    return times


def _gpu_microseconds(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def _host_microseconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


def per_step(
    arms: dict[str, list[Step]],
    repeats: int,
    *,
    graphs: bool,
    eager: Collection[str] = (),
    calls: int = 1,
    warm_up: int = 3,
    turned: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Microseconds of one step of each arm, one value per turn.

    arms: the steps of each, as many as there are sets of pages; a turn takes all of them.
    graphs: whether a turn is one CUDA graph. Else, and of arms in `eager`, it is a row of calls.
    calls: how often a turn takes all steps, at least.
    """
    turns: dict[str, Step] = {}
    steps_of: dict[str, int] = {}
    for name, steps in arms.items():
        captured = graphs and name not in eager
        rounds = max(calls, -(-GRAPH_STEPS // len(steps)) if captured else 1)
        turns[name] = graph_of(steps * rounds).replay if captured else _row(steps * rounds)
        steps_of[name] = len(steps) * rounds
    times = alternate(turns, repeats, warm_up, turned)
    return {name: [us / steps_of[name] for us in taken] for name, taken in times.items()}


def _row(steps: list[Step]) -> Step:
    def turn() -> None:
        for step in steps:
            step()

    return turn


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
