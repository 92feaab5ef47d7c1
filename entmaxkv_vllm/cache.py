"""The page: one (block, KV head) as [K | V | statistics], planned inside vLLM's cache memory."""

from dataclasses import replace
from typing import TYPE_CHECKING

from entmaxkv_kernels import Adaptive, Exact, Gaussian, PagedCache, PageLayout, Selector, TopK
from entmaxkv_kernels.pages import CODED_HEAD_SIZES
from entmaxkv_vllm.config import GAUSSIAN, ConfigurationError, EntmaxKVConfig

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


def selector_of(config: EntmaxKVConfig) -> Selector:
    """The kernels' selector for a configuration."""
    if config.selector in GAUSSIAN:
        return Gaussian(shared_spread=config.selector == "gaussian-paper")
    if config.selector == "topk":
        return TopK(token_budget=config.token_budget, codes=config.codes)
    if config.selector == "adaptive":
        return Adaptive(margin=config.margin, guard=config.guard, codes=config.codes)
    return Exact(prune=config.prune, codes=config.codes)


def is_fp8(cache_dtype: str | None) -> bool:
    """Whether vLLM's --kv-cache-dtype stands for torch.float8_e4m3fn with one scale a tensor."""
    return cache_dtype in ("fp8", "fp8_e4m3")


def page_layout(config: EntmaxKVConfig, head_size: int, fp8: bool = False) -> PageLayout:
    """The page that the configured selector needs.

    Raises:
        ConfigurationError: if means and deviations are not a whole number of values per token, or
            keys of this size have no codes.
    """
    if config.codes and head_size not in CODED_HEAD_SIZES:
        raise ConfigurationError(
            "codes",
            True,
            f"does not fit head size {head_size}: keys have codes if it is a multiple of 4 from "
            f"{CODED_HEAD_SIZES[0]} to {CODED_HEAD_SIZES[-1]}",
            "leave it out",
        )
    try:
        return PageLayout(config.page_size, head_size, selector_of(config).statistics, fp8)
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


def without_statistics(pages: PagedCache) -> PagedCache:
    """The same pages for a layer that always reads them all, so that none are recomputed."""
    return pages._replace(
        statistics=pages.statistics[:, :, :0],
        scales=pages.scales[:, :, :0],
        layout=replace(pages.layout, statistics=()),
    )
