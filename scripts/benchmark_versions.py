"""Time decode by several versions of the kernels in one process on one GPU, in turns.

One process and one chip tell more than tables of different runs. All versions read the same pages,
as CUDA graphs over sets of them that exceed the L2 cache. A version is a checkout, or a copy of
one, whose folder `kernels` is loaded beside the others.

    git worktree add /tmp/before HEAD~1
    python scripts/benchmark_versions.py --out sweep.json before=/tmp/before now=.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from entmaxkv_vllm.bench.arms import EntmaxArm
from entmaxkv_vllm.bench.batch import Request
from entmaxkv_vllm.bench.options import DATA
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.timing import kernel_times, per_step
from entmaxkv_vllm.bench.workload import Pool, Shape, Workload

POOL_TOKENS = 1 << 20
SUPPORT = 0.005
ARMS = ("topk", "topk, certified", "exact")


def load_kernels(name: str, checkout: Path) -> ModuleType:
    """The package of a checkout's folder `kernels`, under a name of its own.

    Raises:
        argparse.ArgumentTypeError: if there is none.
    """
    folder = checkout / "kernels"
    if not (folder / "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"{folder} of {name} is no package: give a checkout")
    own = f"kernels_of_{name}"
    spec = importlib.util.spec_from_file_location(
        own, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Version:
    """One version of the kernels."""

    name: str
    kernels: ModuleType

    def arm(self, name: str, work: Workload, share: float, appends: bool = False) -> EntmaxArm:
        """Its steps over a workload, by the name of an arm; see `EntmaxArm`."""
        tokens = max(work.shape.page_size, int(share * work.longest))
        selector = self.kernels.Exact() if name == "exact" else self.kernels.TopK(tokens)
        return EntmaxArm(work, selector, name.endswith("certified"), self.kernels, appends)

    def compile_ahead(self) -> contextlib.AbstractContextManager[None]:
        """Within, steps write nothing; what they would launch is compiled, several at a time."""
        launch = importlib.import_module(f"{self.kernels.__name__}.triton.launch")
        return launch.compile_ahead()


def measure(
    versions: list[Version],
    work: Workload,
    arms: list[str],
    share: float,
    repeats: int,
    appends: bool = False,
) -> list[dict[str, Any]]:
    """A row for each arm and version; `ratio` is the first version's time over this one's, and
    `difference` the largest of an output from the first version's.

    Raises:
        RuntimeError: if a sparse arm read everything, or nothing sparsely.
    """
    graphs = work.shape.device == "cuda"
    made = {
        (arm, version.name): version.arm(arm, work, share, appends)
        for arm in arms
        for version in versions
    }
    steps = {f"{arm} {name}": each.steps for (arm, name), each in made.items()}
    times = per_step(steps, repeats, graphs=graphs)
    rows = []
    for arm in arms:
        first = versions[0].name
        for version in versions:
            us = times[f"{arm} {version.name}"]
            own = made[arm, version.name]
            if arm != "exact" and (complaint := own.complaint()):
                raise RuntimeError(f"{arm} of {version.name}: {complaint}")
            row = {
                "context": work.longest,
                "selector": arm,
                "kernels": version.name,
                "us": statistics.median(us),
                "us_spread": max(us) - min(us),
                "ratio": statistics.median(times[f"{arm} {first}"]) / statistics.median(us),
                "difference": (own.outs.float() - made[arm, first].outs.float()).abs().max().item(),
            }
            if graphs:
                row["kernels_us"] = kernel_times(own.steps[:8])
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            rows.append(row)
    return rows


def version_of(text: str) -> Version:
    """A version from NAME=CHECKOUT."""
    name, _, path = text.partition("=")
    if not name.isidentifier() or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=CHECKOUT, like before=/tmp/before")
    return Version(name, load_kernels(name, Path(path)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", type=version_of, metavar="NAME=CHECKOUT")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072, 524288])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--data", choices=DATA, default="random")
    parser.add_argument("--share", type=float, default=0.05, help="share of pages that top-k reads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--appends", action="store_true", help="new tokens, as a server does")
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    arguments = parser.parse_args()
    names = [version.name for version in arguments.versions]
    if len(set(names)) < len(names):
        parser.error(f"versions are named {', '.join(names)}: give each a name of its own")
    torch.manual_seed(0)
    pool = Pool.of(Shape(32, 8, 128), POOL_TOKENS, arguments.data)
    works = [
        Workload.over(pool, [Request(1, context)], max(1, POOL_TOKENS // context), SUPPORT)
        for context in arguments.contexts
    ]
    for version in arguments.versions:
        with version.compile_ahead():
            for work in works:
                for arm in arguments.arms:
                    version.arm(arm, work, arguments.share, arguments.appends).steps[0]()
    rows: list[dict[str, Any]] = []
    for work in works:
        asked = arguments.arms, arguments.share, arguments.repeats, arguments.appends
        rows += measure(arguments.versions, work, *asked)
        settings = {"data": arguments.data, "appends": arguments.appends}
        result = about(arguments.commit) | settings | {"rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
