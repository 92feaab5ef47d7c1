"""What ENTMAXKV supports, and why not the rest."""

from entmaxkv_vllm import compat

compat.check_vllm_version()  # before the first import of anything that versions differ in

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, KVQuantMode
from vllm.v1.kv_cache_layout import KVCacheLayout

from entmaxkv_vllm import cache
from entmaxkv_vllm.config import OTHER_BACKEND, EntmaxKVConfig, current, from_vllm
from entmaxkv_vllm.impl import EntmaxKVImpl
from entmaxkv_vllm.metadata import EntmaxKVMetadataBuilder
from entmaxkv_vllm.plugin import BACKEND

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import DeviceCapability

HEAD_SIZES = (64, 80, 96, 128, 256)

REMEDIES = {
    "head_size not supported": f"supported are {', '.join(map(str, HEAD_SIZES))}; {OTHER_BACKEND}",
    "dtype not supported": "use --dtype float16, bfloat16 or float32",
    "kv_cache_dtype not supported": "use --kv-cache-dtype auto or fp8",
    "block_size not supported": "leave --block-size out, or give a multiple of page_size",
    "compute capability not supported": f"an NVIDIA GPU of at least 8.0 is; {OTHER_BACKEND}",
    "MLA not supported": OTHER_BACKEND,
    "attention sinks not supported": f"entmax has no counterpart to them; {OTHER_BACKEND}",
    "KV connector not supported": "leave --kv-transfer-config out",
    "DCP not supported": "entmax has no normaliser to share; "
    "leave --decode-context-parallel-size at 1",
    "PCP not supported": "entmax has no normaliser to share; "
    "leave --prefill-context-parallel-size at 1",
}
"""What to do about each of vLLM's reasons; any other reason means another backend."""


class EntmaxKVBackend(AttentionBackend):
    """Entmax attention over vLLM's paged cache, with per-page key statistics inside the pages."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]
    # Decoding starts while the tokens are appended, so nothing may come between the two.
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[EntmaxKVImpl]:
        return EntmaxKVImpl

    @staticmethod
    def get_builder_cls() -> type[EntmaxKVMetadataBuilder]:
        return EntmaxKVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [current().page_size]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        # Blocks of one page suit every cache layout.
        return current().page_size

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: "DeviceCapability | None") -> bool:
        return capability is None or capability.to_int() >= 80

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # A connector that writes single tokens would leave the page statistics stale.
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A page must be one contiguous run, so tokens may not be interleaved across heads.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.BHLNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Grow a layer's cache by the page statistics that the selector in force reads."""
        fp8 = spec.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR
        if spec.state_content_bytes is not None or not (
            fp8 or spec.kv_quant_mode == KVQuantMode.NONE
        ):
            return spec
        return cache.plan(spec, cache.page_layout(current(), spec.head_size, fp8))

    @classmethod
    def validate_configuration(cls, *args: Any, **layer: Any) -> list[str]:
        """Reasons why ENTMAXKV cannot serve a layer, each with its value and a remedy."""
        reasons = []
        for reason in super().validate_configuration(*args, **layer):
            setting, _, problem = reason.partition(" ")
            shown = f"{setting}={layer[setting]} {problem}" if setting in layer else reason
            reasons.append(f"{shown}; {REMEDIES.get(reason, OTHER_BACKEND)}")
        dtype, cache_dtype = layer.get("dtype"), layer.get("kv_cache_dtype")
        if cache_dtype in ("float16", "bfloat16") and dtype != getattr(torch, cache_dtype):
            reasons.append(
                f"kv_cache_dtype={cache_dtype} differs from dtype={dtype}; "
                "use --kv-cache-dtype auto"
            )
        capability = layer.get("device_capability")
        old = capability is not None and tuple(capability) < (8, 9)
        if cache.is_fp8(cache_dtype) and old:
            reasons.append(
                f"kv_cache_dtype={cache_dtype} needs a GPU of compute capability 8.9; "
                "use --kv-cache-dtype auto"
            )
        return reasons


def refuse(reasons: list[str]) -> None:
    """Raise ValueError if there is any reason against serving."""
    if reasons:
        raise ValueError(f"entmaxkv: ENTMAXKV cannot serve this model: {'; '.join(reasons)}")


def check_engine(vllm_config: "VllmConfig") -> EntmaxKVConfig:
    """Validate an engine's whole configuration before any of its processes starts.

    The same checks as when layers are built, where they can be read off the configuration, so
    that a mistake costs a second and not a model load.

    Raises:
        ValueError: naming the settings that cannot be served.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config = from_vllm(vllm_config)
    fp8 = cache.is_fp8(vllm_config.cache_config.cache_dtype)
    cache.page_layout(config, model.get_head_size(), fp8)
    transfer = vllm_config.kv_transfer_config
    refuse(
        EntmaxKVBackend.validate_configuration(
            head_size=model.get_head_size(),
            dtype=model.dtype,
            kv_cache_dtype=vllm_config.cache_config.cache_dtype,
            block_size=None,
            use_mla=model.use_mla,
            has_sink=False,
            use_sparse=False,
            use_mm_prefix=model.is_mm_prefix_lm,
            use_per_head_quant_scales=False,
            device_capability=None,
            attn_type=AttentionType.DECODER,
            use_kv_connector=transfer is not None and transfer.is_kv_transfer_instance,
            use_pcp=parallel.prefill_context_parallel_size > 1,
            use_dcp=parallel.decode_context_parallel_size > 1,
        )
    )
    return config
