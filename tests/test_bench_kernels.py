"""`entmaxkv bench kernels` on a CPU: what arms compute, what a run reports, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from entmaxkv_kernels import Counter, Exact, TopK, decode, prefill
from entmaxkv_vllm import cli
from entmaxkv_vllm.bench import kernels, report, timing
from entmaxkv_vllm.bench.arms import EntmaxArm, selector_of
from entmaxkv_vllm.bench.batch import parse_batch
from entmaxkv_vllm.bench.options import BY_CODES
from entmaxkv_vllm.bench.peers import ARMS
from entmaxkv_vllm.bench.workload import Pool, Shape, Workload

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what a run does without a GPU; see tests/gpu"
)

SHAPE = Shape(6, 2, 32, 16, torch.float32, "cpu")
MIXED = "2q1s100_1q1s37_2q20s45_1q19"


def workload(batch, support=0.05, data="random", shape=SHAPE, **options):
    torch.manual_seed(3)
    requests = parse_batch(batch)
    pages = sum(-(-request.tokens // shape.page_size) for request in requests)
    pool = Pool.of(shape, 2 * pages * shape.page_size, data)
    return Workload.over(pool, requests, 2, support, **options)


def test_torchs_attention_is_softmax_over_the_same_pages():
    work = workload(MIXED)
    cache, end = work.pool.cache(()), work.decodes
    options = {"scale": SHAPE.scale, "alpha": 1.0}
    for index, step in enumerate(ARMS["sdpa"](work)["sdpa"]):
        query, table = work.queries[index], work.tables[index]
        expected = prefill(
            query, cache, table[end:], work.lengths[end:], work.starts[end:], **options
        )
        expected[:end] = decode(
            query[:end], cache, table[:end], work.lengths[:end], selector=Exact(), **options
        )
        found = torch.cat([each[0].transpose(0, 1) for each in step()])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_error_tells_an_exact_output_from_one_that_left_keys_out():
    work = workload("1q1s1000", support=0.1)
    for name, low, high in (("exact", 0, 1e-5), ("topk", 0.01, 10)):
        arm = EntmaxArm(work, selector_of(name, 1000, 0.05, SHAPE.page_size))
        arm.steps[0]()
        assert low <= work.exact_error(arm.outs[0]) < high


@pytest.mark.parametrize("support", [0.02, 0.2])
def test_queries_have_about_the_support_that_was_asked_for(support):
    work = workload("5q1s1000", support=support)
    arm = EntmaxArm(work, Exact())
    for step in arm.steps:
        step()
    # The scale is that of one sequence and KV head.
    assert support / 2 < arm.counted()["support"] < support * 2


def test_bytes_are_those_of_the_keys_read_the_values_with_weight_and_the_statistics():
    work = workload("2q1s512_1q1s64", support=0.1)
    vector, pages = SHAPE.head_size * 4, SHAPE.kv_heads * (512 + 512 + 64) // 16
    box, named = 64 + 12, ("topk", "adaptive", "pruned")
    for name, page_statistics in {
        "exact": 0,
        "gaussian": 2 * vector,
        **dict.fromkeys(named, box),
    }.items():
        arm = EntmaxArm(work, selector_of(name, 512, 0.1, SHAPE.page_size))
        arm.steps[1]()
        read, support = (int(arm.counters[c]) for c in (Counter.PAGES_READ, Counter.SUPPORT))
        expected = (read * 16 + support) * vector + pages * page_statistics
        assert arm.counted()["bytes"] == pytest.approx(expected, abs=1)
        assert name != "exact" or read == pages


@pytest.mark.parametrize("name", BY_CODES)
def test_selectors_by_codes_read_the_codes_of_all_pages(name):
    work = workload("1q1s512", support=0.1, data="clustered", shape=replace(SHAPE, head_size=64))
    arm = EntmaxArm(work, selector_of(name, 512, 0.1, SHAPE.page_size))
    arm.steps[0]()
    assert arm.counters[Counter.SPARSE_STEPS] > 0
    read, support = (int(arm.counters[c]) for c in (Counter.PAGES_READ, Counter.SUPPORT))
    codes = 64 + 16 * (16 + 1) + 12
    expected = (read * 16 + support) * 64 * 4 + SHAPE.kv_heads * 32 * codes
    assert arm.counted()["bytes"] == pytest.approx(expected, abs=1)


def test_steps_that_append_write_what_is_there_already():
    work = workload("3q1s100_1q1s64")
    arms = [EntmaxArm(work, TopK(32), appends=appends) for appends in (False, True)]
    before = arms[0].cache.key.clone(), arms[0].cache.value.clone()
    for arm in arms:
        for step in arm.steps:
            step()
    assert arms[0].outs.any() and torch.equal(arms[0].outs, arms[1].outs)
    assert torch.equal(arms[0].cache.key, before[0])
    assert torch.equal(arms[0].cache.value, before[1])
    appended = [int(arm.counters[Counter.APPENDED_PAGES]) for arm in arms]
    assert appended == [0, 2 * 4 * SHAPE.kv_heads]


def test_a_block_table_can_have_room_for_more_than_its_sequences():
    work = workload("2q1s100", table_tokens=1000)
    assert work.tables.shape == (2, 2, 63)
    assert work.table_tokens == 1008
    used = work.tables[..., :7].flatten()
    assert len(used.unique()) == len(used)


def test_arms_take_turns_and_a_turn_takes_every_set():
    taken = []
    arms = {name: [lambda n=name, i=i: taken.append((n, i)) for i in (0, 1)] for name in "ab"}
    times = timing.per_step(arms, 3, graphs=False, calls=2, warm_up=1)
    turn = [(name, i) for name in "ab" for i in (0, 1, 0, 1)]
    assert taken == turn * 4
    assert all(len(values) == 3 and min(values) > 0 for values in times.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The exit status and the result of one run of the command, and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "result.json"
    sizes = ["--query-heads", "4", "--kv-heads", "2", "--head-size", "32", "--repeats", "3"]
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr("builtins.print", lambda *text, **options: shown.append(text[0]))
        batches = ["2q1s1k", "q100", "1q30s40_2q1s640"]
        status = cli.main(["bench", "kernels", *batches, *sizes, "--out", str(out)])
    return status, json.loads(out.read_text()), "\n".join(shown)


def test_a_run_on_a_cpu_says_that_its_numbers_are_not_a_gpus(run):
    status, result, shown = run
    assert status == 0
    assert result["gpu"] == "CPU" and result["dtype"] == "float32"
    assert "not GPU numbers" in result["note"]
    assert result["note"] in shown
    assert result["left_out"]["fa3 needs a GPU"] == result["batches"]
    assert "left out: triton_attn needs a GPU" in shown
    assert {"versions", "commit", "date"} <= result.keys()


def test_a_run_has_a_row_for_each_batch_and_arm(run):
    _, result, shown = run
    sparse = ["exact", "gaussian", "topk"]
    arms = {"2q1s1k": sparse, "q100": ["entmax"], "1q30s40_2q1s640": sparse}
    expected = [(batch, arm) for batch, own in arms.items() for arm in [*own, "sdpa"]]
    assert [(row["batch"], row["arm"]) for row in result["rows"]] == expected
    for row in result["rows"]:
        assert 0 < row["us_lowest"] <= row["us"] <= row["us_highest"]
        assert row["us_spread"] == pytest.approx(row["us_highest"] - row["us_lowest"])
        assert f"{row['us']:.1f}" in shown
        if row["arm"] in ("gaussian", "topk"):
            assert 0 < row["pages_read"] < 1 and row["sparse_steps"] == 1
        elif row["arm"] == "exact":
            assert row["pages_read"] == 1 and row["sparse_steps"] == 0


def test_a_sparse_arm_that_read_every_page_is_refused(tmp_path, capsys):
    out = tmp_path / "result.json"
    sizes = ["--query-heads", "2", "--kv-heads", "2", "--head-size", "16", "--repeats", "1"]
    arguments = ["1q1s200", *sizes, "--share", "1", "--peers", "--selectors", "exact", "topk"]
    assert cli.main(["bench", "kernels", *arguments, "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [row["arm"] for row in result["rows"]] == ["exact"]
    (refusal,) = result["refused"]
    assert refusal.startswith("1q1s200, topk: every page was read")
    assert f"REFUSED: {refusal}" in capsys.readouterr().out


def test_a_sparse_arm_whose_sparse_path_never_ran_is_refused():
    work = workload("1q1s100")
    arm = EntmaxArm(work, selector_of("topk", 100, 0.2, SHAPE.page_size))
    assert arm.complaint() == "the sparse path never ran"
    assert EntmaxArm(work, Exact()).complaint() is None
    arm.steps[0]()
    assert arm.complaint() is None


def test_on_a_gpu_steps_that_fit_in_the_cache_are_refused(monkeypatch):
    row = {"bytes": 1 << 20, "sets": 50}
    assert kernels._fits_in_cache(row) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert "L2 cache of 50 MiB" in kernels._fits_in_cache(row)
    assert kernels._fits_in_cache(row | {"sets": 51}) is None
    assert kernels._fits_in_cache({"sets": 1}) is None


def test_a_peer_that_fails_is_left_out_with_its_reason_where_it_failed(monkeypatch, capsys):
    def broken(work):
        if len(work.requests) > 1:
            raise OSError("no such kernel")
        return {"flashinfer": [lambda: None] * work.sets}

    monkeypatch.setitem(ARMS, "flashinfer", broken)
    sizes = ["--query-heads", "2", "--kv-heads", "1", "--head-size", "16", "--repeats", "1"]
    arguments = ["1q1s64", "2q1s64", *sizes, "--peers", "flashinfer", "--selectors", "exact"]
    assert cli.main(["bench", "kernels", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left out: flashinfer failed: OSError: no such kernel (2q1s64)" in lines
    assert [line.split()[0] for line in lines if " flashinfer " in f"{line} "][:1] == ["1q1s64"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["8s1k"], "is not [count]q<query>[s<tokens>]"),
        (["1q1s1024k"], "takes minutes without a GPU"),
        (["q16k"], "takes minutes without a GPU"),
        (["1q1s100", "--reference-system", "/nowhere"], "give a checkout of"),
        (["1q1s100", "--query-heads", "6"], "query_heads is 6; expected a multiple of the 8"),
        (["1q1s100", "--repeats", "0"], "repeats is 0; expected at least 1"),
        (["1q1s100", "--support", "5"], "support is 5.0; expected above 0 and at most 1"),
    ],
    ids=["grammar", "long-decode", "long-prefill", "no-checkout", "heads", "repeats", "support"],
)
def test_what_cannot_be_timed_is_one_clear_error(arguments, problem, capsys):
    assert cli.main(["bench", "kernels", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("entmaxkv bench: ") and problem in error and error.count("\n") == 1


ROW = {"batch": "1q1s8k", "arm": "exact", "us": 100.0, "us_spread": 4.0}


@pytest.mark.parametrize(
    ("us", "spread", "status"), [(104.0, 1.0, 0), (104.5, 1.0, 1), (109.0, 9.0, 0), (94.0, 5.0, 1)]
)
def test_two_runs_agree_when_medians_differ_by_no_more_than_the_spread(
    us, spread, status, tmp_path, capsys
):
    header = dict.fromkeys(report.ASKED, 1) | {"gpu": "a GPU"}
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, row in zip(paths, (ROW, ROW | {"us": us, "us_spread": spread}), strict=True):
        path.write_text(json.dumps(header | {"rows": [row]}))
    assert cli.main(["bench", "compare", *map(str, paths)]) == status
    assert ("apart" in capsys.readouterr().out) is bool(status)


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"gpu": "another"}, "differ in gpu"), ({"share": 0.1}, "differ in share")],
)
def test_runs_of_different_things_are_not_compared(change, problem):
    header = dict.fromkeys(report.ASKED, 1) | {"gpu": "a GPU", "rows": [ROW]}
    with pytest.raises(ValueError, match=problem):
        report.compare(header, header | change)
    with pytest.raises(ValueError, match="no batch and arm"):
        report.compare(header, header | {"rows": [ROW | {"arm": "topk"}]})
