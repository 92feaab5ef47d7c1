"""Run random cases of the compiled kernels against fp64; on a GPU, by several processes.

A case is one call on one batch. Cases come in groups, which share pages; one is given by the name
of its family and its index, and its group runs again with `--replay FAMILY INDEX`.
"""

import argparse
import collections
import datetime
import json
import multiprocessing
import queue
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from fuzz_cases import Refused
from fuzz_families import DEVICE, FAMILIES
from fuzz_groups import NUMBERS, run_group

from entmaxkv_vllm.bench.provenance import checked_out

GRACE = 60
"""Seconds after the deadline in which the group that a worker has begun must end."""

MOST_OTHER_PAGES = 0.01
"""Share of the rows of a family in which rounding may choose other pages than the reference."""


def groups_of(cases: int) -> list[tuple[str, int]]:
    """Groups with that many cases, in an order in which all families advance together."""
    # Triton's interpreter rounds to fp8 wrongly.
    families = {name: f for name, f in FAMILIES.items() if DEVICE == "cuda" or not f.fp8}
    total = sum(family.weight for family in families.values())
    turns = []
    for name, family in families.items():
        groups = -(-cases * family.weight // (total * family.calls))
        turns += [((index + 0.5) / groups, name, index) for index in range(groups)]
    return [(name, index) for _, name, index in sorted(turns)]


def work(worker: int, groups: list[tuple[str, int]], deadline: float, results: Any) -> None:
    """Run the groups until the deadline, and put what they tell, then the worker's number."""
    refused = set()
    for name, index in groups:
        if time.time() > deadline:
            break
        if name in refused:
            continue
        try:
            results.put((name, index, run_group(name, index), ""))
        except Refused as error:
            refused.add(name)
            results.put((name, index, None, str(error)))
        except Exception:
            results.put((name, index, [], traceback.format_exc()))
            if DEVICE == "cuda" and not usable():
                break
    results.put(worker)


def usable() -> bool:
    """Whether the device still answers this process: after a failed assertion it does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def failures_of(name: str, index: int, told: list[dict[str, float]], trace: str) -> list[str]:
    calls = FAMILIES[name].calls
    failures = []
    if trace:
        failures.append(f"{name!r} {index * calls} to {(index + 1) * calls - 1}: {trace}")
    for k, numbers in enumerate(told):
        problems = [key for key, up in numbers.items() if key not in NUMBERS and up]
        if not numbers["error"] <= 1:
            problems.append(f"error {numbers['error']:.3g} of what is allowed")
        if problems:
            failures.append(f"{name!r} {index * calls + k}: {', '.join(problems)}")
    return failures


class Tally:
    """What the cases have told so far."""

    def __init__(self) -> None:
        self.start = time.time()
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.worst: dict[str, float] = collections.defaultdict(float)
        self.skipped: dict[str, str] = {}
        self.failures: list[str] = []

    def add(self, name: str, index: int, told: list[dict[str, float]] | None, text: str) -> None:
        if told is None:
            self.skipped[name] = text
            return
        before = self.cases // 5000
        for numbers in told:
            self.counts[name]["cases"] += 1
            for key in ("fallback", "pages_differ"):
                self.counts[name][key] += numbers.get(key, 0)  # type: ignore[assignment]
            self.worst[name] = max(self.worst[name], numbers["error"])
        self.fail(*failures_of(name, index, told, text))
        if self.cases // 5000 > before:
            print(
                f"{self.cases} cases, {len(self.failures)} failed, {self.seconds:.0f} s", flush=True
            )

    def fail(self, *failures: str) -> None:
        for failure in failures:
            self.failures.append(failure)
            if len(self.failures) <= 50:
                print("FAILED", failure, flush=True)

    @property
    def cases(self) -> int:
        return sum(count["cases"] for count in self.counts.values())

    @property
    def seconds(self) -> float:
        return time.time() - self.start

    def result(self) -> dict[str, Any]:
        families = {}
        for name in FAMILIES:
            if not (count := self.counts[name])["cases"]:
                continue
            share = count["pages_differ"] / count["cases"]
            if share > MOST_OTHER_PAGES:
                self.fail(f"{name!r}: {share:.1%} of the rows read other pages than the reference")
            families[name] = {
                "cases": count["cases"],
                "cases_with_fallback": int(count["fallback"]),
                "worst_error": self.worst[name],
                "rows_with_other_pages": share,
            }
        return {
            "seconds": round(self.seconds, 1),
            "cases": self.cases,
            "failures": len(self.failures),
            "families": families,
            "skipped": self.skipped,
        }


def gather(workers: int, cases: int, seconds: float) -> Tally:
    """Run the cases, as many as the time allows, and add up what they tell."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    tally, deadline, groups = Tally(), time.time() + seconds, groups_of(cases)
    processes = {
        w: context.Process(target=work, args=(w, groups[w::workers], deadline, results))
        for w in range(workers)
    }
    for process in processes.values():
        process.start()
    while processes:
        try:
            result = results.get(timeout=5)
        except queue.Empty:
            late = time.time() > deadline + GRACE
            for w, process in list(processes.items()):
                if late or not process.is_alive():
                    tally.fail(f"worker {w} {'does not end' if late else 'has died'}")
                    process.kill()
                    del processes[w]
            continue
        if isinstance(result, int):
            del processes[result]
        else:
            tally.add(*result)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    parser.add_argument("--workers", type=int, default=8 if DEVICE == "cuda" else 1)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--replay", nargs=2, metavar=("FAMILY", "INDEX"))
    arguments = parser.parse_args()
    if arguments.replay:
        name, index = arguments.replay[0], int(arguments.replay[1])
        group, k = divmod(index, FAMILIES[name].calls)
        told = run_group(name, group, careful=True)
        print(told[k])
        sys.exit(bool(failures_of(name, group, told, "")))
    tally = gather(arguments.workers, arguments.cases, arguments.seconds)
    result = tally.result()
    about = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "versions": {"torch": torch.__version__, "triton": sys.modules["triton"].__version__},
        "commit": arguments.commit or checked_out(),
        "date": datetime.date.today().isoformat(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(about | result, indent=1) + "\n")
    for name, reason in tally.skipped.items():
        print(f"skipped {name!r}: {reason}")
    print(f"{tally.cases} cases, {len(tally.failures)} failures, {tally.seconds:.0f} s")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
