"""The main job as a user runs it: a server, OpenAI's client, a right answer, counted pages."""

import pytest

from entmaxkv_vllm import cli, demo
from entmaxkv_vllm.retrieval import NeedleTask

pytestmark = pytest.mark.engine

TASK = NeedleTask("", "What is the access code for x?", " The access code for x is 12345.", "12345")
SPARSE = {"entmaxkv_pages_read_total": 40.0, "entmaxkv_pages_held_total": 100.0}


def test_the_demo_answers_through_a_server_and_stops_it(capsys):
    assert cli.main(["demo", "--tokens", "3000"]) == 0
    shown = capsys.readouterr().out
    assert "Right:" in shown
    assert "read of" in shown
    assert shown.endswith("Server stopped.\n")


def test_a_server_that_cannot_start_is_a_failure_that_shows_why(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["demo", "--model", str(tmp_path)]) == 1
    assert "the server stopped while starting" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["60", "100000000"], ids=["too-short", "too-long"])
def test_a_text_of_impossible_length_is_a_failure_that_names_it(tokens, capsys):
    assert cli.main(["demo", "--tokens", tokens]) == 1
    assert f"--tokens {tokens}" in capsys.readouterr().err


def test_a_right_answer_with_pages_left_unread_is_no_problem():
    assert demo.problems(TASK.answer, TASK, "gaussian", SPARSE) == []


@pytest.mark.parametrize(
    ("answer", "metrics", "message"),
    [
        pytest.param("The access code for x is 12346.", SPARSE, "answer is wrong", id="answer"),
        pytest.param("", SPARSE, "answer is wrong", id="no-answer"),
        pytest.param(TASK.answer, {}, "decoded nothing", id="no-counters"),
        pytest.param(
            TASK.answer,
            SPARSE | {"entmaxkv_pages_read_total": 100.0},
            "the sparse path did not run",
            id="every-page-read",
        ),
    ],
)
def test_the_demo_fails_loudly(answer, metrics, message):
    (problem,) = demo.problems(answer, TASK, "gaussian", metrics)
    assert message in problem
