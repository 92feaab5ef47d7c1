"""Registration: found by vLLM in every process, harmless when repeated, silent beside a GPU."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest

from entmaxkv_vllm import compat, plugin


@pytest.fixture
def backends():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    return AttentionBackendEnum


def test_registering_twice_changes_nothing(backends):
    member = backends["ENTMAXKV"]
    plugin.register()
    assert backends["ENTMAXKV"] is member
    assert member.get_path() == plugin.BACKEND_PATH


def test_custom_is_a_fallback_name_for_the_same_backend(backends):
    assert backends.CUSTOM.get_path() == plugin.BACKEND_PATH
    assert backends.CUSTOM.get_class().get_name() == "ENTMAXKV"


def test_the_name_on_the_command_line_reaches_the_backend_class(backends):
    from vllm.config import AttentionConfig

    assert AttentionConfig(backend="entmaxkv").backend is backends["ENTMAXKV"]
    assert backends["ENTMAXKV"].get_class().get_name() == "ENTMAXKV"


def test_the_model_with_nape_is_one_that_vllm_serves(backends):
    from vllm import ModelRegistry

    assert "NapeLlamaForCausalLM" in ModelRegistry.get_supported_archs()


def test_a_copy_or_an_unpickled_member_is_the_registered_one(backends):
    member = backends["ENTMAXKV"]
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


def _path_of(member, queue):
    queue.put(member.get_path())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_process_receives_the_member_before_it_loads_plugins(backends, method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_path_of, args=(backends["ENTMAXKV"], queue))
    child.start()
    assert queue.get(timeout=120) == plugin.BACKEND_PATH
    child.join(timeout=60)
    assert child.exitcode == 0


def test_vllm_finds_the_plugin_without_anyone_importing_it():
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "import sys; print(AttentionBackendEnum['ENTMAXKV'].get_path())\n"
        "assert 'entmaxkv_vllm.backend' not in sys.modules, 'registration must stay light'\n"
        "assert 'entmaxkv_kernels' not in sys.modules, 'registration must stay light'\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == plugin.BACKEND_PATH


def test_without_a_gpu_the_cpu_platform_is_the_one_that_knows_entmaxkv():
    from vllm.platforms import current_platform

    assert plugin.cpu_platform() == plugin.CPU_PLATFORM_PATH
    assert current_platform.is_cpu()
    assert type(current_platform).__name__ == "EntmaxKVCpuPlatform"


def test_with_a_gpu_the_platform_plugin_stays_out_of_the_way(monkeypatch):
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: None)
    assert plugin.cpu_platform() is None


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.33.0", "0.32.0+cpu"])
def test_a_supported_vllm_is_accepted(found):
    compat.check_vllm_version(found)


def run(code, **environment):
    """A Python child process with its own vLLM; returns it with what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )


def test_an_unsupported_vllm_is_refused_when_the_backend_is_loaded_and_not_before():
    child = run(
        "from entmaxkv_vllm import compat\n"
        "compat.vllm_distribution = lambda: ('vllm', '0.31.2')\n"
        "import sys, vllm; vllm.ModelRegistry  # which this vLLM, unlike older ones, needs it for\n"
        "sys.modules['vllm.v1.kv_cache_layout'] = None  # as an older vLLM would be\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "print('registered'); AttentionBackendEnum['ENTMAXKV'].get_class()\n"
    )
    assert "registered" in child.stdout
    assert "ImportError: entmaxkv: vLLM 0.31.2 is outside the supported range" in child.stderr


def test_a_platform_setting_that_bypasses_the_plugin_is_refused_instead_of_serving_softmax():
    child = run(
        "from entmaxkv_vllm import plugin; plugin.register(); plugin.register()\n"
        "from vllm.platforms import current_platform\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "assert type(current_platform).__name__ != 'EntmaxKVCpuPlatform'\n"
        "class Layer: use_sparse = use_mla = False; kv_cache_dtype = 'auto'\n"
        "print(current_platform.get_attn_backend_cls(None, attn_selector_config=Layer))\n"
        "current_platform.get_attn_backend_cls(AttentionBackendEnum['ENTMAXKV'], Layer)\n",
        VLLM_TARGET_DEVICE="cpu",
    )
    assert "CPUAttentionBackend" in child.stdout
    assert "ValueError: entmaxkv: VLLM_TARGET_DEVICE='cpu' makes vLLM pass over" in child.stderr


@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "1.0"])
def test_a_vllm_outside_the_range_is_refused_with_the_range(found):
    with pytest.raises(ImportError, match=rf"vLLM {found} is outside the supported range"):
        compat.check_vllm_version(found)
