"""What ENTMAXKV refuses, it refuses while vLLM reads its configuration: nothing starts."""

import json

import pytest
import torch
from tabulate_support import ORDINARY_LAYER
from vllm.platforms.interface import DeviceCapability

from entmaxkv_vllm import DEMO_MODEL

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "entmax_alpha": 1.5,
    "torch_dtype": "float32",
}
NAPE = {**LLAMA, "architectures": ["NapeLlamaForCausalLM"], "model_type": "nape_llama"}
GEMMA2 = {
    **LLAMA,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
}


@pytest.fixture
def start(tmp_path):
    """Reads a model's configuration as `vllm serve` would, up to where processes would start."""

    def _start(model=LLAMA, options=None, **arguments):
        from vllm.engine.arg_utils import EngineArgs

        (tmp_path / "config.json").write_text(json.dumps(model))
        if "attention_config" not in arguments:
            arguments = {"attention_backend": "ENTMAXKV"} | arguments
        return EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            additional_config={"entmaxkv": options} if options else {},
            **arguments,
        ).create_engine_config()

    return _start


def test_a_good_configuration_is_accepted_and_takes_the_page_as_its_block(start):
    assert start().cache_config.block_size == 16
    assert start(options={"page_size": 64}).cache_config.block_size == 64
    assert start(NAPE | {"attn_scale_type": "learn"}).cache_config.block_size == 16


def test_a_block_of_several_pages_is_accepted(start):
    assert start(block_size=128).cache_config.block_size == 128


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        pytest.param(LLAMA | {"entmax_alpha": 3.0}, {}, r"=3.0 is outside \[1, 2\]", id="alpha"),
        pytest.param(
            LLAMA | {"entmax_alpha": [1.5] * 3}, {}, "has 3 entries .* 4 query heads", id="alphas"
        ),
        pytest.param(LLAMA | {"entmax_alpha": None}, {}, "is missing", id="missing-alpha"),
        pytest.param(
            NAPE | {"alibi_num_heads": 5}, {}, "=5 .* 4 .*; give 0 to 4", id="alibi-heads"
        ),
        pytest.param(NAPE | {"alibi_slopes": [1, 0]}, {}, "an entry for each query", id="slopes"),
        pytest.param(
            NAPE | {"alibi_slopes": [1, 0, 0, -1]}, {}, "slopes=-1 is no slope", id="slope"
        ),
        pytest.param(
            NAPE | {"alibi_slope_type": "log"}, {}, "'log' .* linear, exp", id="slope-type"
        ),
        pytest.param(
            NAPE | {"attn_scale_type": "lern"}, {}, "choose from null, l", id="scale-type"
        ),
        pytest.param(NAPE | {"attn_scale_delta": "1"}, {}, "delta='1' is not a number", id="delta"),
        pytest.param(
            NAPE | {"attn_scale_type": "learn", "alibi_slopes": [0, 0, 1, 1]},
            {},
            "attn_scale_type='learn' scales the last heads",
            id="scaled-heads-in-front",
        ),
        pytest.param(LLAMA, {"options": {"selector": "top-k"}}, "'topk'", id="selector"),
        pytest.param(LLAMA, {"options": {"budget": 64}}, "'token_budget'", id="option"),
        pytest.param(
            LLAMA,
            {"options": {"selector": "topk", "token_budget": 8}},
            "less than one page",
            id="token-budget",
        ),
        pytest.param(LLAMA, {"options": {"page_size": 20}}, "page_size=20", id="page-size"),
        pytest.param(
            LLAMA | {"head_dim": 80, "entmax_alpha": 1.5},
            {"options": {"page_size": 128, "selector": "gaussian"}},
            "page_size=128 does not fit head size 80",
            id="page-size-and-head-size",
        ),
        pytest.param(
            LLAMA,
            {"options": {"page_size": 64}, "block_size": 32},
            "block_size=32 is not a multiple of entmaxkv's page_size 64",
            id="block-size",
        ),
        pytest.param(
            LLAMA | {"head_dim": 48},
            {},
            "head_size=48 not supported; s",
            id="head-size",
        ),
        pytest.param(
            LLAMA,
            {"kv_cache_dtype": "fp8_e5m2"},
            "kv_cache_dtype=fp8_e5m2 not supported",
            id="another-fp8-cache",
        ),
        pytest.param(
            LLAMA,
            {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
            # Newer versions of vLLM refuse it by themselves.
            r"kv_cache_dtype=\W?bfloat16\W? (differs from|is incompatible with) dtype=",
            id="cache-of-another-type",
        ),
        pytest.param(
            LLAMA | {"attention_chunk_size": 512},
            {},
            "attention_chunk_size=512 is not supported",
            id="chunked-local-attention",
        ),
        pytest.param(
            LLAMA,
            {
                "options": {"selector": "gaussian"},
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
            },
            "speculative_config='ngram' verifies several tokens at once",
            id="speculative-decoding-with-a-sparse-selector",
        ),
        pytest.param(
            LLAMA | {"vocab_size": 259},
            {
                "speculative_config": {
                    "method": "draft_model",
                    "model": str(DEMO_MODEL),
                    "num_speculative_tokens": 3,
                },
            },
            "speculative_config='draft_model' drafts with attention layers of its own",
            id="a-model-that-drafts",
        ),
        pytest.param(
            LLAMA,
            {"options": {"selector": "gaussian-paper"}, "tensor_parallel_size": 2},
            "selector='gaussian-paper' goes by the mean over all heads, of which each of 2 ranks",
            id="the-paper-s-rule-over-ranks",
        ),
        pytest.param(GEMMA2, {}, "attn_logit_softcapping=50.0 is not supported", id="soft-cap"),
    ],
)
def test_a_mistake_stops_the_start_with_one_clear_error(start, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        start(model, **arguments)


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param({"attention_backend": "entmaxkv"}, id="attention-backend-in-lower-case"),
        pytest.param({"attention_backend": "CUSTOM"}, id="the-custom-fallback"),
        pytest.param({"attention_config": {"backend": "ENTMAXKV"}}, id="attention-config"),
        pytest.param(
            {"attention_config": {"backend_per_kind": {"full_attention": "ENTMAXKV"}}},
            id="backend-per-kind",
        ),
    ],
)
def test_every_way_to_select_the_backend_reaches_its_checks(start, selection):
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert start(**selection).cache_config.block_size == 16
    with pytest.raises(ValueError, match="outside"):
        start(LLAMA | {"entmax_alpha": 7}, **selection)


def test_an_fp8_cache_is_accepted(start):
    assert start(kv_cache_dtype="fp8").cache_config.cache_dtype == "fp8"


def test_compiled_kernels_without_a_gpu_are_refused(start, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="implementation='triton' needs a GPU"):
        start(options={"implementation": "triton"})


def test_another_backend_is_left_alone(start):
    start(LLAMA | {"entmax_alpha": 7}, attention_backend=None)


def test_a_model_trained_with_entmax_but_served_with_softmax_is_warned_about(start, caplog):
    import logging

    logger = logging.getLogger("vllm.entmaxkv")
    logger.addHandler(caplog.handler)
    try:
        start(attention_backend=None)
    finally:
        logger.removeHandler(caplog.handler)
    assert "was trained with entmax attention but is served with softmax" in caplog.text


def test_a_softmax_model_is_served_once_told_so(start):
    softmax = {name: value for name, value in LLAMA.items() if name != "entmax_alpha"}
    start(softmax, options={"alpha": 1.0, "selector": "topk"})


def test_hf_overrides_reach_the_configuration(start):
    from entmaxkv_vllm import config

    engine = start(hf_overrides={"entmax_alpha": 1.25})
    resolved = config.from_vllm(engine)
    assert resolved.alpha == 1.25
    assert resolved.sources["alpha"] == "--hf-overrides"


def test_one_line_of_log_says_what_is_in_force_and_where_it_came_from(start):
    import logging

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.entmaxkv")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        start(options={"selector": "topk", "token_budget": 400})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert "EntmaxKV kernels: reference" in lines
    (line,) = [line for line in lines if "in force" in line]
    assert "token_budget=400 (--additional-config)" in line
    assert "page_size=16 (default)" in line


@pytest.fixture
def layer():
    """What vLLM asks a backend about one attention layer."""
    return ORDINARY_LAYER | {"dtype": torch.float16}


def test_an_ordinary_decoder_layer_is_accepted(layer):
    from entmaxkv_vllm.backend import EntmaxKVBackend

    assert EntmaxKVBackend.validate_configuration(**layer) == []
    assert EntmaxKVBackend.validate_configuration(**layer | {"has_sliding_window": True}) == []


@pytest.mark.parametrize("capability, refused", [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_an_fp8_cache_is_refused_on_a_gpu_without_fp8(layer, capability, refused):
    from entmaxkv_vllm.backend import EntmaxKVBackend

    layer |= {"kv_cache_dtype": "fp8", "device_capability": DeviceCapability(*capability)}
    reasons = EntmaxKVBackend.validate_configuration(**layer)
    assert any("kv_cache_dtype=fp8 needs a GPU" in reason for reason in reasons) is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"dtype": torch.float64}, "dtype=torch.float64 not", id="dtype"),
        pytest.param({"head_size": 72}, "head_size=72 not", id="head-size"),
        pytest.param({"attn_type": "encoder"}, "attention type encoder", id="encoder"),
        pytest.param({"attn_type": "encoder_only"}, "attention type encoder_only", id="pooling"),
        pytest.param({"use_mla": True}, "MLA not supported", id="mla"),
        pytest.param({"has_sink": True}, "attention sinks not supported", id="sinks"),
        pytest.param({"use_dcp": True}, "DCP not supported", id="decode-context"),
        pytest.param({"use_pcp": True}, "PCP not supported", id="prefill-context"),
        pytest.param({"use_kv_connector": True}, "KV connector not supported", id="connector"),
        pytest.param({"use_non_causal": True}, "non-causal attention not supported", id="causal"),
    ],
)
def test_an_unsupported_layer_is_refused_with_its_reason_and_a_remedy(layer, change, message):
    from entmaxkv_vllm.backend import EntmaxKVBackend

    (reason,) = EntmaxKVBackend.validate_configuration(**layer | change)
    problem, _, remedy = reason.partition("; ")
    assert message in problem
    assert remedy.startswith(("use ", "leave ", "serve ", "supported are", "entmax has no"))


def test_every_remedy_answers_a_reason_that_vllm_gives():
    import inspect

    from vllm.v1.attention.backend import AttentionBackend

    from entmaxkv_vllm.backend import REMEDIES

    source = inspect.getsource(AttentionBackend.validate_configuration)
    for reason in REMEDIES:
        assert f'"{reason}"' in source


def test_the_cpu_platform_turns_reasons_into_one_error(layer):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from entmaxkv_vllm import plugin
    from entmaxkv_vllm.platform import EntmaxKVCpuPlatform

    plugin.register()
    del layer["device_capability"]
    chosen = AttentionBackendEnum["ENTMAXKV"]
    good = AttentionSelectorConfig(**layer)
    assert EntmaxKVCpuPlatform.get_attn_backend_cls(chosen, good) == plugin.BACKEND_PATH
    with pytest.raises(ValueError, match=r"cannot serve .*: head_size=72 not"):
        EntmaxKVCpuPlatform.get_attn_backend_cls(chosen, good._replace(head_size=72))
    other = EntmaxKVCpuPlatform.get_attn_backend_cls(None, good)
    assert other == AttentionBackendEnum.CPU_ATTN.get_path()
