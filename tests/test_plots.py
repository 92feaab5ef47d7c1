"""Pictures are those of the committed results, say what they show, and come out the same twice."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from entmaxkv_vllm import cli
from entmaxkv_vllm.plots import decode, draw, fidelity

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = sorted((DOCS / "results").glob("*.json"))
LARGEST = 150_000


@pytest.fixture(scope="module")
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def drawn(matplotlib, tmp_path_factory):
    """A folder with the pictures of all committed results."""
    folder = tmp_path_factory.mktemp("pictures")
    assert draw.draw(RESULTS, folder)
    return folder


def texts(path):
    """All that a picture says."""
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return [" ".join("".join(element.itertext()).split()) for element in found]


def test_pages_show_all_committed_pictures_and_these_are_of_the_committed_results(
    drawn, matplotlib
):
    committed = {path.name: path for path in (DOCS / "pictures").glob("*.svg")}
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    shown = {
        name for page in pages for name in re.findall(r"pictures/(\S+\.svg)\)", page.read_text())
    }
    assert shown == committed.keys()
    for name, path in committed.items():
        assert path.stat().st_size < LARGEST
        assert texts(path) == texts(drawn / name), f"{name}: run make pictures"
        # Another matplotlib lays out the same things elsewhere.
        if f"Matplotlib v{matplotlib.__version__}," in path.read_text():
            assert path.read_bytes() == (drawn / name).read_bytes(), f"{name}: run make pictures"


def test_a_picture_comes_out_the_same_twice_and_without_its_date(drawn, tmp_path):
    (result, *_) = [path for path in RESULTS if path.stem == "decode-h200-clustered"]
    for path in draw.draw([result], tmp_path):
        assert path.read_bytes() == (drawn / path.name).read_bytes()
        assert "dc:date" not in path.read_text()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_picture_names_its_machine_date_and_data(path, drawn):
    result = json.loads(path.read_text())
    for picture in (drawn / f"{path.stem}-{name}.svg" for name in draw.PICTURES):
        if not picture.exists():
            continue
        said = "\n".join(texts(picture))
        assert result["date"] in said
        assert (result["gpu"] or result["cpu"]) in said
        if "data" in result:
            assert {"random": "random keys", "clustered": "keys in topics"}[result["data"]] in said
        if "model" in result:
            assert result["model"] in said


def test_every_launch_of_decode_has_a_stage():
    launches = {launch for names in decode.STAGES.values() for launch in names}
    source = Path(__file__).parent.parent / "kernels" / "triton"
    kernels = {
        name
        for path in source.glob("*.py")
        for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE)
    }
    others = {name for name in kernels if name.startswith(("prefill", "append", "entmax"))}
    # Raw data from before attend did what it does have one more.
    assert launches == kernels - others | {"fallback"}


HEADER = {"gpu": "some GPU", "commit": "0123456789abcdef", "date": "2026-01-02"}


def bench_result():
    """A result of `entmaxkv bench kernels`, of three contexts and one batch of a mixed kind."""
    rows = [
        {"batch": f"1q1s{n}k", "kind": "decode", "arm": arm, "us": us * n, "us_spread": 1.0} | more
        for n in (8, 16, 32)
        for arm, us, more in (
            ("topk", 1.0, {"pages_read": 0.05, "support": 0.01, "bytes": 1000 * n}),
            ("fa3_plain", 5.0, {}),
            ("fa3_scheduled", 4.0, {}),
            ("sdpa", 9.0, {}),
        )
    ]
    rows[0]["kernels_us"] = {"box_kernel": 2.0, "collect_kernel": 1.0, "another_kernel": 1.0}
    rows.append({"batch": "q8k", "kind": "prefill", "arm": "entmax", "us": 1.0, "us_spread": 0.1})
    sizes = {"query_heads": 4, "kv_heads": 2, "head_size": 64, "table_tokens": 0}
    return HEADER | sizes | {"benchmark": "kernels", "data": "random", "rows": rows}


def test_the_faster_flash_attention_stands_beside_the_arms_of_a_benchmark():
    points = decode.points_of(bench_result())
    assert {point.context for point in points} == {8192, 16384, 32768}
    assert {p.context: p.us for p in points if p.arm == "fa3"} == {8192: 32, 16384: 64, 32768: 128}
    assert {point.group for point in points} == {"4/2 heads of 64, one sequence"}


def test_a_benchmark_is_drawn_as_latency_parts_of_a_step_and_bytes(matplotlib, tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(bench_result()))
    assert cli.main(["plot", str(file), "--out", str(tmp_path / "pictures")]) == 0
    names = [f"mine-{name}.svg" for name in ("latency", "step", "bytes")]
    assert capsys.readouterr().out.split() == [str(tmp_path / "pictures" / n) for n in names]
    said = [texts(tmp_path / "pictures" / name) for name in names]
    assert "topk, 5% of pages" in said[0] and "PyTorch SDPA" in said[0]
    assert any("8 us" in text for text in said[1])
    # No GPU of this name has a measured limit.
    assert not any("reading alone" in text for text in said[2])


def drop(selector, layer, read, mass):
    row = {"context": 4096, "selector": selector, "layer": layer, "pages_read": {"mean": read}}
    return row | {"dropped_mass": {"mean": mass, "p99": 2 * mass, "worst": 5 * mass}}


BUDGETS = {
    "model": "some model",
    "attention": [
        drop("exact", 0, 1.0, 0.0),
        *(drop("topk:256", layer, 0.1, 0.02 + layer / 100) for layer in (0, 1)),
        *(drop("topk:1024", layer, 0.4, 0.0) for layer in (0, 1)),
        drop("gaussian", 0, 0.5, 1e-4),
        drop("adaptive:margin=1.1", 0, 0.2, 1e-3),
        drop("adaptive:margin=1", 0, 0.1, 2e-3),
        drop("adaptive:reach=2,guard=0", 0, 0.3, 1e-3),
    ],
}


def test_budgets_of_a_selector_are_one_line_of_the_means_over_layers(matplotlib, monkeypatch):
    lines = []
    axes = matplotlib.axes.Axes
    plot = axes.plot

    def remember(self, x, y, *rest, **options):
        lines.append((options["label"], list(x), pytest.approx(list(y))))
        return plot(self, x, y, *rest, **options)

    monkeypatch.setattr(axes, "plot", remember)
    fidelity.dropped_mass(HEADER | BUDGETS)
    assert lines == [
        ("topk, 4k tokens", [0.1, 0.4], [0.025, 0]),
        ("gaussian, 4k tokens", [0.5], [1e-4]),
        ("adaptive, 4k tokens", [0.1, 0.2], [2e-3, 1e-3]),
        ("adaptive by reach, guard=0, 4k tokens", [0.3], [1e-3]),
    ]


def study_row(selector, read, mass, **place):
    return {"selector": selector, "pages_read": read, "dropped_mass": mass, **place}


def test_a_study_of_selectors_has_a_panel_for_each_kind_of_heads(matplotlib):
    short, long = ({"keys": "skewed", "length": n, "needle": False} for n in (1024, 8192))
    rows = [
        study_row("gaussian", 0.5, 0.1, **short),
        study_row("gaussian, quantile 0.5", 0.6, 0.01, **long),
        study_row("gaussian", 0.3, 0.2, **long),
        study_row("guard 1.3, reach 2", 0.3, 0.2, **long),
        study_row("gaussian", 0.9, 0.0, **long | {"needle": True}),
    ]
    recorded = [study_row("topk, 3%", 0.03, 0.4, model="twin", layer=n) for n in (0, "all")]
    study = fidelity.study_of({"synthetic": rows, "recorded": recorded})
    assert study == {
        "skewed keys, 8k": {"gaussian": [(0.6, 0.01), (0.3, 0.2)]},
        "recorded: twin": {"topk": [(0.03, 0.4)]},
    }
    figure = fidelity.dropped_mass(HEADER | {"synthetic": rows, "recorded": recorded})
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(study)


def test_a_result_of_something_else_has_nothing_to_draw(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(HEADER | {"rows": [{"anything": 1}]}))
    assert cli.main(["plot", str(file), "--out", str(tmp_path)]) == 1
    assert "nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no JSON", "[1]", None], ids=["text", "list", "missing"])
def test_a_file_that_is_no_result_is_one_clear_error(text, tmp_path, capsys):
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["plot", str(file), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{file} is no result file" in error and error.count("\n") == 1


def test_without_matplotlib_one_error_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = str(DOCS / "results" / "decode-h200.json")
    assert cli.main(["plot", file, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install '.[plot]'" in error and error.count("\n") == 1
