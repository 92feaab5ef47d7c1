"""When one call appends a batch's tokens and decodes it."""

from types import SimpleNamespace

import pytest
import torch

from entmaxkv_kernels import Exact, PageLayout, TopK
from entmaxkv_vllm import scratch
from entmaxkv_vllm.impl import EntmaxKVImpl
from entmaxkv_vllm.metadata import DecodeRows, EntmaxKVMetadata, PrefillRows

TOKENS = scratch.DECODE_ROWS + 1


class Noted(EntmaxKVImpl):
    """A layer that notes its calls, and computes nothing."""

    def __init__(self, selector, flags_resumed=True, shared_with=None):
        self.selector, self.flags_resumed = selector, flags_resumed
        self.kv_sharing_target_layer_name = shared_with
        self.scale, self.alpha, self.alibi_slopes, self.sliding_window = 1.0, 1.5, None, None
        self.kernels, self.fp8, self.calls = "reference", False, []

    def pages(self, layer, kv_cache):
        return kv_cache

    def append_tokens(self, layer, key, value, pages, slots):
        self.calls.append(("append", len(slots)))

    def _decode(self, layer, query, pages, rows, output, options, new_tokens):
        given = None if new_tokens is None else len(new_tokens.slot_mapping)
        self.calls.append(("decode", given))

    def prefill_rows(self, query, pages, rows, output, options):
        self.calls.append(("prefill", None))


def calls_of(layer, decodes, prefill=False, ranks=True):
    """What a layer calls for that many sequences that decode, of a batch padded to TOKENS."""
    rows = torch.zeros(TOKENS, 2, 8)
    lengths = torch.ones(decodes, dtype=torch.int32)
    decode = DecodeRows(decodes, torch.zeros(decodes, 1, dtype=torch.int32), lengths, None)
    chunk = PrefillRows(TOKENS, decode.block_table, lengths, lengths) if prefill else None
    metadata = EntmaxKVMetadata(torch.zeros(TOKENS, dtype=torch.int64), decode, chunk)
    pages = SimpleNamespace(layout=PageLayout(16, 8, layer.selector.statistics if ranks else ()))
    layer.forward(None, rows, rows, rows, pages, metadata, torch.empty_like(rows))
    return layer.calls


@pytest.mark.parametrize("selector", [Exact(), TopK(64)], ids=["exact", "topk"])
def test_sequences_that_only_decode_are_given_with_their_tokens(selector):
    assert calls_of(Noted(selector), decodes=3) == [("decode", 3)]


def test_tokens_beside_prompts_are_appended_first():
    layer = Noted(TopK(64))
    assert calls_of(layer, 3, prefill=True) == [
        ("append", TOKENS),
        ("decode", None),
        ("prefill", None),
    ]


def test_more_sequences_than_a_call_decodes_are_appended_first():
    assert calls_of(Noted(Exact()), TOKENS) == [("append", TOKENS), ("decode", None)]


def test_sequences_that_rank_pages_are_appended_first_where_resumed_ones_are_not_flagged():
    sparse, exact = Noted(TopK(64), flags_resumed=False), Noted(Exact(), flags_resumed=False)
    assert calls_of(sparse, 3) == [("append", TOKENS), ("decode", None)]
    assert calls_of(exact, 3) == [("decode", 3)]


def test_layers_that_rank_nothing_are_given_their_tokens_on_the_older_runner_too():
    assert calls_of(Noted(TopK(64), flags_resumed=False), 3, ranks=False) == [("decode", 3)]


def test_a_layer_that_reads_the_cache_of_another_appends_nothing():
    assert calls_of(Noted(Exact(), shared_with="layers.0"), 3) == [("decode", None)]
