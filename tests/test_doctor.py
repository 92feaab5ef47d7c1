"""`entmaxkv doctor` names what is wrong and what to do, and exits accordingly."""

import json

import pytest

from entmaxkv_vllm import cli, doctor


def findings(**arguments):
    values = {"model": None, "additional_config": {}, "hf_overrides": {}} | arguments
    return {finding.subject: finding for finding in doctor.diagnose(**values)}


def test_a_good_installation_is_ready(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "--attention-backend ENTMAXKV" in report
    assert report.endswith("Ready.\n")


def test_the_configuration_in_force_is_shown_with_its_sources(tmp_path):
    from test_refusals import LLAMA

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    lines = [
        str(finding)
        for finding in doctor.diagnose(
            str(tmp_path),
            {"entmaxkv": {"selector": "topk", "dense_layers": [0, 1]}},
            {"entmax_alpha": 2},
        )
    ]
    assert any("alpha=2.0 (--hf-overrides)" in line for line in lines)
    assert any("selector=topk (--additional-config)" in line for line in lines)
    assert any("dense_layers=(0, 1) (--additional-config)" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--additional-config", "{"], "is not JSON", id="not-json"),
        pytest.param(["--hf-overrides", "[1]"], "is not a JSON object", id="not-an-object"),
        pytest.param(["--hf-overrides", '{"a": 1}'], "judged with a model", id="no-model"),
    ],
)
def test_options_that_cannot_be_judged_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", *arguments])
    assert message in capsys.readouterr().err


def test_a_gpu_build_without_a_gpu_is_a_failure(monkeypatch):
    import vllm.platforms

    class NoPlatform:
        def is_unspecified(self):
            return True

    monkeypatch.setattr(vllm.platforms, "_current_platform", NoPlatform())
    finding = doctor._platform()
    assert finding.status == "fail"
    assert "CPU build" in finding.remedy


def test_a_model_that_cannot_be_served_is_a_failure_with_the_remedy(tmp_path, capsys):
    from test_refusals import LLAMA

    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"entmax_alpha": None}))
    assert cli.main(["doctor", str(tmp_path)]) == 1
    report = capsys.readouterr().out
    assert "entmax_alpha=None is missing" in report
    assert '"alpha": 1.0' in report


def test_an_unsupported_vllm_is_a_failure_and_nothing_else_is_tried(monkeypatch):
    monkeypatch.setattr(doctor.compat, "vllm_distribution", lambda: ("vllm", "0.40.0"))
    report = findings()
    assert report["vLLM"].status == "fail"
    assert "outside the supported range" in report["vLLM"].remedy
    assert "platform" not in report


@pytest.mark.parametrize(
    ("name", "value"),
    [("VLLM_PLUGINS", "another"), ("VLLM_TARGET_DEVICE", "cpu")],
    ids=["plugin-filter", "cpu-target"],
)
def test_an_environment_that_keeps_the_plugin_out_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    finding = findings()[name]
    assert finding.status == "fail"
    assert finding.remedy
