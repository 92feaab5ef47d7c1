"""Which names of vLLM the package relies on: the next version's break is one readable failure."""

import ast
from pathlib import Path

import pytest

from entmaxkv_vllm import compat, doctor


def test_vllm_has_every_name_that_the_package_relies_on():
    assert compat.missing_names() == []


def test_every_import_from_vllm_is_on_the_list():
    listed = {
        (module, name.partition(".")[0])
        for module, names in compat.RELIED_ON.items()
        for name in names
    }
    imported = {
        (node.module, name.name)
        for path in Path(compat.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for name in node.names
        # The commands for trying a model use vLLM as anybody would.
        if name.name not in ("LLM", "SamplingParams")
    }
    assert imported <= listed


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param("vllm.no_such_module", "anything", id="module"),
        pytest.param("vllm.config", "no_such_name", id="name"),
        pytest.param("vllm.v1.kv_cache_interface", "AttentionSpec.no_such_field", id="field"),
        pytest.param("vllm.v1.attention.backend", "AttentionBackend.no_hook", id="method"),
    ],
)
def test_a_name_that_is_gone_is_reported_and_doctor_says_so(monkeypatch, module, name):
    monkeypatch.setattr(compat, "RELIED_ON", {module: (name,)})
    assert compat.missing_names() == [f"{module}.{name}"]
    (finding,) = doctor._names()
    assert finding.status == "fail"
    assert f"{module}.{name}" in finding.found
