"""The page: one (block, KV head) as [K | V | statistics], planned inside vLLM's cache memory."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from entmaxkv_kernels import PagedCache, PageLayout, Selector, split_pages
from entmaxkv_vllm.config import ConfigurationError, EntmaxKVConfig

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


def page_layout(config: EntmaxKVConfig, selector: Selector, head_size: int) -> PageLayout:
    """The page that `selector` needs.

    Raises:
        ConfigurationError: if the statistics do not fill a whole number of values per token.
    """
    try:
        layout = PageLayout(config.page_size, head_size, selector.statistics)
        layout.elements_per_token  # noqa: B018  the property checks that it is whole
        return layout
    except ValueError as error:
        raise ConfigurationError(
            "page_size",
            config.page_size,
            f"does not fit head size {head_size} ({error})",
            "choose a smaller page size",
        ) from error


def plan(spec: "AttentionSpec", layout: PageLayout) -> "AttentionSpec":
    """vLLM's cache spec of a layer, grown by the statistics' share of each token."""
    content = layout.elements_per_token * spec.dtype.itemsize
    return replace(spec, state_content_bytes=content)


def views(kv_cache: torch.Tensor, layout: PageLayout) -> PagedCache:
    """Keys, values and statistics of vLLM's cache tensor, without a copy.

    Args:
        kv_cache: [num_pages, kv_heads, page_size, elements_per_token], each page one run.
    """
    return split_pages(kv_cache, layout)
