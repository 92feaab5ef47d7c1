"""Numbers in the documentation are the ones in the raw data."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import benchmark_serving
import check_certificate
import pytest
import soak
import tabulate_fidelity
import tabulate_guide
import tabulate_kernels
import tabulate_selectors
import tabulate_trained

from entmaxkv_kernels import Gaussian, PageLayout, TopK
from entmaxkv_kernels.pages import CODES
from entmaxkv_vllm import config

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]


@pytest.fixture
def result():
    return json.loads((DOCS / "results" / "fidelity-demo-model.json").read_text())


def test_the_fidelity_page_shows_its_result_files():
    tables = tabulate_fidelity.tables()
    assert tables in (DOCS / "fidelity.md").read_text()
    assert all(f"(results/{path.name})" in tables for path in DOCS.glob("results/fidelity-*.json"))


def test_the_kernels_page_shows_its_result_files():
    tables = tabulate_kernels.tables()
    assert tables in (DOCS / "kernels.md").read_text()
    assert all(f"(results/{path.name})" in tables for path in DOCS.glob("results/*h200*.json"))


def test_the_guide_shows_its_result_files():
    assert tabulate_guide.table() in (DOCS / "guide.md").read_text()


def test_the_guide_quotes_messages_that_the_package_prints():
    guide = (DOCS / "guide.md").read_text()
    symptoms = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| ")]
    quoted = {text for symptom in symptoms for text in symptom.split("`")[1::2] if " " in text}
    quoted |= set(re.findall(r"look for `([^`]+)`", guide))
    package = Path(config.__file__).parent
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    assert len(quoted) >= 5
    for text in quoted:
        assert text in source, text


def test_the_guide_is_right_about_defaults_and_about_memory():
    guide = (DOCS / "guide.md").read_text()
    defaults = {field.name: field.default for field in fields(config.EntmaxKVConfig)}
    assert defaults["selector"] == "exact" and "`exact`, the default" in guide
    assert f"`exact_below` ({defaults['exact_below']})" in guide
    assert f"pages of {defaults['page_size']} tokens" in guide
    added = [
        PageLayout(16, head_size, selector.statistics).elements_per_page
        / PageLayout(16, head_size).elements_per_page
        - 1
        for selector in (Gaussian(), TopK(64))
        for head_size in (64, 80, 96, 128, 256)
    ]
    assert f"up to {max(added):.2%}" in guide
    coded = [
        PageLayout(16, head_size, CODES).elements_per_page
        / PageLayout(16, head_size).elements_per_page
        - 1
        for head_size in (64, 80, 96, 128, 256)
    ]
    assert f"with `codes` up to {max(coded):.1%}" in guide


def test_measured_steps_read_what_they_say():
    for path in DOCS.glob("results/decode-*.json"):
        for row in json.loads(path.read_text())["rows"]:
            share = {"exact": (1, 1), "sparse": (0.05, 0.052), "gaussian": (0.05, 1)}[row["kernel"]]
            assert share[0] - 1e-3 <= row["pages_read"] <= share[1]
            assert 0 < row["support"] < 0.011
            assert row.get("error", 0) <= 2**-8


@pytest.mark.parametrize(
    ("name", "selectors"),
    [
        ("serving-h200", {"exact", "topk"}),
        ("serving-h200-appended", {"exact", "topk"}),
        ("serving-h200-captures", {"exact", "topk"}),
        ("serving-h200-compiled", {"exact", "topk"}),
        ("serving-h200-gaussian", {"gaussian"}),
    ],
)
def test_serving_is_compared_within_a_run_and_sparse_selectors_left_pages_unread(name, selectors):
    rows = json.loads((DOCS / "results" / f"{name}.json").read_text())["rows"]

    def place(row):
        return row["run"], row["model"], row["requests"], row["context"]

    flash = {place(row): row["tpot_ms"] for row in rows if row["selector"] == "FLASH_ATTN"}
    ours = [row for row in rows if row["selector"] != "FLASH_ATTN"]
    assert {row["selector"] for row in ours} == selectors
    for row in ours:
        assert row["ratio_flash_attn"] == pytest.approx(flash[place(row)] / row["tpot_ms"])
        assert row["steps"] > 0 and row["support"] > 0
        sparse = row["selector"] != "exact"
        # Read whole: the first step of every request, one more of them profiled, and two of each
        # size of batch each time that graphs are captured anew.
        captures = len(row.get("captures_ms", [row["tpot_ms"]]))
        sequences = row["requests"] * (benchmark_serving.REQUESTS * captures + 1)
        layers = benchmark_serving.SHAPES[row["model"]]["num_hidden_layers"]
        whole = layers * (sequences + 2 * sum({1, row["requests"]}) * (captures - 1))
        assert row["steps"] - row["sparse_steps"] <= (whole if sparse else row["steps"])
        assert (row["sparse_steps"] > 0) is sparse
        assert (row["pages_read_share"] < 1) is sparse


def test_the_soak_tested_what_it_is_for_and_found_nothing():
    for row in json.loads((DOCS / "results" / "soak-h200.json").read_text())["rows"]:
        assert row["requests"] >= 2000
        assert soak.complaints(row) == []


CERTIFICATES = {
    "reference": ["reference"],
    "the reference by the sum of magnitudes": ["reference-boxes"],
    "compiled": ["triton", "triton-seed-1"],
    "the reference by codes": ["codes-reference"],
    "compiled by codes": ["codes-triton", "codes-triton-seed-1"],
}


@pytest.mark.parametrize("names", CERTIFICATES.values(), ids=CERTIFICATES.keys())
def test_the_certificate_was_never_wrong_in_a_million_heads(names):
    checked = 0
    for name in names:
        result = json.loads((DOCS / "results" / f"certificate-{name}.json").read_text())
        assert result["violations"] == 0
        assert sum(row["heads_checked"] for row in result["rows"]) == result["heads_checked"]
        assert any(row["certified"] > 0.1 for row in result["rows"])
        checked += result["heads_checked"]
    assert checked >= 1_000_000


@pytest.mark.parametrize("name", [name for names in CERTIFICATES.values() for name in names])
def test_the_certificate_page_shows_its_result_files(name):
    page = (DOCS / "certificate.md").read_text()
    result = json.loads((DOCS / "results" / f"certificate-{name}.json").read_text())
    assert name == "reference-boxes" or check_certificate.table(result) in page
    assert f"certificate-{name}.json" in page


def test_gaussian_answers_within_two_points_of_exact_at_every_length(result):
    assert {row["context"] for row in result["answers"]} == {2048, 4096, 8192}
    for row in result["answers"]:
        assert row["exact_right"] / row["tasks"] >= 0.95
        assert (row["exact_right"] - row["gaussian_right"]) / row["tasks"] <= 0.02


def test_gaussian_left_pages_unread_in_every_layer(result):
    assert len(result["layers"]) == 4
    for row in result["layers"]:
        assert row["pages_read_mean"] < 0.75
        assert row["dropped_mass_p99"] == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_of_the_project_leads_somewhere(page):
    targets = [part.split(")")[0] for part in page.read_text().split("](")[1:]]
    for target in targets:
        if not target.startswith(("http", "#")):
            assert (page.parent / target).exists(), target


def test_an_adaptive_selector_of_the_same_pages_drops_no_more_but_on_the_keys_that_docs_name():
    result = json.loads((DOCS / "results" / "fidelity-selectors.json").read_text())
    fewer, drops_more = set(), set()
    places = {(row["keys"], row["length"]) for row in result["synthetic"]}
    assert len(places) == 18
    for place in places:
        rows = [r for r in result["synthetic"] if (r["keys"], r["length"]) == place]
        rows = [row for row in rows if not row["needle"]]
        paper = next(row for row in rows if row["selector"] == "gaussian-paper")
        ours = tabulate_selectors.at_equal_pages(rows, paper["pages_read"])
        if ours is None:
            fewer.add(place)
        elif ours["dropped_mass"] > max(paper["dropped_mass"], 1e-5):
            drops_more.add(place)
    # The paper's rule reads fewer pages than any margin that was tried.
    assert fewer == {("clustered", 8192), ("clustered", 131072)}
    assert drops_more == {("clustered", 32768), ("clustered, rotated", 131072)}


def test_the_guard_of_adaptive_misses_hardly_a_needle():
    result = json.loads((DOCS / "results" / "fidelity-selectors.json").read_text())
    default = [
        row
        for row in result["synthetic"]
        if row["needle"] and row["selector"] == tabulate_selectors.DEFAULT
    ]
    assert len(default) == 18
    assert sum(row["needles_missed"] == 0 for row in default) == 16
    assert max(row["needles_missed"] for row in default) < 0.1


def test_by_codes_adaptive_drops_no_more_at_equal_pages_anywhere_and_misses_no_needle():
    result = json.loads(tabulate_selectors.CODES_STUDY.read_text())
    places = {(row["keys"], row["length"]) for row in result["synthetic"]}
    assert len(places) == 18
    for place in places:
        here = [r for r in result["synthetic"] if (r["keys"], r["length"]) == place]
        plain, needle = (
            {row["selector"]: row for row in here if row["needle"] == wanted}
            for wanted in (False, True)
        )
        paper = plain["gaussian-paper"]
        ours = tabulate_selectors.at_equal_pages(list(plain.values()), paper["pages_read"])
        assert ours["dropped_mass"] < max(paper["dropped_mass"], 1e-12)
        default = plain[tabulate_selectors.CODED]
        assert default["dropped_mass"] < 1e-4 and default["support_recall"] > 0.994
        assert needle[tabulate_selectors.CODED]["needles_missed"] == 0
        assert plain["pruned by codes"]["dropped_mass"] == 0


@pytest.mark.parametrize("context", [8192, 16384])
@pytest.mark.parametrize("kind", ["topk", "topk-codes"])
@pytest.mark.parametrize("budget", [512, 1024, 2048, 4096, 8192])
def test_entmax_drops_less_than_softmax_at_every_budget(context, kind, budget):
    entmax, softmax = (
        tabulate_trained.attention_by_selector(name, context)[f"{kind}:{budget}"]
        for name in tabulate_trained.TWINS
    )
    if budget < context:
        assert entmax["dropped_mass"] < softmax["dropped_mass"]
        assert entmax["output_error"] < softmax["output_error"]
    else:
        assert entmax["dropped_mass"] == softmax["dropped_mass"] == 0


@pytest.mark.parametrize("model, heads", [("entmax", 921600), ("softmax", 614400)])
def test_no_bound_is_below_the_truth_on_a_trained_model(model, heads):
    rows = [row for row in tabulate_trained.of_model(model, "attention") if "certified" in row]
    assert sum(row["sequences"] * row["positions"] * 8 for row in rows) == heads
    assert min(row["least_slack_of_bound"] for row in rows) >= 0


@pytest.mark.parametrize("context", [8192, 16384, 32768, 65536, 131072])
def test_adaptive_by_codes_drops_less_with_fewer_pages_than_the_papers_rule(context):
    found = tabulate_trained.attention_by_selector("entmax", context)
    ours, paper = found["adaptive-codes"], found["gaussian-paper"]
    assert ours["pages_read"] < 0.35 * paper["pages_read"]
    assert ours["dropped_mass"] < 0.04 * paper["dropped_mass"]
    assert ours["support_recall"] >= 0.999
    assert ours["least_recall"] >= (0.999 if context <= 16384 else 0.997)


@pytest.mark.parametrize(
    "selector, pages, least, most",
    [
        ("topk-codes:960", 0.061, 0.0, 0.00055),
        ("adaptive-codes", 0.071, -0.0001, 0.0001),
        ("topk:1024", 0.065, 0.05, 0.06),
    ],
)
def test_perplexity_of_a_trained_model_is_as_the_readme_says(selector, pages, least, most):
    rows = tabulate_trained.of_model("entmax", "perplexity")
    found = {row["selector"]: row for row in rows if row["context"] == 16384}
    assert found[selector]["pages_read"] < pages
    more = found[selector]["nats_per_byte"] - found["exact"]["nats_per_byte"]
    assert least < math.expm1(more) < most


def test_adaptive_by_codes_solves_every_task_that_exact_solves():
    found = tabulate_trained.lost_and_won("entmax")
    lines = [numbers for place, numbers in found.items() if place[2] == "adaptive-codes"]
    assert len(lines) == 21
    assert not any(lost for _, lost, _, _ in lines) and sum(solved for solved, *_ in lines) > 400


@pytest.mark.parametrize("context", [4096, 8192, 16384])
def test_gaussian_is_within_a_point_of_exact_over_all_tasks(context):
    found = tabulate_trained.lost_and_won("entmax")
    lines = [place for place in found.items() if place[0][1:] == (context, "gaussian")]
    assert len(lines) == 7
    assert sum(lost - won for _, (_, lost, won, _) in lines) <= 0.01 * 7 * 48


def test_with_few_tokens_entmax_loses_fewer_tasks_than_softmax():
    for selector, most in (("topk-codes:1024", 2), ("topk:1024", 56)):
        entmax, softmax = (
            sum(
                numbers[1]
                for place, numbers in tabulate_trained.lost_and_won(name).items()
                if place[1:] == (16384, selector)
            )
            for name in tabulate_trained.TWINS
        )
        assert entmax == most < softmax
