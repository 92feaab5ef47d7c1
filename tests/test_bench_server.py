"""`entmaxkv bench server`: its requests, what it measures, and what it refuses to call measured."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import benchmark_server
import pytest

from entmaxkv_vllm import cli
from entmaxkv_vllm.bench import server as bench
from entmaxkv_vllm.bench.options import Load

LOAD = Load(requests=50, shortest=100, longest=3000, least_output=3, most_output=9, seed=1)


def test_every_server_gets_the_same_requests_of_mixed_lengths():
    bodies = bench.bodies_of(LOAD, "m")
    assert bodies == bench.bodies_of(LOAD, "m")
    lengths = sorted(len(body["prompt"]) for body in bodies)
    assert 100 <= lengths[0] < 200 < 1500 < lengths[-1] <= 3000
    assert {body["max_tokens"] for body in bodies} == set(range(3, 10))


def test_percentiles_are_in_milliseconds():
    found = bench.percentiles([i / 1000 for i in range(101)])
    assert found == pytest.approx({"p50": 50, "p90": 90, "p99": 99})
    assert bench.percentiles([0.02]) == {"p50": 20, "p90": 20, "p99": 20}


PAGES = {"pages_read": 5, "pages_held": 9}


@pytest.mark.parametrize(
    ("expected", "row", "complaints"),
    [
        ("sparse", {"steps": 5, "sparse_steps": 5}, []),
        ("exact", {"steps": 5, "sparse_steps": 0}, []),
        ("any", {"steps": 0, "sparse_steps": 0}, []),
        ("sparse", {"steps": 5, "sparse_steps": 0}, ["m: the sparse path never ran"]),
        (
            "sparse",
            {"steps": 5, "sparse_steps": 5, "pages_read": 9},
            ["m: the sparse path read every page"],
        ),
        ("exact", {"steps": 5, "sparse_steps": 2}, ["m: 2 steps were sparse"]),
        ("other", {"steps": 0, "sparse_steps": 0, "failures": ["status 500"]}, ["m: status 500"]),
        ("other", {"steps": 5, "sparse_steps": 0}, ["m: ENTMAXKV decoded 5 steps"]),
        ("exact", {"steps": 0, "sparse_steps": 0}, ["m: ENTMAXKV decoded 0 steps"]),
    ],
    ids=[
        "sparse",
        "exact",
        "whatever it is",
        "a sparse selector that never ran",
        "a sparse selector that read all",
        "exact was sparse",
        "a request that failed",
        "the other backend was ours",
        "ours was another backend",
    ],
)
def test_failed_requests_and_a_path_that_was_not_expected_are_complaints(expected, row, complaints):
    assert bench.complaints({"failures": [], **PAGES, **row}, "m", expected) == complaints


def test_the_script_expects_of_each_of_its_servers_what_it_was_started_as():
    arms = ("FLASH_ATTN", "exact", "topk", "gaussian")
    expected = ["other", "exact", "sparse", "sparse"]
    assert list(map(benchmark_server.expected_of, arms)) == expected


@pytest.mark.parametrize(
    "change",
    [{"least_output": 1}, {"shortest": 9, "longest": 5}, {"running": 8, "requests": 4}],
    ids=["no-time-between-tokens", "shorter-than-shortest", "more-at-once-than-there-are"],
)
def test_a_load_that_cannot_be_is_refused_with_its_values(change):
    with pytest.raises(ValueError) as error:
        Load(**change)
    assert all(f"{name} is {value}" in str(error.value) for name, value in change.items())


class Imitation(BaseHTTPRequestHandler):
    """A server that answers at once, and counts 3 steps for each token."""

    counted = 100
    sparse = 1

    def do_GET(self):
        kind = type(self)
        if self.path == "/metrics":
            text = (
                "# HELP entmaxkv_steps_total of\n"
                f'entmaxkv_steps_total{{model_name="m"}} {kind.counted}.0\n'
                f'entmaxkv_sparse_steps_total{{model_name="m"}} {kind.counted * kind.sparse}.0\n'
                f'entmaxkv_pages_held_total{{model_name="m"}} {kind.counted * 4}.0\n'
                f'entmaxkv_pages_read_total{{model_name="m"}} {kind.counted * 2}.0\n'
            )
        else:
            text = json.dumps({"data": [{"id": "m"}]})
        self._reply(text)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "m"
        type(self).counted += 3 * body["max_tokens"]
        self._reply("data: {}\n\n" * body["max_tokens"] + "data: [DONE]\n\n")

    def _reply(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(Imitation, "counted", 100)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Imitation)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SMALL = ["--requests", "5", "--running", "2", "--shortest", "3", "--longest", "9"]
OUTPUT = ["--least-output", "4", "--most-output", "4"]


def test_a_running_server_is_measured_and_its_counters_are_those_of_the_load(url, tmp_path, capsys):
    out = tmp_path / "server.json"
    command = ["bench", "server", url, *SMALL, *OUTPUT, "--expect", "sparse", "--out", str(out)]
    assert cli.main(command) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert (row["model"], row["requests"], row["output_tokens"]) == ("m", 5, 20)
    assert (row["steps"], row["pages_read"], row["pages_held"]) == (60, 120, 240)
    assert 0 < row["first_token_ms"]["p50"] <= row["whole_ms"]["p99"]
    shown = capsys.readouterr().out
    assert "120 read of 240 held (50.0%)" in shown
    assert {"gpu", "versions", "commit", "date", "load"} <= result.keys()


def test_a_server_that_should_be_sparse_and_is_not_is_not_reported(
    url, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Imitation, "sparse", 0)
    out = tmp_path / "server.json"
    command = ["bench", "server", url, *SMALL, *OUTPUT, "--expect", "sparse", "--out", str(out)]
    assert cli.main(command) == 1
    assert not out.exists()
    assert "REFUSED: m: the sparse path never ran" in capsys.readouterr().err


def test_no_server_is_one_clear_error(capsys):
    assert cli.main(["bench", "server", "http://127.0.0.1:9"]) == 2
    assert "does not answer" in capsys.readouterr().err
