"""Page statistics in a running engine, after everything that can happen to a page."""

import math
import random
from functools import partial

import pytest
import torch

from entmaxkv_kernels import Counter
from entmaxkv_kernels.reference.boxes import box_around
from entmaxkv_vllm.metrics import EntmaxKVCollector
from entmaxkv_vllm.retrieval import haystack_window, needle_prompt
from entmaxkv_vllm.telemetry import engine_counters, read_counters

from .engines import engine, layers_of, metric
from .recount import RECORDED, Recount

pytestmark = pytest.mark.engine

NEW_TOKENS = 40


SELECTORS = [{"selector": "gaussian"}, {"selector": "topk", "token_budget": 256}]


@pytest.fixture(scope="module", params=SELECTORS, ids=["gaussian", "topk"])
def llm(request):
    options = request.param | {"exact_below": 256}
    with engine(
        max_model_len=4096,
        num_gpu_blocks_override=264,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        additional_config={"entmaxkv": options},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def used(llm, tokenizer):
    """The engine after ragged batches, shared prefixes, preemption and reuse of every block: how
    many pages were compared on the way, and what the steps should have counted."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    from entmaxkv_vllm.impl import EntmaxKVImpl

    rng = random.Random(11)
    prefix = tokenizer(haystack_window(rng, 700, held_out=True)).input_ids
    prompts = [
        tokenizer(needle_prompt(rng, tokens=rng.randint(300, 1200), keys=2).prompt).input_ids
        for _ in range(12)
    ]
    prompts += [prefix + [rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    prompts.append(tokenizer(haystack_window(rng, 3000, held_out=True)).input_ids)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]

    compared, recount, decode = [], Recount(), EntmaxKVImpl._decode

    def compare_and_decode(self, layer, query, pages, rows, *rest):
        compared.append(compare(pages, rows))
        run = partial(decode, self, layer, query, pages, rows, *rest)
        recount.watch(self, layer, query, rows, run)

    append = EntmaxKVImpl.append_tokens

    def note_and_append(self, layer, key, value, pages, slots):
        recount.note_appended(self, slots)
        append(self, layer, key, value, pages, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EntmaxKVImpl, "_decode", compare_and_decode)
        patch.setattr(EntmaxKVImpl, "append_tokens", note_and_append)
        for _ in range(2):
            llm.generate(requests, sampling, use_tqdm=False)
            rng.shuffle(requests)
    return sum(compared), recount


def compare(pages, rows) -> int:
    """Compare the statistics of all pages that a decode step may read with its keys."""
    page_size = pages.layout.page_size
    count = 0
    for table, length in zip(rows.block_table, rows.seq_lens.tolist(), strict=True):
        full, rest = divmod(length, page_size)
        ids = table[:full].long()
        compare_pages(pages, ids, pages.key[ids])
        if rest:
            last = table[full : full + 1].long()
            compare_pages(pages, last, pages.key[last, :, :rest])
        count += full + bool(rest)
    return count


def compare_pages(pages, ids, rows) -> None:
    """Statistics of pages [pages] are those of their keys [pages, kv_heads, rows, D]."""
    assert not pages.layout.coded
    if pages.layout.bounded:
        statistics, scales = box_around(rows, torch.ones(rows.shape[-2], 1, dtype=torch.bool))
        assert torch.equal(pages.statistics[ids].float(), statistics.float())
        assert torch.equal(pages.scales[ids], scales)
    else:
        rows = rows.double()
        expected = torch.stack((rows.mean(-2), rows.std(-2, correction=0).clamp_min(1e-6)), -2)
        found = pages.statistics[ids].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_at_every_decode_step_every_page_holds_the_statistics_of_its_own_rows(llm, used):
    compared, _ = used
    assert compared > 100_000
    assert metric(llm, "vllm:num_preemptions") > 0
    assert metric(llm, "vllm:prefix_cache_hits") > 0


def test_the_sparse_path_ran_and_read_less_than_it_held(llm, used):
    counters = engine_counters(llm)
    assert counters["sparse_steps"] > 0
    assert counters["pages_read"] < counters["pages_held"]
    by_layer = read_counters(llm.llm_engine.vllm_config.instance_id)
    assert by_layer.shape[0] == len(layers_of(llm))
    assert (by_layer.sum(1) > 0).all()


def test_the_metrics_add_up_to_what_the_lengths_of_all_steps_say(llm, used):
    _, recount = used
    instance = llm.llm_engine.vllm_config.instance_id
    families = EntmaxKVCollector(instance, "needle").collect()
    shown = {family.name: family.samples[0].value for family in families}
    told = set(recount.expected)
    if layers_of(llm)[0].impl.config.selector == "gaussian":
        told -= {Counter.PAGES_READ}
    assert len(told) >= 5
    for counter in told:
        assert shown[f"entmaxkv_{counter.name.lower()}"] == recount.expected[counter]


def test_recorded_steps_counted_the_pages_on_whose_keys_their_output_depends(used):
    _, recount = used
    assert len(recount.recorded) == RECORDED
    for step in recount.recorded:
        read = step.pages_read()
        assert step.counted[Counter.PAGES_READ] == read
        assert 0 < read < step.counted[Counter.PAGES_HELD]


def test_the_statistics_are_planned_in_vllms_cache_memory(llm):
    for layer in layers_of(llm):
        spec = layer.get_attn_backend().customize_spec(
            layer.get_kv_cache_spec(llm.llm_engine.vllm_config)
        )
        assert spec.page_size_bytes * 264 == layer.kv_cache.untyped_storage().nbytes() // len(
            layers_of(llm)
        )
        size = layer.head_size
        if layer.impl.config.selector == "gaussian":
            elements = (2 + 2 / 16) * size
        else:  # 16 keys and values and a box, in elements of 2 bytes, to a multiple of 128 bytes
            elements = math.ceil((64 * size + 2 * size + 8) / 128) * 128 / 2 / 16
        assert spec.state_content_bytes == elements * 4
