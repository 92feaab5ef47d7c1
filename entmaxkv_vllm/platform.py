"""vLLM on a machine without a GPU: its own CPU platform, which can also select ENTMAXKV."""

import logging
from typing import TYPE_CHECKING, Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from entmaxkv_vllm.config import ALPHA_KEYS
from entmaxkv_vllm.plugin import BACKEND_PATH, chosen_backends, is_entmaxkv

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.entmaxkv")

_CpuPlatform: Any = resolve_obj_by_qualname(
    cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform"
)


class EntmaxKVCpuPlatform(_CpuPlatform):
    """vLLM's CPU platform; everything but the choice of ENTMAXKV is inherited."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Path of the attention backend class.

        Raises:
            ValueError: if ENTMAXKV was selected but cannot serve this layer, with the reasons.
        """
        if not is_entmaxkv(selected_backend):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        from entmaxkv_vllm.backend import EntmaxKVBackend, refuse

        refuse(
            EntmaxKVBackend.validate_configuration(
                device_capability=None, **attn_selector_config._asdict()
            )
        )
        return BACKEND_PATH

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Validate ENTMAXKV's settings before any process starts, and use its page size."""
        super().check_and_update_config(vllm_config)
        model = vllm_config.model_config
        if model is None:
            return
        if not any(map(is_entmaxkv, chosen_backends(vllm_config))):
            if any(getattr(model.hf_text_config, key, None) for key in ALPHA_KEYS):
                logger.warning(
                    "entmaxkv: %s was trained with entmax attention but is served with softmax; "
                    "use --attention-backend ENTMAXKV",
                    model.model,
                )
            return
        from entmaxkv_vllm.backend import check_engine

        config = check_engine(vllm_config)
        cache = vllm_config.cache_config
        if not cache.user_specified_block_size:
            cache.block_size = config.page_size
