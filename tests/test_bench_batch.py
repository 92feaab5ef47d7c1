"""The grammar of batches."""

import pytest

from entmaxkv_vllm.bench.batch import Request, parse_batch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q2k", [Request(2048, 2048)]),
        ("1q1s128k", [Request(1, 131072)]),
        ("3q1s1000", [Request(1, 1000)] * 3),
        ("16q4s1k", [Request(4, 1024)] * 16),
        ("2q1k_3q1s4k", [Request(1, 4096)] * 3 + [Request(1024, 1024)] * 2),
        ("q1", [Request(1, 1)]),
    ],
)
def test_a_batch_is_read_as_vllm_reads_it_with_what_decodes_first(text, expected):
    assert parse_batch(text) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("8s1k", "is not [count]q<query>[s<tokens>]"),
        ("q1s1m", "is not [count]q<query>[s<tokens>]"),
        ("q1s1k_", "'' is not"),
        ("q8s4", "8 new of 4 tokens"),
        ("q0s4", "0 new of 4 tokens"),
        ("0q1s4", "no sequence"),
    ],
)
def test_what_is_no_batch_is_named_with_its_problem(text, problem):
    with pytest.raises(ValueError) as error:
        parse_batch(text)
    assert problem in str(error.value)
    assert repr(text) in str(error.value)
