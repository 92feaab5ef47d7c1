"""vLLM's entry points into this package. Light: vLLM loads it in every process it starts."""

import logging
import os
from typing import Any

BACKEND = "ENTMAXKV"
BACKEND_PATH = "entmaxkv_vllm.backend.EntmaxKVBackend"
CPU_PLATFORM_PATH = "entmaxkv_vllm.platform.EntmaxKVCpuPlatform"

logger = logging.getLogger("vllm.entmaxkv")


def register() -> None:
    """Register the backend as ENTMAXKV, and as CUSTOM where nobody else took that name.

    Safe to call any number of times, in any process. An unsupported vLLM is reported when the
    backend is chosen, not here, so that other models keep working beside this package.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, BACKEND_PATH)
        # A child process unpickles its configuration before it loads plugins, so the member
        # must bring its own registration along.
        AttentionBackendEnum[BACKEND].__reduce_ex__ = _reduce
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        logger.warning(
            "entmaxkv: VLLM_TARGET_DEVICE=cpu makes vLLM pass over platform plugins, so ENTMAXKV "
            "cannot be selected on this CPU; unset it to serve with ENTMAXKV"
        )


def _reduce(protocol: Any) -> tuple[Any, tuple[()]]:
    return _registered_member, ()


def _registered_member() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[BACKEND]


def cpu_platform() -> str | None:
    """Path of the CPU platform that knows ENTMAXKV; None wherever vLLM does not run on a CPU."""
    from vllm.platforms import cpu_platform_plugin

    return CPU_PLATFORM_PATH if cpu_platform_plugin() is not None else None
