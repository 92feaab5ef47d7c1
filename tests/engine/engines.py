"""Engines inside the test process, so that their memory can be looked at, shared between tests."""

import contextlib
import gc

from entmaxkv_vllm import DEMO_MODEL


@contextlib.contextmanager
def engine(model=DEMO_MODEL, **options):
    """A `vllm.LLM` with ENTMAXKV in float32; everything it allocated is freed at the end."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "attention_backend": "ENTMAXKV",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 8192,
        "disable_log_stats": False,
        "seed": 0,
    }
    if torch.cuda.is_available():
        # So that several test processes can share a GPU: its free memory is nobody's measure.
        settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
    llm = LLM(str(model), **{**settings, **options})
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def layers_of(llm):
    """The attention layers of an engine that runs in this process, in order."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    context = worker.vllm_config.compilation_config.static_forward_context
    return list(context.values())


def metric(llm, name):
    """Value of one of vLLM's own counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)
