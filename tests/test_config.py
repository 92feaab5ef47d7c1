"""The configuration: where values come from, and one readable error for each mistake."""

import pytest

from entmaxkv_kernels import Adaptive, Exact, TopK
from entmaxkv_vllm.cache import page_layout, selector_of
from entmaxkv_vllm.config import ConfigurationError, resolve


def settle(checkpoint=None, heads=4, layers=5, **options):
    return resolve(
        {"entmax_alpha": 1.5} if checkpoint is None else checkpoint,
        additional={"entmaxkv": options} if options else {},
        num_query_heads=heads,
        num_layers=layers,
    )


def test_alpha_comes_from_the_checkpoint_and_the_rest_defaults_to_fidelity():
    config = settle()
    assert config.alpha == 1.5
    assert config.selector == "exact"
    assert config.describe("alpha") == "alpha=1.5 (config.json entmax_alpha)"
    assert config.describe("selector") == "selector=exact (default)"


def test_hf_overrides_are_named_as_the_source_of_alpha():
    config = resolve(
        {"entmax_alpha": 1.25},
        overrides={"entmax_alpha": 1.25},
        num_query_heads=4,
        num_layers=5,
    )
    assert config.alpha == 1.25
    assert config.sources["alpha"] == "--hf-overrides"


@pytest.mark.parametrize(
    "overrides",
    [{"entmax_alpha": 2.0}, {"adasplash_alpha": 2.0}, {"text_config": {"entmax_alpha": 2.0}}],
    ids=["same-spelling", "another-spelling", "nested-text-config"],
)
def test_an_override_wins_over_the_checkpoint_however_it_is_spelled(overrides):
    config = resolve({"entmax_alpha": 1.5}, overrides=overrides, num_query_heads=4, num_layers=5)
    assert (config.alpha, config.sources["alpha"]) == (2.0, "--hf-overrides")


def test_additional_config_wins_over_the_checkpoint():
    config = settle(alpha=2, selector="topk", token_budget=512, page_size=32, dense_layers=[1, 0])
    assert config.certificate is False
    assert settle(selector="topk", certificate=True).certificate is True
    assert (config.alpha, config.selector, config.token_budget) == (2.0, "topk", 512)
    assert (config.page_size, config.dense_layers) == (32, (0, 1))
    assert config.sources["alpha"] == "--additional-config"


def test_pages_hold_the_statistics_that_the_selector_reads():
    adaptive = settle(selector="adaptive", margin=1.25, guard=0, certificate=True)
    assert selector_of(adaptive) == Adaptive(margin=1.25, guard=0)
    assert selector_of(settle(prune=True)) == Exact(prune=True)
    assert page_layout(settle(prune=True), 64).bounded and page_layout(adaptive, 64).bounded
    assert page_layout(settle(), 64).statistics == ()
    coded = settle(selector="topk", token_budget=64, codes=True)
    assert selector_of(coded) == TopK(64, codes=True) and page_layout(coded, 64).coded
    assert page_layout(settle(prune=True, codes=True), 64).coded
    with pytest.raises(ConfigurationError, match=r"codes=True does not fit head size 32: .*leave"):
        page_layout(coded, 32)


@pytest.mark.parametrize("value", [1, "true", None])
def test_a_flag_is_true_or_false_and_nothing_like_it(value):
    assert settle(layer_metrics=True).layer_metrics is True
    assert settle().layer_metrics is False
    with pytest.raises(ConfigurationError, match=r"layer_metrics=.*give true or false"):
        settle(layer_metrics=value)


@pytest.mark.parametrize("key", ["entmax_alpha", "adasplash_alpha", "initial_alpha"])
def test_every_known_spelling_of_alpha_is_read(key):
    assert settle({key: 1.75}).alpha == 1.75


def test_plain_alpha_is_read_only_where_an_entmax_option_stands_beside_it():
    assert settle({"alpha": 2.0, "use_triton_entmax": True}).alpha == 2.0
    with pytest.raises(ConfigurationError, match="missing"):
        settle({"alpha": 2.0})


def test_each_query_head_may_have_its_own_alpha_and_keeps_it_when_heads_are_sharded():
    config = settle({"entmax_alpha": [1.5, 1.5, 1.0, 1.25]})
    assert config.head_alphas(2, 2) == (1.0, 1.25)
    assert config.head_alphas(0, 2) == 1.5
    assert settle().head_alphas(2, 2) == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"alpha": 2.5}, r"alpha .*=2.5 is outside \[1, 2\]", id="alpha-above-2"),
        pytest.param({"alpha": 0.5}, r"alpha .*=0.5 is outside \[1, 2\]", id="alpha-below-1"),
        pytest.param({"alpha": "1.5"}, r"'1.5' is not a number", id="alpha-a-string"),
        pytest.param({"alpha": True}, r"True is not a number", id="alpha-a-boolean"),
        pytest.param({"alpha": float("nan")}, r"nan is outside", id="alpha-not-a-number"),
        pytest.param(
            {"alpha": [1.5, 1.5]},
            r"has 2 entries but the model has 4 query heads",
            id="wrong-number-of-head-alphas",
        ),
        pytest.param({"alpha": [1.5, 1.5, 1.5, 3]}, r"=3 is outside", id="one-head-alpha-wrong"),
        pytest.param(
            {"selector": "gausian"}, r"selector='gausian'.*did you mean 'gaussian'", id="selector"
        ),
        pytest.param(
            {"token_bugdet": 64},
            r"option='token_bugdet' is unknown; did you mean 'token_budget'",
            id="unknown-option",
        ),
        pytest.param(
            {"selector": "topk", "token_budget": 15},
            r"token_budget=15 is less than one page of 16 tokens; give at least 16",
            id="budget-under-one-page",
        ),
        pytest.param({"token_budget": 1.5}, r"token_budget=1.5 is not a number", id="budget-1.5"),
        pytest.param(
            {"selector": "gaussian", "token_budget": 64},
            r"token_budget=64 means nothing to selector gaussian; leave it out",
            id="budget-without-topk",
        ),
        pytest.param(
            {"selector": "topk", "certificate": 1}, r"certificate=1 is not a", id="certificate-1"
        ),
        pytest.param(
            {"certificate": True},
            r"certificate=True needs bounds .* selector exact .*use selector topk",
            id="certificate-without-topk",
        ),
        pytest.param(
            {"prune": True, "selector": "topk"},
            r"prune=True means nothing to selector topk; leave it out, or use selector exact",
            id="prune-without-exact",
        ),
        pytest.param(
            {"codes": True, "selector": "gaussian"},
            r"codes=True means nothing to selector gaussian; leave it out, or use selector topk or",
            id="codes-of-gaussian",
        ),
        pytest.param(
            {"codes": True},
            r"codes=True means nothing to selector exact, .* or set prune",
            id="codes-without-prune",
        ),
        pytest.param(
            {"codes": True, "selector": "adaptive", "guard": 1.2},
            r"guard=1.2 means nothing with codes, .*leave it out",
            id="guard-with-codes",
        ),
        pytest.param({"codes": 1}, r"codes=1 is not a boolean", id="codes-1"),
        pytest.param({"prune": "yes"}, r"prune='yes' is not a boolean", id="prune-yes"),
        pytest.param(
            {"prune": True, "alpha": [1.5, 1.5, 1.0, 1.5]},
            r"prune=True finds nothing: softmax",
            id="prune-softmax",
        ),
        pytest.param(
            {"margin": 1.0}, r"margin=1.0 means nothing to selector exact", id="margin-of-exact"
        ),
        pytest.param(
            {"selector": "adaptive", "margin": 0},
            r"margin=0.0 is not usable; give a finite number above 0",
            id="margin-0",
        ),
        pytest.param(
            {"selector": "adaptive", "guard": 0.3},
            r"guard=0.3 is not usable; give 0 or a finite number of at least 1",
            id="guard-below-what-is-usual",
        ),
        pytest.param(
            {"selector": "adaptive", "guard": "all"}, r"guard='all' is not a number", id="guard-all"
        ),
        pytest.param(
            {"selector": "adaptive", "alpha": 1.0}, r"softmax \(alpha 1\)", id="adaptive-softmax"
        ),
        pytest.param({"page_size": 16.0}, r"page_size=16.0 is not usable", id="page-size-a-float"),
        pytest.param({"alpha": 1.001}, r"too close to 1", id="alpha-hardly-above-1"),
        pytest.param(
            {"page_size": 24}, r"page_size=24 is not usable; choose from 16, 32", id="page-size"
        ),
        pytest.param({"exact_below": -1}, r"exact_below=-1 is not", id="negative-context"),
        pytest.param({"dense_layers": 3}, r"dense_layers=3 is not a list", id="layers-no-list"),
        pytest.param({"dense_layers": [0, 5]}, r"holds 5, which is no layer", id="layer-too-high"),
        pytest.param(
            {"selector": "gaussian", "alpha": 1.0}, r"softmax \(alpha 1\)", id="gaussian-softmax"
        ),
        pytest.param(
            {"selector": "gaussian-paper", "alpha": [1.5, 1.5, 1.0, 1.5]},
            r"selector='gaussian-paper' goes by .*softmax \(alpha 1\)",
            id="gaussian-paper-softmax",
        ),
    ],
)
def test_a_bad_value_is_refused_naming_the_setting_the_value_and_the_remedy(options, message):
    with pytest.raises(ConfigurationError, match=message):
        settle(**options)


def test_a_model_without_alpha_is_served_as_softmax_only_if_told_so():
    with pytest.raises(ConfigurationError, match=r"entmax_alpha=None is missing.*\"alpha\": 1.0"):
        settle({"hidden_size": 256})
    assert settle({"hidden_size": 256}, alpha=1.0).alpha == 1.0


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        pytest.param({"entmax_kv": {}}, "did you mean 'entmaxkv'", id="misspelled-section"),
        pytest.param({"ENTMAXKV": {}}, "did you mean 'entmaxkv'", id="section-in-capitals"),
        pytest.param({"selector": "topk"}, "outside its section", id="option-without-section"),
        pytest.param({"entmaxkv": "exact"}, "is not a JSON object", id="section-not-an-object"),
    ],
)
def test_a_bad_section_is_refused(additional, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve({"entmax_alpha": 1.5}, additional=additional, num_query_heads=4, num_layers=5)


def test_the_sections_of_other_plugins_are_left_alone():
    config = resolve(
        {"entmax_alpha": 1.5}, additional={"ascend": {}}, num_query_heads=4, num_layers=5
    )
    assert config.selector == "exact"
