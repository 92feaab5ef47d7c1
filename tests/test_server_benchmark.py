"""scripts/benchmark_server.py: its requests, and what it refuses to call a measurement."""

import argparse

import benchmark_server
import pytest

ARGUMENTS = argparse.Namespace(
    requests=50, shortest=100, longest=3000, least_output=3, most_output=9, seed=1
)


def test_every_server_gets_the_same_requests_of_mixed_lengths():
    requests = benchmark_server.make_requests(ARGUMENTS)
    assert requests == benchmark_server.make_requests(ARGUMENTS)
    lengths = sorted(len(request["prompt"]) for request in requests)
    assert 100 <= lengths[0] < 200 < 1500 < lengths[-1] <= 3000
    assert {request["max_tokens"] for request in requests} == set(range(3, 10))


def test_percentiles_are_in_milliseconds():
    found = benchmark_server.percentiles([i / 1000 for i in range(101)])
    assert found == pytest.approx({"p50": 50, "p90": 90, "p99": 99})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"selector": "topk", "steps": 5, "sparse_steps": 5, "failures": []}, []),
        ({"selector": "exact", "steps": 5, "sparse_steps": 0, "failures": []}, []),
        (
            {"selector": "gaussian", "steps": 5, "sparse_steps": 0, "failures": []},
            ["gaussian: the sparse path never ran"],
        ),
        (
            {"selector": "FLASH_ATTN", "steps": 0, "sparse_steps": 0, "failures": ["status 500"]},
            ["FLASH_ATTN: status 500"],
        ),
        (
            {"selector": "FLASH_ATTN", "steps": 5, "sparse_steps": 0, "failures": []},
            ["FLASH_ATTN: ENTMAXKV decoded 5 steps"],
        ),
        (
            {"selector": "exact", "steps": 0, "sparse_steps": 0, "failures": []},
            ["exact: ENTMAXKV decoded 0 steps"],
        ),
    ],
    ids=[
        "sparse",
        "exact",
        "a sparse selector that never ran",
        "a request that failed",
        "the other backend was ours",
        "ours was another backend",
    ],
)
def test_failed_requests_and_a_sparse_path_that_never_ran_are_complaints(row, expected):
    assert benchmark_server.complaints(row) == expected
