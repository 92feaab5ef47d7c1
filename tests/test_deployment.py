"""What docs/deployment.md says of workers on other machines, as far as one machine can show it."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import entmaxkv_vllm

LOAD_WITHOUT_THE_PACKAGE = """
import pickle, sys
sys.modules["entmaxkv_vllm"] = None
pickle.loads(sys.stdin.buffer.read())
"""


@pytest.fixture
def member():
    """The backend as it travels in an engine's configuration."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from entmaxkv_vllm import plugin

    plugin.register()
    return AttentionBackendEnum["ENTMAXKV"]


def test_a_worker_without_the_package_says_what_is_missing(member):
    child = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE],
        input=pickle.dumps(member),
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert b"ModuleNotFoundError" in child.stderr
    assert b"entmaxkv_vllm" in child.stderr.splitlines()[-1]


def test_the_package_reads_only_variables_that_reach_every_ray_worker(monkeypatch):
    from vllm.ray.ray_env import get_env_vars_to_copy

    source = "".join(path.read_text() for path in Path(entmaxkv_vllm.__file__).parent.glob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\s*\"(\w+)\"", source))
    assert read >= {"VLLM_PLUGINS", "VLLM_TARGET_DEVICE"}
    # Triton's interpreter is for tests.
    read -= {"TRITON_INTERPRET"}
    for name in read:
        monkeypatch.setenv(name, "set")
    assert read <= get_env_vars_to_copy()


def test_the_compilers_variables_reach_some_ray_workers_only_when_named(monkeypatch):
    from vllm.ray.ray_env import get_env_vars_to_copy
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars

    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    assert "TRITON_CACHE_DIR" in get_driver_env_vars(set())
    assert "TRITON_CACHE_DIR" not in get_env_vars_to_copy()
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "TRITON_CACHE_DIR")
    assert "TRITON_CACHE_DIR" in get_env_vars_to_copy()
