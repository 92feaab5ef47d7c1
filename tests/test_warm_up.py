"""What is compiled before the first request is what requests launch."""

from types import SimpleNamespace

import pytest
import torch

from entmaxkv_kernels import PageLayout
from entmaxkv_kernels.triton.workspace import power_of_two
from entmaxkv_vllm import scratch, warm_up
from entmaxkv_vllm.metadata import DecodeRows, EntmaxKVMetadata


class Layer:
    """As much of a layer's implementation as warming up asks for; it notes its calls."""

    num_heads, num_kv_heads, head_size = 4, 2, 32
    selector = sliding_window = None
    alpha, max_batched_tokens, local_workers = 1.5, 8192, 1
    config = SimpleNamespace(selector="topk")

    def __init__(self, max_sequences):
        self.max_sequences = max_sequences
        self.decoded, self.prefilled, self.appended = [], [], []

    def index_of(self, layer):
        return 0

    def append_tokens(self, layer, key, value, pages, slots):
        assert (slots < 0).all()

    def decode_appends(self, pages, rows):
        return True

    def decode_rows(self, index, query, pages, rows, output, options, new_tokens):
        assert new_tokens is None or len(new_tokens.slot_mapping) == rows.count
        self.decoded.append(rows)
        self.appended.append(new_tokens is not None)

    def prefill_rows(self, query, pages, rows, output, options):
        self.prefilled.append(rows)


@pytest.fixture
def warm(monkeypatch):
    """Warms up a layer whose served block tables have 125 columns in rows of 128."""
    monkeypatch.setattr(warm_up, "_compiled", set())
    table = torch.zeros(3, 128, dtype=torch.int32)[:, :125]
    rows = DecodeRows(1, table[:1], torch.zeros(1, dtype=torch.int32), None)
    metadata = EntmaxKVMetadata(torch.zeros(1, dtype=torch.int64), rows, None)
    layout = PageLayout(16, 32, ())

    def warm(layer, padding=0):
        key = torch.zeros(4, 2, 16, 32 + padding)[..., :32]
        pages = SimpleNamespace(layout=layout, key=key)
        query = torch.zeros(1, layer.num_heads, layer.head_size)
        return warm_up.compile_kernels(layer, None, query, pages, metadata, {})

    return warm


def test_block_tables_are_as_wide_and_as_far_apart_as_served_ones(warm):
    layer = Layer(max_sequences=5)
    assert warm(layer)
    for rows in (*layer.decoded, *layer.prefilled):
        assert rows.block_table.shape[1] == 125 and rows.block_table.stride(0) == 128
    assert layer.decoded and layer.prefilled


@pytest.mark.parametrize("most", [1, 12, 100, 128, 1000])
def test_every_batch_is_divided_like_one_that_was_compiled(warm, most):
    layer = Layer(most)
    warm(layer)
    steps = zip(layer.decoded, layer.appended, strict=True)
    compiled = {(power_of_two(rows.count), appended) for rows, appended in steps}
    served = range(1, min(most, scratch.DECODE_ROWS) + 1)
    assert {(power_of_two(n), appended) for n in served for appended in (True, False)} == compiled


def test_a_layer_of_the_same_kind_is_compiled_once(warm):
    first, second = Layer(3), Layer(3)
    assert warm(first) and warm(second)
    assert first.decoded and not second.decoded


def test_a_layer_whose_pages_lie_further_apart_is_compiled_too(warm):
    first, second = Layer(3), Layer(3)
    assert warm(first) and warm(second, padding=16)
    assert first.decoded and second.decoded


def test_what_could_not_be_compiled_is_tried_again(warm, monkeypatch):
    def fail(*given):
        raise RuntimeError("no compiler")

    layer = Layer(3)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no compiler"):
        patch.setattr(layer, "prefill_rows", fail)
        warm(layer)
    layer.decoded.clear()
    assert warm(layer) and layer.decoded
