"""Scripts that make committed tables, as far as they run without a GPU: what their rows hold."""

import argparse
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import benchmark_decode
import benchmark_layers
import benchmark_reference_system
import benchmark_serving
import benchmark_versions
import pytest
import torch

from entmaxkv_kernels import Exact, TopK
from entmaxkv_vllm.bench import timing
from entmaxkv_vllm.bench.batch import Request
from entmaxkv_vllm.bench.peers import torch_attention
from entmaxkv_vllm.bench.workload import Pool, Shape, Workload

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SHAPE = Shape(4, 2, 32, 16, torch.float32, "cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


def committed_row(name, kernel):
    rows = json.loads((RESULTS / name).read_text())["rows"]
    return next(row for row in rows if kernel in (row.get("kernel"), row.get("path")))


def imitate_flash_attention(work):
    steps = torch_attention(work)["sdpa"]
    return {"fa3_plain": steps, "fa3_scheduled": steps}


@pytest.mark.parametrize("costs", [False, True])
def test_rows_of_decode_are_those_of_the_committed_tables(costs, monkeypatch):
    monkeypatch.setattr(benchmark_decode, "flash_attention", imitate_flash_attention)

    def per_step(arms, repeats, graphs):
        assert graphs
        return timing.per_step(arms, 2, graphs=False)

    monkeypatch.setattr(benchmark_decode, "per_step", per_step)
    monkeypatch.setattr(benchmark_decode, "kernel_times", lambda steps: {"collect_kernel": 1.0})
    torch.manual_seed(0)
    pool = Pool.of(SHAPE, 4 * 1024, "clustered")
    work = Workload.over(pool, [Request(1, 1024)] * 2, 2, 0.05, 2048)
    selectors = {"exact": Exact(), "sparse": TopK(128)}
    exact, sparse = benchmark_decode.measure(work, selectors, True, costs, appends=costs)
    for row, kernel in ((exact, "exact"), (sparse, "sparse")):
        more = row.keys() - committed_row("decode-h200-clustered.json", kernel).keys()
        assert bool(more) is costs
        assert ("counters_cost" in more, "certificate_cost" in more) == (
            costs,
            costs and kernel == "sparse",
        )
        assert committed_row("decode-h200-clustered.json", kernel).keys() <= row.keys()
        assert (row["batch"], row["context"], row["table_tokens"]) == (2, 1024, 2048)
        assert row["fa3_us"] == min(row["fa3_plain_us"], row["fa3_scheduled_us"])
        assert row["ratio_fa3"] == pytest.approx(row["fa3_us"] / row["us"])
    assert exact["pages_read"] == 1 and exact["error"] < 1e-5
    # 8 pages of the budget and the last one, of 64.
    assert sparse["pages_read"] == pytest.approx(9 / 64)
    if costs:
        assert (
            sum(sparse["certificates"]) % (2 * SHAPE.query_heads) == 0 < sum(sparse["certificates"])
        )


def test_a_sparse_row_whose_sparse_path_never_ran_is_refused(monkeypatch):
    monkeypatch.setattr(benchmark_decode, "flash_attention", imitate_flash_attention)
    monkeypatch.setattr(
        benchmark_decode, "per_step", lambda arms, *_, **__: timing.per_step(arms, 1, graphs=False)
    )
    pool = Pool.of(SHAPE, 512, "random")
    work = Workload.over(pool, [Request(1, 512)], 1, 0.05)
    with pytest.raises(RuntimeError, match="sparse at 512 tokens: every page was read"):
        list(benchmark_decode.measure(work, {"sparse": TopK(512)}, profiled=False))


def test_a_row_of_several_processes_has_their_medians_and_widest_spread():
    times = [(37.0, 0.5, 136.0), (35.0, 1.0, 140.0), (36.0, 3.0, 138.0)]
    row = {"kernel": "sparse", "batch": 1, "context": 131072, "bytes": 7}
    row |= {"certified_us": 40.5, "uncounted_us": 35.5}
    runs = [
        [row | {"us": us, "us_spread": spread, "fa3_us": fa3, "kernels_us": {"box_kernel": us - 9}}]
        for us, spread, fa3 in times
    ]
    (merged,) = benchmark_decode.merge(runs)
    assert (merged["us"], merged["us_spread"], merged["fa3_us"]) == (36.0, 3.0, 138.0)
    assert merged["ratio_fa3"] == pytest.approx(138 / 36)
    assert merged["certificate_cost"] == pytest.approx(40.5 / 36 - 1)
    assert merged["counters_cost"] == pytest.approx(36 / 35.5 - 1)
    assert merged["kernels_us"] == {"box_kernel": 27.0}
    assert [run["us"] for run in merged["runs"]] == [37.0, 35.0, 36.0]


def test_processes_that_read_other_bytes_are_not_merged():
    row = {"kernel": "exact", "batch": 1, "context": 8192, "us": 1.0, "fa3_us": 1.0}
    with pytest.raises(ValueError, match="different cases"):
        benchmark_decode.merge([[row | {"bytes": 7}], [row | {"bytes": 8}]])


def test_rows_of_the_reference_system_are_those_of_the_committed_table(monkeypatch):
    monkeypatch.setattr(benchmark_reference_system, "POOL_TOKENS", 1024)

    def decode_steps(key, value, query, page_size, share):
        assert key.shape == value.shape == (8, 512, 128)
        assert query.shape == (8, 128)
        return dict.fromkeys(("dense", "topk", "gaussian"), lambda: None)

    def graph_of(steps):
        return type("Graph", (), {"replay": staticmethod(lambda: [step() for step in steps])})

    monkeypatch.setattr(benchmark_reference_system, "decode_steps", decode_steps)
    monkeypatch.setattr(benchmark_reference_system, "graph_of", graph_of)
    pool = Pool.of(Shape(8, 8, 128, 16, torch.float32, "cpu"), 1024, "random")
    rows = benchmark_reference_system.measure(512, pool, repeats=2)
    assert [row["path"] for row in rows] == ["dense", "topk", "gaussian"]
    for row in rows:
        assert row.keys() == committed_row("reference-h200.json", row["path"]).keys()
        assert row["ratio_reference"] == pytest.approx(row["reference_us"] / row["us"])


def test_attention_is_timed_between_the_products_of_each_layer(monkeypatch):
    run = []

    def graph_of(steps):
        return SimpleNamespace(replay=lambda: [run.append(step()) for step in steps])

    def imitate_append(work):
        return lambda index: None

    monkeypatch.setattr(benchmark_layers, "graph_of", graph_of)
    monkeypatch.setattr(benchmark_layers, "flash_attention", imitate_flash_attention)
    monkeypatch.setattr(benchmark_layers, "append_as_vllm", imitate_append)
    torch.manual_seed(0)
    pool = Pool.of(SHAPE, 2 * 512, "random")
    work = Workload.over(pool, [Request(1, 501)], 2, 0.05, 600)
    products = benchmark_layers.Products(3, SHAPE)
    rows = list(benchmark_layers.measure(work, products, 0.1, 2))
    assert [row["arm"] for row in rows] == ["fa3", "exact", "topk"]
    # Two turns and three to warm up, of four graphs with products and three without.
    assert len(run) == 5 * 7 * 3
    for row in rows:
        assert (row["layers"], row["context"], row["table_tokens"]) == (3, 501, 608)
        assert row["products_us"] > 0 and row["alone_us"] > 0
        # Of a busy host's clock nothing more is certain.
        assert row["us"] != 0 and math.isfinite(row["us"])
    assert rows[0]["ratio_fa3"] == 1


def test_the_time_per_token_is_the_median_of_captures_each_of_graphs_of_its_own(monkeypatch):
    captured = []
    times = {0: [[3.0, 3.0], [3.0], [9.0]], 1: [[1.0], [1.0], [1.0]], 2: [[2.0], [2.0, 2.0], [2.0]]}
    left = {capture: iter(windows) for capture, windows in times.items()}
    monkeypatch.setattr(benchmark_serving, "capture_anew", captured.append)
    monkeypatch.setattr(
        benchmark_serving,
        "time_per_token",
        lambda llm, context, requests: next(left[len(captured)]),
    )
    row = benchmark_serving.measure("engine", 2048, 1, captures=3)
    assert captured == ["engine", "engine"]
    assert row["captures_ms"] == [3.0, 1.0, 2.0] and row["tpot_ms"] == 2.0
    assert row["mean_ms"] == [3.0, 3.0, 9.0, *[1.0] * 3, *[2.0] * 3]


def test_graphs_of_the_default_model_runner_can_be_captured_anew():
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert callable(CudaGraphManager.release_graphs) and callable(GPUModelRunner.capture_model)


def measure_beside(folder, name, decode):
    """Rows of these kernels and of a copy whose `decode` is another one."""
    kernels = Path(benchmark_versions.__file__).parent.parent / "kernels"
    shutil.copytree(kernels, folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "kernels" / "__init__.py").open("a") as file:
        file.write(f"honest = decode\ndef decode(*given, out, **options): {decode}\n")
    versions = [
        benchmark_versions.version_of(f"now={kernels.parent}"),
        benchmark_versions.version_of(f"{name}={folder}"),
    ]
    torch.manual_seed(0)
    pool = Pool.of(SHAPE, 2 * 512, "random")
    work = Workload.over(pool, [Request(1, 512)], 2, 0.05)
    return benchmark_versions.measure(versions, work, list(benchmark_versions.ARMS), 0.25, 2)


def test_versions_of_the_kernels_are_timed_beside_each_other(tmp_path):
    """The other one gives zeros, which its rows say."""
    rows = measure_beside(tmp_path, "zero", "return honest(*given, out=out, **options).zero_()")
    arms = benchmark_versions.ARMS
    assert [(row["selector"], row["kernels"]) for row in rows] == [
        (arm, name) for arm in arms for name in ("now", "zero")
    ]
    for now, zero in zip(rows[::2], rows[1::2], strict=True):
        assert (now["ratio"], now["difference"]) == (1, 0)
        assert zero["ratio"] == pytest.approx(now["us"] / zero["us"])
        assert zero["difference"] > 0.01


def test_a_version_whose_sparse_path_never_ran_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="topk of idle: the sparse path never ran"):
        measure_beside(tmp_path, "idle", "options['counters'][0] += 1; return out.zero_()")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("now", "'now' is no NAME=CHECKOUT"),
        ("a b=.", "'a b=.' is no NAME=CHECKOUT"),
        ("old=docs", "docs/kernels of old is no package: give a checkout"),
    ],
    ids=["without a checkout", "with a name that is none", "of a folder without kernels"],
)
def test_a_version_that_is_none_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        benchmark_versions.version_of(text)


def test_two_versions_of_one_name_are_refused(monkeypatch, capsys):
    root = Path(benchmark_versions.__file__).parent.parent
    arguments = ["--out", "none.json", f"now={root}", f"now={root}"]
    monkeypatch.setattr("sys.argv", ["benchmark_versions.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark_versions.main()
    assert "versions are named now, now: give each a name of its own" in capsys.readouterr().err
