"""Bad input is refused before any work, by one error that names it."""

import math

import pytest
import torch

from entmaxkv_kernels import (
    Counter,
    Exact,
    Gaussian,
    NewTokens,
    TopK,
    analyze_decode,
    append,
    decode,
    prefill,
)

from .scene import make_scene


@pytest.fixture
def scene():
    return make_scene([20, 33], statistics=("mean", "std"))


def of_append(scene, **changes):
    arguments = {
        "cache": scene.cache,
        "key": torch.zeros(3, 2, 64, dtype=torch.float64),
        "value": torch.zeros(3, 2, 64, dtype=torch.float64),
        "slot_mapping": torch.tensor([0, 1, 2]),
    }
    return append(**arguments | changes)


def of_prefill(scene, **changes):
    arguments = {
        "query": torch.cat(scene.query),
        "cache": scene.cache,
        "block_table": scene.block_table,
        "seq_lens": scene.seq_lens,
        "query_start_loc": torch.tensor([0, 20, 53]),
        "scale": 0.125,
        "alpha": 1.5,
    }
    return prefill(**arguments | changes)


def of_decode(scene, function=decode, **changes):
    arguments = {
        "query": scene.last_queries,
        "cache": scene.cache,
        "block_table": scene.block_table,
        "seq_lens": scene.seq_lens,
        "scale": 0.125,
        "alpha": 1.5,
        "selector": Exact(),
    }
    return function(**arguments | changes)


def of_analysis(scene, **changes):
    return of_decode(scene, analyze_decode, **changes)


CALLS = [of_prefill, of_decode, of_analysis]
attention = pytest.mark.parametrize("call", CALLS, ids=[call.__name__ for call in CALLS])


@pytest.mark.parametrize("call", [of_append, *CALLS], ids=lambda call: call.__name__)
def test_the_calls_below_are_otherwise_good(scene, call):
    call(scene)


@pytest.mark.parametrize("call", [of_append, *CALLS], ids=lambda call: call.__name__)
def test_a_cache_of_another_kind_is_refused(scene, call):
    with pytest.raises(TypeError, match=r"cache is a Tensor; expected a PagedCache"):
        call(scene, cache=scene.cache.key)
    with pytest.raises(TypeError, match=r"cache has dtype torch.float8_e5m2; expected torch.fl"):
        call(scene, cache=scene.cache._replace(key=scene.cache.key.to(torch.float8_e5m2)))


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, r"slot_mapping is a list; expected a tensor", {"slot_mapping": [0, 1, 2]}),
        (
            TypeError,
            r"slot_mapping has dtype torch.int32; expected torch.int64",
            {"slot_mapping": torch.zeros(3, dtype=torch.int32)},
        ),
        (
            ValueError,
            r"slot_mapping has shape \(3, 1\); expected \[tokens\]",
            {"slot_mapping": torch.zeros(3, 1, dtype=torch.int64)},
        ),
        (
            ValueError,
            r"key has shape \(4, 2, 64\); expected \[3, 2, 64\]",
            {"key": torch.zeros(4, 2, 64).double()},
        ),
        (
            TypeError,
            r"key has dtype torch.float32; expected torch.float64",
            {"key": torch.zeros(3, 2, 64)},
        ),
        (
            ValueError,
            r"value has shape \(3, 1, 64\); expected \[3, 2, 64\]",
            {"value": torch.zeros(3, 1, 64).double()},
        ),
        (
            ValueError,
            r"value is on meta; expected cpu, where the cache is",
            {"value": torch.zeros(3, 2, 64, dtype=torch.float64, device="meta")},
        ),
    ],
)
def test_append_names_what_is_wrong(scene, error, message, changes):
    before = scene.cache.key.clone()
    with pytest.raises(error, match=message):
        of_append(scene, **changes)
    assert torch.equal(scene.cache.key.nan_to_num(), before.nan_to_num())


@attention
@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, r"query is a NoneType; expected a tensor", {"query": None}),
        (
            TypeError,
            r"query has dtype torch.float32; expected torch.float64",
            {"query": torch.zeros(2, 4, 64)},
        ),
        (
            ValueError,
            r"query has shape \(2, 4, 32\); expected \[tokens, query_heads, 64\]",
            {"query": torch.zeros(2, 4, 32).double()},
        ),
        (
            ValueError,
            r"the number of query heads is 3; expected a multiple of the cache's 2 KV heads",
            {"query": torch.zeros(2, 3, 64).double()},
        ),
        (
            TypeError,
            r"seq_lens has dtype torch.float32; expected torch.int32 or torch.int64",
            {"seq_lens": torch.zeros(2)},
        ),
        (
            ValueError,
            r"seq_lens is \[20, -1\]; expected no negative length",
            {"seq_lens": torch.tensor([20, -1])},
        ),
        (
            ValueError,
            r"block_table has shape \(1, 2\); expected \[2, max_pages\]",
            {"block_table": torch.zeros(1, 2, dtype=torch.int32)},
        ),
        (
            ValueError,
            r"block_table is 2 pages wide; expected at least 3 pages of 16 tokens for a "
            r"sequence of 33",
            {"block_table": torch.zeros(2, 2, dtype=torch.int32)},
        ),
        (ValueError, r"scale is 0.0; expected a finite number above 0", {"scale": 0.0}),
        (ValueError, r"scale is nan; expected a finite number above 0", {"scale": math.nan}),
        (ValueError, r"alpha is \[0.9\]; expected within \[1, 2\]", {"alpha": 0.9}),
        (ValueError, r"alpha is \[2.1\]; expected within \[1, 2\]", {"alpha": 2.1}),
        (ValueError, r"alpha is \[nan\]; expected within \[1, 2\]", {"alpha": math.nan}),
        (
            ValueError,
            r"alpha is \[1.5, 1.5, 3.0, 1.5\]; expected within \[1, 2\]",
            {"alpha": torch.tensor([1.5, 1.5, 3.0, 1.5])},
        ),
        (ValueError, r"alpha is \[1.5, 1.5\]; expected one number or 4", {"alpha": [1.5, 1.5]}),
        (TypeError, r"alpha is None; expected one number or 4", {"alpha": None}),
        (TypeError, r"alpha is '1.5'; expected one number or 4", {"alpha": "1.5"}),
        (
            ValueError,
            r"alibi_slopes has shape \(2,\); expected \[4\]",
            {"alibi_slopes": torch.zeros(2)},
        ),
        (
            TypeError,
            r"alibi_slopes has dtype torch.float64; expected torch.float32",
            {"alibi_slopes": torch.zeros(4).double()},
        ),
        (
            ValueError,
            r"sliding_window is 0; expected None or at least 1 token",
            {"sliding_window": 0},
        ),
    ],
)
def test_attention_names_what_is_wrong(scene, call, error, message, changes):
    with pytest.raises(error, match=message):
        call(scene, **changes)


@pytest.mark.parametrize("call", [of_prefill, of_decode], ids=lambda call: call.__name__)
def test_an_output_of_another_shape_or_dtype_is_refused(scene, call):
    with pytest.raises(ValueError, match=r"out has shape \(7, 4, 64\); expected \["):
        call(scene, out=torch.zeros(7, 4, 64).double())
    with pytest.raises(TypeError, match=r"out has dtype torch.float32; expected torch.float64"):
        call(scene, out=torch.zeros(2, 4, 64))


@pytest.mark.parametrize(
    "message, changes",
    [
        (
            r"query_start_loc has shape \(2,\); expected \[3\]",
            {"query_start_loc": torch.tensor([0, 20])},
        ),
        (
            r"query_start_loc is \[0, 20, 54\]; expected offsets .* between 0 and the 53",
            {"query_start_loc": torch.tensor([0, 20, 54])},
        ),
        (
            r"query_start_loc is \[0, 30, 20\]; expected offsets that do not decrease",
            {"query_start_loc": torch.tensor([0, 30, 20])},
        ),
        (
            r"seq_lens is \[20, 33\]; expected at least the query lengths \[19, 34\]",
            {"query_start_loc": torch.tensor([0, 19, 53])},
        ),
    ],
)
def test_prefill_names_what_is_wrong_with_its_chunks(scene, message, changes):
    with pytest.raises(ValueError, match=message):
        of_prefill(scene, **changes)


@pytest.mark.parametrize("call", [of_decode, of_analysis], ids=lambda call: call.__name__)
@pytest.mark.parametrize(
    "error, message, changes",
    [
        (
            ValueError,
            r"query is 3 tokens; expected one for each of 2 rows",
            {"query": torch.zeros(3, 4, 64).double()},
        ),
        (TypeError, r"selector is 'exact'; expected an Exact, Gaussian", {"selector": "exact"}),
        (
            ValueError,
            r"cache.layout.statistics is \('mean', 'std'\); expected \('center', 'half_width'\), "
            r"which the topk selector reads",
            {"selector": TopK(64)},
        ),
        (
            ValueError,
            r"alpha is 1 \(softmax\) for some head; expected above 1 with the gaussian selector",
            {"selector": Gaussian(), "alpha": 1.0},
        ),
        (
            ValueError,
            r"alpha is 1 \(softmax\) for some head; expected above 1 with the gaussian selector",
            {"selector": Gaussian(), "alpha": [1.5, 1.5, 1, 1.5]},
        ),
        (
            ValueError,
            r"exact_rows has shape \(3,\); expected \[2\]",
            {"exact_rows": torch.zeros(3, dtype=torch.bool)},
        ),
        (
            TypeError,
            r"exact_rows has dtype torch.int64; expected torch.bool",
            {"exact_rows": torch.zeros(2, dtype=torch.int64)},
        ),
    ],
)
def test_decode_names_what_is_wrong(scene, call, error, message, changes):
    with pytest.raises(error, match=message):
        call(scene, **changes)


@pytest.mark.parametrize(
    "tokens, dtype, error, message",
    [
        (3, torch.int64, ValueError, r"new_tokens is 3 tokens; expected one for each of 2 rows"),
        (2, torch.int32, TypeError, r"slot_mapping has dtype torch.int32; expected torch.int64"),
    ],
)
def test_decode_names_what_is_wrong_with_new_tokens(scene, tokens, dtype, error, message):
    rows = torch.zeros(tokens, 2, 64, dtype=torch.float64)
    new_tokens = NewTokens(rows, rows, torch.zeros(tokens, dtype=dtype))
    with pytest.raises(error, match=message):
        of_decode(scene, new_tokens=new_tokens)


def test_certificates_of_another_shape_or_dtype_are_refused(scene):
    with pytest.raises(ValueError, match=r"certificate has shape \(3,\); expected \[2, 4\]"):
        of_decode(scene, certificate=torch.zeros(3))
    with pytest.raises(TypeError, match=r"certificate has dtype torch.float64; expected torch.f"):
        of_decode(scene, certificate=torch.zeros(1, 4, dtype=torch.float64))


def test_counters_of_another_shape_or_dtype_are_refused(scene):
    with pytest.raises(
        ValueError, match=rf"counters has shape \(3,\); expected \[{len(Counter)}\]"
    ):
        of_decode(scene, counters=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"counters has dtype torch.int32; expected torch.int64"):
        of_decode(scene, counters=torch.zeros(len(Counter), dtype=torch.int32))


def test_alpha_may_come_in_any_of_its_forms(scene):
    expected = of_decode(scene, alpha=1.5)
    for alpha in ([1.5] * 4, (1.5,) * 4, torch.full((4,), 1.5)):
        assert torch.equal(of_decode(scene, alpha=alpha), expected)
    assert torch.equal(of_decode(scene, alpha=2), of_decode(scene, alpha=2.0))
