"""Time decode by several versions of the kernels in one process on one GPU, in turns.

One process, one chip and one place in memory: what differs by 1% shows, which tables of
different runs cannot tell. All versions read the same pages, as CUDA graphs over sets of them that
exceed the L2 cache. A version is a checkout, or a copy of one, whose folder `kernels` is loaded
beside the others.

    git worktree add /tmp/before HEAD~1
    python scripts/benchmark_versions.py --out sweep.json before=/tmp/before now=.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from entmaxkv_vllm.bench.batch import Request
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.timing import Step, kernel_times, per_step
from entmaxkv_vllm.bench.workload import ALPHA, Pool, Shape, Workload

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
    """One version's steps over workloads."""

    name: str
    kernels: ModuleType

    def steps(self, arm: str, work: Workload, share: float) -> tuple[list[Step], torch.Tensor]:
        """Those of an arm, one for each set of pages, and what they write, [sets, B, heads, D]."""
        kernels, shape = self.kernels, work.shape
        tokens = max(shape.page_size, int(share * work.longest))
        selector = kernels.Exact() if arm == "exact" else kernels.TopK(tokens)
        cache = kernels.PagedCache(*work.pool.cache(selector.statistics))
        options: dict[str, Any] = {
            "scale": shape.scale,
            "alpha": ALPHA,
            "selector": selector,
            "counters": torch.zeros(len(kernels.Counter), dtype=torch.int64, device=shape.device),
            "implementation": shape.implementation,
        }
        if certified := arm.endswith("certified"):
            heads = work.decodes, shape.query_heads
            options["certificate"] = torch.empty(heads, device=shape.device)
        if shape.implementation == "triton":
            options["workspace"] = self._workspace(work, selector, certified)
        outs = torch.empty_like(work.queries)

        def step(index: int) -> Callable[[], Any]:
            query, table, out = work.queries[index], work.tables[index], outs[index]
            return lambda: kernels.decode(query, cache, table, work.lengths, out=out, **options)

        return [step(index) for index in range(work.sets)], outs

    def _workspace(self, work: Workload, selector: Any, certified: bool) -> torch.Tensor:
        shape = work.shape
        compiled = importlib.import_module(f"{self.kernels.__name__}.triton")
        size = compiled.decode_workspace_size(
            work.decodes,
            *(shape.query_heads, shape.kv_heads, shape.head_size, shape.page_size),
            shape.dtype,
            work.table_tokens,
            selector=selector,
            certificate=certified,
        )
        return torch.empty(size, dtype=torch.uint8, device=shape.device)

    def compile_ahead(self) -> contextlib.AbstractContextManager[None]:
        """Within, steps write nothing; what they would launch is compiled, several at a time."""
        launch = importlib.import_module(f"{self.kernels.__name__}.triton.launch")
        return launch.compile_ahead()


def measure(
    versions: list[Version], work: Workload, arms: list[str], share: float, repeats: int
) -> list[dict[str, Any]]:
    """A row for each arm and version; `ratio` is the first version's time over this one's, and
    `difference` the largest of an output from the first version's."""
    graphs = work.shape.device == "cuda"
    made = {
        (arm, version.name): version.steps(arm, work, share) for arm in arms for version in versions
    }
    times = per_step(
        {f"{arm} {name}": steps for (arm, name), (steps, _) in made.items()}, repeats, graphs=graphs
    )
    rows = []
    for arm in arms:
        first = versions[0].name
        for version in versions:
            us = times[f"{arm} {version.name}"]
            steps, outs = made[arm, version.name]
            row = {
                "context": work.longest,
                "selector": arm,
                "kernels": version.name,
                "us": statistics.median(us),
                "us_spread": max(us) - min(us),
                "ratio": statistics.median(times[f"{arm} {first}"]) / statistics.median(us),
                "difference": (outs.float() - made[arm, first][1].float()).abs().max().item(),
            }
            if graphs:
                row["kernels_us"] = kernel_times(steps[:8])
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
    parser.add_argument("--share", type=float, default=0.05, help="share of pages that top-k reads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    arguments = parser.parse_args()
    names = [version.name for version in arguments.versions]
    if len(set(names)) < len(names):
        parser.error(f"versions are named {', '.join(names)}: give each a name of its own")
    torch.manual_seed(0)
    pool = Pool.of(Shape(32, 8, 128), POOL_TOKENS, "random")
    works = [
        Workload.over(pool, [Request(1, context)], max(1, POOL_TOKENS // context), SUPPORT)
        for context in arguments.contexts
    ]
    for version in arguments.versions:
        with version.compile_ahead():
            for work in works:
                for arm in arguments.arms:
                    version.steps(arm, work, arguments.share)[0][0]()
    rows: list[dict[str, Any]] = []
    for work in works:
        rows += measure(
            arguments.versions, work, arguments.arms, arguments.share, arguments.repeats
        )
        result = about(arguments.commit) | {"rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
