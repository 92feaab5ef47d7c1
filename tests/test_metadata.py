"""The builder: what decodes, what prefills, and what a CUDA graph may keep."""

from types import SimpleNamespace

import pytest
import torch

from entmaxkv_vllm import config, metadata

PAGE = 16
MAX_PAGES = 8


def builder(monkeypatch, selector="topk", kernels="triton", max_num_seqs=8):
    settings = config.EntmaxKVConfig(alpha=1.5, selector=selector, implementation=kernels)
    monkeypatch.setattr(metadata, "from_vllm", lambda engine: settings)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=MAX_PAGES * PAGE - 3),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
    )
    spec = SimpleNamespace(block_size=PAGE)
    return metadata.EntmaxKVMetadataBuilder(spec, ["layer"], engine, torch.device("cpu"))


def batch(query_lens, prefilling=None, padded=0):
    """As much of vLLM's common metadata as the builder reads; `padded` rows of a captured size."""
    rows = len(query_lens) + padded
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    starts = torch.cat([starts, starts[-1:].expand(padded)])
    return SimpleNamespace(
        num_reqs=rows,
        num_actual_tokens=rows if padded else int(starts[-1]),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        max_query_len=max(query_lens),
        seq_lens=torch.full((rows,), 20, dtype=torch.int32),
        block_table_tensor=torch.zeros(rows, MAX_PAGES + 5, dtype=torch.int32),
        slot_mapping=torch.arange(rows if padded else int(starts[-1])),
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )


def test_rows_of_one_token_decode_and_all_after_them_prefill(monkeypatch):
    common = batch([1, 1, 5, 1, 7], [False, False, True, True, True])
    built = builder(monkeypatch).build(0, common)
    assert built.decode.count == 2
    assert built.decode.exact.tolist() == [False, False]
    assert built.prefill.query_start_loc.tolist() == [2, 7, 8, 15]
    assert built.prefill.last_token == 15
    assert len(built.prefill.seq_lens) == len(built.prefill.block_table) == 3
    assert built.slot_mapping is common.slot_mapping


@pytest.mark.parametrize(("lens", "kind"), [([1, 1], "prefill"), ([4, 3], "decode")])
def test_a_batch_of_one_kind_has_none_of_the_other(monkeypatch, lens, kind):
    built = builder(monkeypatch).build(0, batch(lens, [False, False]))
    assert getattr(built, kind) is None


def test_the_single_token_of_an_unfinished_prompt_decodes_exactly(monkeypatch):
    build = builder(monkeypatch).build
    # vLLM's V2 runner does not sort these behind others of one token.
    first = build(0, batch([1, 1, 1], [True, False, True]))
    assert first.decode.exact.tolist() == [True, False, True]
    second = build(0, batch([1, 1, 1], [False, False, False]))
    assert second.decode.exact.tolist() == [False, False, False]
    assert second.decode.exact.data_ptr() == first.decode.exact.data_ptr()


def test_padded_rows_decode_and_no_flag_of_an_earlier_step_stays_on_them(monkeypatch):
    build = builder(monkeypatch).build
    build(0, batch([1, 1, 1, 1], [True] * 4))
    # The V2 runner gives no flags for padded rows.
    built = build(0, batch([1], [True], padded=3))
    assert built.decode.count == 4
    assert built.decode.exact.tolist() == [True, False, False, False]


def test_what_a_graph_reads_is_memory_that_stays(monkeypatch):
    build = builder(monkeypatch).build
    common = batch([1, 1], [False, False], padded=2)
    rows = [build(0, common).decode for _ in range(2)]
    for row in rows:
        assert row.block_table.data_ptr() == common.block_table_tensor.data_ptr()
        assert row.seq_lens.data_ptr() == common.seq_lens.data_ptr()
        assert row.block_table.shape == (4, MAX_PAGES)
    assert rows[0].exact.data_ptr() == rows[1].exact.data_ptr()


def test_a_capture_reads_and_counts_nothing(monkeypatch):
    common = batch([1, 1, 1])
    built = builder(monkeypatch).build_for_cudagraph_capture(common)
    assert built.decode.count == 3
    assert built.decode.seq_lens.tolist() == [0, 0, 0]
    assert built.prefill is None


def test_the_exact_selector_needs_no_flags(monkeypatch):
    built = builder(monkeypatch, selector="exact").build(0, batch([1, 1], [True, False]))
    assert built.decode.exact is None


@pytest.mark.parametrize(
    ("kernels", "support"), [("triton", "UNIFORM_SINGLE_TOKEN_DECODE"), ("reference", "NEVER")]
)
def test_the_compiled_kernels_alone_are_captured(monkeypatch, kernels, support):
    kind = type(builder(monkeypatch, kernels=kernels))
    assert kind.get_cudagraph_support(None, None).name == support
