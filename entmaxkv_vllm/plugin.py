"""vLLM's entry points into this package. Light: vLLM loads it in every process it starts."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND = "ENTMAXKV"
BACKEND_PATH = "entmaxkv_vllm.backend.EntmaxKVBackend"
CPU_PLATFORM_PATH = "entmaxkv_vllm.platform.EntmaxKVCpuPlatform"


def register() -> None:
    """Register the model of nape_model.py, and the backend as ENTMAXKV, and as CUSTOM where nobody
    else took that name.

    Safe to call any number of times, in any process. An unsupported vLLM is reported when the
    backend is chosen, not here, so that other models keep working beside this package.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from entmaxkv_vllm.nape import ARCHITECTURE, NapeLlamaConfig

    _register_backend()
    AutoConfig.register(NapeLlamaConfig.model_type, NapeLlamaConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"entmaxkv_vllm.nape_model:{ARCHITECTURE}")
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        _refuse_on_the_built_in_platform()


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, BACKEND_PATH)
        # A child process unpickles its configuration before it loads plugins, so the member
        # must bring its own registration along.
        AttentionBackendEnum[BACKEND].__reduce_ex__ = _reduce
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


def _reduce(protocol: Any) -> tuple[Any, tuple[()]]:
    return _registered_member, ()


def _registered_member() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    _register_backend()
    return AttentionBackendEnum[BACKEND]


def _refuse_on_the_built_in_platform() -> None:
    """VLLM_TARGET_DEVICE=cpu passes over platform plugins, and vLLM's own CPU platform would
    answer a request for ENTMAXKV with softmax and a line at level INFO."""
    from vllm.platforms.cpu import CpuPlatform

    if "get_attn_backend_cls" not in vars(CpuPlatform) or hasattr(CpuPlatform, "_entmaxkv"):
        return
    original = CpuPlatform.get_attn_backend_cls

    def get_attn_backend_cls(cls: type, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if is_entmaxkv(selected_backend):
            raise ValueError(
                "entmaxkv: VLLM_TARGET_DEVICE='cpu' makes vLLM pass over platform plugins, so "
                "ENTMAXKV cannot be selected; unset it, vLLM's CPU build needs no such setting"
            )
        return original(selected_backend, *args, **kwargs)

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    CpuPlatform._entmaxkv = True


def cpu_platform() -> str | None:
    """Path of the CPU platform that knows ENTMAXKV; None wherever vLLM does not run on a CPU."""
    from vllm.platforms import cpu_platform_plugin

    return CPU_PLATFORM_PATH if cpu_platform_plugin() is not None else None


def is_entmaxkv(backend: Any) -> bool:
    """Whether a member of vLLM's backend enum, or None, stands for this backend."""
    return backend is not None and backend.get_path() == BACKEND_PATH


def chosen_backends(vllm_config: "VllmConfig") -> list[Any]:
    """The attention backends that an engine's configuration names, None included."""
    attention = vllm_config.attention_config
    return [attention.backend, *(attention.backend_per_kind or {}).values()]
