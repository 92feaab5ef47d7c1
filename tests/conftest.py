"""Settings of vLLM for tests, made before anything imports it."""

import os

import pytest

from entmaxkv_vllm import DEMO_MODEL

# In-process engines: their memory can be looked at, and a start takes 6 seconds instead of 35.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# To ask PyTorch for a GPU while tests are collected can leave forked workers without one.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# One thread a process: on busy cores, threads that wait for each other cost more than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pytest_ignore_collect(collection_path, config):
    """Leave tests/compiled to a process of its own: its interpreter would reach vLLM's kernels."""
    if collection_path.name == "compiled" and not any("compiled" in arg for arg in config.args):
        return True
    return None


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_MODEL)
