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
        ({"selector": "topk", "sparse_steps": 5, "failures": []}, []),
        ({"selector": "exact", "sparse_steps": 0, "failures": []}, []),
        (
            {"selector": "gaussian", "sparse_steps": 0, "failures": []},
            ["gaussian: the sparse path never ran"],
        ),
        (
            {"selector": "FLASH_ATTN", "sparse_steps": 0, "failures": ["status 500"]},
            ["FLASH_ATTN: status 500"],
        ),
    ],
    ids=["sparse", "exact", "a sparse selector that never ran", "a request that failed"],
)
def test_failed_requests_and_a_sparse_path_that_never_ran_are_complaints(row, expected):
    assert benchmark_server.complaints(row) == expected
