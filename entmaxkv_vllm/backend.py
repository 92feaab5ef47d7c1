"""What ENTMAXKV supports, and why not the rest."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, KVQuantMode
from vllm.v1.kv_cache_layout import KVCacheLayout

from entmaxkv_vllm import cache, compat
from entmaxkv_vllm.config import ConfigurationError, EntmaxKVConfig, current, from_vllm
from entmaxkv_vllm.impl import EntmaxKVImpl, selector_of
from entmaxkv_vllm.metadata import EntmaxKVMetadataBuilder
from entmaxkv_vllm.plugin import BACKEND

if TYPE_CHECKING:
    from vllm.config import VllmConfig

compat.check_vllm_version()

HEAD_SIZES = (64, 80, 96, 128, 256)
_OTHER_BACKEND = "serve this model with another attention backend"


class EntmaxKVBackend(AttentionBackend):
    """Entmax attention over vLLM's paged cache, with per-page key statistics inside the pages."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

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
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A page must be one contiguous run, so tokens may not be interleaved across heads.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.BHLNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Grow a layer's cache by the page statistics that the selector in force reads."""
        if spec.state_content_bytes is not None or spec.kv_quant_mode != KVQuantMode.NONE:
            return spec
        config = current()
        layout = cache.page_layout(config, selector_of(config), spec.head_size)
        return cache.plan(spec, layout)

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Reasons why ENTMAXKV cannot serve a layer, each with its setting and a remedy."""
        reasons = [
            _explain(reason, kwargs) for reason in super().validate_configuration(*args, **kwargs)
        ]
        dtype, cache_dtype = kwargs.get("dtype"), kwargs.get("kv_cache_dtype")
        if cache_dtype in ("float16", "bfloat16") and dtype != getattr(torch, cache_dtype):
            reasons.append(
                f"kv_cache_dtype={cache_dtype} differs from dtype={dtype}; "
                "use --kv-cache-dtype auto"
            )
        return reasons


def _explain(reason: str, layer: dict[str, Any]) -> str:
    """vLLM's generic reason, with the value that caused it and what to do."""
    names = ", ".join(
        str(dtype).removeprefix("torch.") for dtype in EntmaxKVBackend.supported_dtypes
    )
    details = {
        "head_size not supported": f"head_size={layer.get('head_size')} is not supported; "
        f"supported are {', '.join(map(str, HEAD_SIZES))}",
        "dtype not supported": f"dtype={layer.get('dtype')} is not supported; use --dtype "
        f"with one of {names}",
        "kv_cache_dtype not supported": f"kv_cache_dtype={layer.get('kv_cache_dtype')} is not "
        f"supported; use --kv-cache-dtype auto",
        "block_size not supported": f"block_size={layer.get('block_size')} is not a multiple of "
        "entmaxkv's page_size; leave --block-size out or give a multiple of it",
        "MLA not supported": f"MLA attention is not supported; {_OTHER_BACKEND}",
        "attention sinks not supported": "attention sinks have no entmax counterpart; "
        f"{_OTHER_BACKEND}",
        "DCP not supported": "decode context parallelism needs a softmax normaliser, which entmax "
        "does not have; leave --decode-context-parallel-size at 1",
        "PCP not supported": "prefill context parallelism needs a softmax normaliser, which "
        "entmax does not have; leave --prefill-context-parallel-size at 1",
    }
    if reason.startswith("attention type"):
        return f"{reason}: only causal decoder attention is; {_OTHER_BACKEND}"
    return details.get(reason, f"{reason}; {_OTHER_BACKEND}")


def check_engine(vllm_config: "VllmConfig") -> EntmaxKVConfig:
    """Validate an engine's whole configuration before any of its processes starts.

    The same checks as when layers are built, where they can be read off the configuration, so
    that a mistake costs a second and not a model load.

    Raises:
        ConfigurationError: naming the first setting that cannot be served.
    """
    model, parallel, cache_config = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.cache_config,
    )
    config = from_vllm(vllm_config)
    cache.page_layout(config, selector_of(config), model.get_head_size())
    block_size = cache_config.block_size if cache_config.user_specified_block_size else None
    if block_size is not None and block_size % config.page_size:
        raise ConfigurationError(
            "block_size",
            block_size,
            f"is not a multiple of entmaxkv's page_size {config.page_size}",
            "leave --block-size out or give a multiple of it",
        )
    soft_cap = getattr(model.hf_text_config, "attn_logit_softcapping", None)
    if soft_cap:
        raise ConfigurationError(
            "attn_logit_softcapping", soft_cap, "is not supported by ENTMAXKV", _OTHER_BACKEND
        )
    reasons = EntmaxKVBackend.validate_configuration(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache_config.cache_dtype,
        block_size=None,
        use_mla=model.use_mla,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=model.is_mm_prefix_lm,
        use_per_head_quant_scales=False,
        device_capability=None,
        attn_type=AttentionType.DECODER,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_dcp=parallel.decode_context_parallel_size > 1,
    )
    if reasons:
        raise ValueError(f"entmaxkv: ENTMAXKV cannot serve this model: {'; '.join(reasons)}")
    return config
