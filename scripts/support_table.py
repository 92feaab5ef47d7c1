"""What people combine with ENTMAXKV: how to ask the code about it, which tests show that it works.

A line says nothing about support by itself: `tabulate_support` asks the code whether the feature
is refused, and calls it supported only where a test is named.
"""

from dataclasses import dataclass, field
from typing import Any

from entmaxkv_vllm import DEMO_MODEL

ENGINE = "tests/engine/"
EXACT = f"{ENGINE}test_exact.py::"
OPTIONS = f"{ENGINE}test_options.py::"
ARCHITECTURES = f"{ENGINE}test_architectures.py::"
STATISTICS = f"{ENGINE}test_statistics.py::"
PARALLEL = f"{ENGINE}test_parallel.py::"
SERVING = f"{ENGINE}test_serving.py::"
GPU = "tests/gpu/test_serving.py::"
GPUS = "tests/gpu/test_parallel.py::"
GPU_SERVER = "tests/gpu/test_server.py::"
COMPILED = "tests/compiled/test_exact.py::"
DECODE = "tests/reference/test_decode.py::"
PREFILL = "tests/reference/test_prefill.py::"


@dataclass(frozen=True)
class Line:
    """One feature.

    Attributes:
        feature: as a user would call it; `{name}` stands for a value of the code, see
            `tabulate_support.values`.
        layer: arguments of `EntmaxKVBackend.validate_configuration` that stand for it.
        engine: arguments of vLLM's `EngineArgs` that stand for it.
        model: entries of config.json that stand for it.
        cpu, gpu: a test, `file::function`, that shows it through the engine (or, where the
            engine adds nothing, in the attention functions) on that device, and has passed there.
        not_on_cpu, not_on_gpu: why that device does not have it, where no configuration is refused
            for it.
    """

    feature: str
    layer: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    cpu: str = ""
    gpu: str = ""
    not_on_cpu: str = ""
    not_on_gpu: str = ""


def options(**values: Any) -> dict[str, Any]:
    """Arguments of `EngineArgs` that set options of this package."""
    return {"additional_config": {"entmaxkv": values}}


NGRAM = {"method": "ngram", "num_speculative_tokens": 3}

MODELS = (
    Line(
        "causal decoders with grouped-query heads",
        cpu=f"{EXACT}test_greedy_tokens_are_those_of_the_oracle",
        gpu=f"{GPU}test_greedy_tokens_are_those_of_the_reference_on_a_cpu",
    ),
    Line(
        "head sizes {head_sizes}",
        cpu=f"{DECODE}test_head_groups_and_head_sizes_match_dense_attention",
        gpu=f"{COMPILED}test_every_shape_of_heads_and_pages_is_exact",
    ),
    Line("other head sizes", layer={"head_size": 72}),
    Line(
        "float32",
        cpu=f"{EXACT}test_logits_agree_with_the_oracle_to_a_ten_thousandth",
        gpu=f"{GPU}test_greedy_tokens_are_those_of_the_reference_on_a_cpu",
    ),
    Line(
        "float16, bfloat16",
        cpu=f"{OPTIONS}test_half_precision_answers_right",
        gpu=f"{OPTIONS}test_half_precision_answers_right",
    ),
    Line(
        "an alpha for each query head",
        model={"entmax_alpha": [1.5] * 31 + [1.0]},
        cpu=f"{OPTIONS}test_heads_with_alphas_of_their_own_attend_each_with_its_own",
    ),
    Line(
        "softmax (alpha 1)",
        model={"entmax_alpha": 1.0},
        cpu=f"{ARCHITECTURES}test_alibi_slopes_reach_the_kernels",
        gpu=f"{ARCHITECTURES}test_alibi_slopes_reach_the_kernels",
    ),
    Line(
        "ALiBi",
        cpu=f"{ARCHITECTURES}test_alibi_slopes_reach_the_kernels",
        gpu=f"{COMPILED}test_heads_have_their_own_alpha_and_slope_and_see_a_window",
    ),
    Line(
        "NAPE: ALiBi on some heads, scaled queries on others",
        cpu=f"{ENGINE}test_nape.py::test_greedy_tokens_and_logits_are_those_of_plain_pytorch",
        gpu=f"{ENGINE}test_nape.py::test_greedy_tokens_and_logits_are_those_of_plain_pytorch",
    ),
    Line(
        "sliding-window layers among full ones",
        layer={"has_sliding_window": True},
        cpu=f"{ARCHITECTURES}test_sliding_window_layers_among_full_ones_agree_with_the_oracle",
        gpu=f"{ARCHITECTURES}test_sliding_window_layers_among_full_ones_agree_with_the_oracle",
    ),
    Line("logit soft caps", model={"attn_logit_softcapping": 50.0}),
    Line("chunked local attention", model={"attention_chunk_size": 512}),
    Line("attention sinks", layer={"has_sink": True}),
    Line("MLA", layer={"use_mla": True}),
    Line("encoders, encoder-only (pooling) models", layer={"attn_type": "encoder_only"}),
    Line("cross-attention", layer={"attn_type": "encoder_decoder"}),
    Line("non-causal attention", layer={"use_non_causal": True}),
    Line("bidirectional attention over images", layer={"use_mm_prefix": True}),
    Line("R-SWA", layer={"use_rswa": True}),
)

CACHE = (
    Line(
        "the cache in the model's dtype",
        cpu=f"{EXACT}test_greedy_tokens_are_those_of_the_oracle",
        gpu=f"{GPU}test_greedy_tokens_are_those_of_the_reference_on_a_cpu",
    ),
    Line(
        "fp8 cache, `exact`",
        engine={"kv_cache_dtype": "fp8"},
        cpu=f"{OPTIONS}test_an_fp8_cache_answers_right",
        gpu=f"{GPU}test_an_fp8_cache_serves_in_graphs_and_answers_as_in_eager_steps",
    ),
    Line(
        "fp8 cache, a sparse selector",
        engine={"kv_cache_dtype": "fp8", **options(selector="gaussian")},
        cpu=f"{OPTIONS}test_an_fp8_cache_answers_right",
        gpu=f"{OPTIONS}test_an_fp8_cache_answers_right",
    ),
    Line("scales for each head of an fp8 cache", layer={"use_per_head_quant_scales": True}),
    Line("`--kv-cache-dtype` {other_cache_dtypes}", layer={"kv_cache_dtype": "nvfp4"}),
    Line(
        "pages of {page_sizes} tokens",
        cpu=f"{DECODE}test_reading_every_page_of_ragged_batches_matches_dense_attention",
    ),
    Line(
        "blocks of several pages",
        engine={"block_size": 128},
        cpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
        gpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
    ),
    Line("blocks of a part of a page", engine={"block_size": 16, **options(page_size=64)}),
    Line(
        "cache layouts {layouts}",
        cpu=f"{OPTIONS}test_every_declared_cache_layout_answers_right",
        gpu=f"{OPTIONS}test_every_declared_cache_layout_answers_right",
    ),
    Line(
        "prefix caching",
        cpu=f"{EXACT}test_logits_agree_with_the_oracle_to_a_ten_thousandth",
        gpu=f"{GPU}test_requests_were_preempted_and_prefixes_cached",
    ),
    Line(
        "KV connectors: transfer between servers, offload to CPU memory",
        layer={"use_kv_connector": True},
    ),
    Line(
        "sharing of the cache between layers for fast prefill",
        engine={"kv_sharing_fast_prefill": True},
    ),
)

SCHEDULING = (
    Line(
        "chunked prefill",
        cpu=f"{EXACT}test_the_run_was_preempted_and_its_prefill_was_chunked",
        gpu=f"{GPU}test_greedy_tokens_are_those_of_the_reference_on_a_cpu",
    ),
    Line(
        "preemption",
        cpu=f"{EXACT}test_the_run_was_preempted_and_its_prefill_was_chunked",
        gpu=f"{GPU}test_requests_were_preempted_and_prefixes_cached",
    ),
    Line(
        "async scheduling",
        not_on_cpu="vLLM turns it off",
        gpu=f"{GPU}test_steps_were_scheduled_while_the_one_before_ran",
    ),
    Line(
        "CUDA graphs for decode",
        not_on_cpu="it has none",
        gpu=f"{GPU}test_an_fp8_cache_serves_in_graphs_and_answers_as_in_eager_steps",
    ),
    Line(
        "n-gram speculative decoding, `exact`",
        engine={"speculative_config": NGRAM},
        cpu=f"{OPTIONS}test_speculative_decoding_answers_right_with_exact",
        gpu=f"{OPTIONS}test_speculative_decoding_answers_right_with_exact",
    ),
    Line(
        "speculative decoding, a sparse selector",
        engine={"speculative_config": NGRAM, **options(selector="gaussian")},
    ),
    Line(
        "speculative decoding with a draft model (EAGLE, MTP and others)",
        model={"vocab_size": 259},
        engine={
            "speculative_config": {
                "method": "draft_model",
                "model": str(DEMO_MODEL),
                "num_speculative_tokens": 3,
            }
        },
    ),
    Line("adaptive verification", layer={"use_adaptive_verification": True}),
    Line("batch invariance", layer={"use_batch_invariant": True}),
    Line(
        "structured output",
        cpu=f"{SERVING}test_structured_output_is_one_of_the_choices",
        gpu=f"{GPU_SERVER}test_structured_output_is_one_of_the_choices",
    ),
    Line(
        "LoRA",
        cpu=f"{ENGINE}test_lora.py::test_an_adapter_answers_as_a_model_that_has_its_weights",
    ),
    Line(
        "sleep and wake",
        not_on_cpu="vLLM has it for GPUs",
        gpu="tests/gpu/test_sleep.py::test_captured_steps_answer_as_before_after_each_level_of_sleep",
    ),
    Line(
        "layers kept dense (`dense_layers`)",
        engine=options(selector="topk", dense_layers=[0]),
        cpu=f"{OPTIONS}test_dense_layers_read_every_page_and_keep_no_statistics_up_to_date",
        gpu=f"{OPTIONS}test_dense_layers_read_every_page_and_keep_no_statistics_up_to_date",
    ),
    Line(
        "the selectors `topk` and `gaussian`",
        cpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
        gpu=f"{GPU}test_sparse_selectors_read_less_and_give_the_reference_s_tokens",
    ),
    Line(
        "the selector `gaussian-paper`",
        engine=options(selector="gaussian-paper"),
        cpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
        gpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
    ),
    Line(
        "the selector `adaptive`",
        engine=options(selector="adaptive"),
        cpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
        gpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
    ),
    Line(
        "`exact` that leaves out what bounds rule out (`prune`)",
        engine=options(prune=True),
        cpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
        gpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
    ),
    Line(
        "codes of keys in place of boxes (`codes`)",
        engine=options(selector="topk", codes=True),
        cpu=f"{OPTIONS}test_every_selector_and_page_size_answers_right_while_leaving_pages_unread",
    ),
    Line(
        "counters of what steps prove (`certificate`)",
        engine=options(selector="topk", certificate=True),
        cpu=f"{OPTIONS}test_certificates_count_every_query_head_of_every_step_once",
        gpu=f"{OPTIONS}test_certificates_count_every_query_head_of_every_step_once",
    ),
    Line(
        "statistics after reuse, preemption and shared prefixes",
        engine=options(selector="gaussian"),
        cpu=f"{STATISTICS}test_at_every_decode_step_every_page_holds_the_statistics_of_its_own_rows",
        gpu=f"{STATISTICS}test_at_every_decode_step_every_page_holds_the_statistics_of_its_own_rows",
    ),
)

PROCESSES = (
    Line(
        "tensor parallelism",
        cpu=f"{PARALLEL}test_two_ranks_read_the_pages_that_one_reads_and_answer_the_same",
        gpu=f"{GPUS}test_two_gpus_give_the_tokens_of_the_reference",
    ),
    Line(
        "pipeline parallelism",
        gpu=f"{GPUS}test_two_gpus_give_the_tokens_of_the_reference",
        not_on_cpu="vLLM 0.32's CPU worker fails, also with its own attention backend",
    ),
    Line(
        "data parallelism",
        cpu=f"{SERVING}test_both_engines_decode_and_are_counted",
    ),
    Line(
        "tensor parallelism, the selector `gaussian-paper`",
        engine={"tensor_parallel_size": 2, **options(selector="gaussian-paper")},
    ),
    Line("Ray", not_on_cpu="vLLM does not support it there"),
    Line("decode context parallelism", layer={"use_dcp": True}),
    Line("prefill context parallelism", layer={"use_pcp": True}),
)

SECTIONS = (
    ("Models", MODELS),
    ("Cache", CACHE),
    ("Scheduling and decoding", SCHEDULING),
    ("Several processes", PROCESSES),
)
