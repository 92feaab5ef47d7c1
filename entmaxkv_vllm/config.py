"""One frozen configuration: its fields, where each value comes from, and what is refused."""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.entmaxkv")

SELECTORS = ("exact", "gaussian", "gaussian-paper", "topk", "adaptive")
GAUSSIAN = ("gaussian", "gaussian-paper")
IMPLEMENTATIONS = ("auto", "reference", "triton")
PAGE_SIZES = (16, 32, 64, 128)
ALPHA_KEYS = ("entmax_alpha", "adasplash_alpha", "initial_alpha")
SELECTORS_OF = {
    "prune": ("exact",),
    "token_budget": ("topk",),
    "margin": ("adaptive",),
    "guard": ("adaptive",),
    "codes": ("topk", "adaptive", "exact"),
}
"""Options that mean something to some selectors only."""
SECTION = "entmaxkv"
SMALLEST_ENTMAX_ALPHA = 1.01
DRAFTERS = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
"""Methods of speculative decoding that draft without attention."""

OTHER_BACKEND = "serve this model with another attention backend"
_SOFTMAX_REMEDY = (
    "if this is an ordinary softmax model, say so: "
    """--additional-config '{"entmaxkv": {"alpha": 1.0}}'; if it was trained with entmax, """
    """give its alpha: --hf-overrides '{"entmax_alpha": 1.5}'"""
)


class ConfigurationError(ValueError):
    """A setting that cannot be served: the message names it, its value and the remedy."""

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"entmaxkv: {setting}={value!r} {problem}; {remedy}")


@dataclass(frozen=True)
class EntmaxKVConfig:
    """What is in force for one engine. Build it with :func:`resolve` or :func:`from_vllm`.

    Attributes:
        alpha: entmax alpha in [1, 2], one for all query heads or one per query head of the
            whole model (before tensor parallelism). 1 is softmax.
        selector: `exact` reads every page of keys; `gaussian` reads the pages whose keys can
            reach the estimated threshold (EntmaxKV, arXiv 2605.21649); `gaussian-paper` is the
            same with the paper's own margins, which the spread of all heads decides; `topk` reads
            the best pages of `token_budget` (Quest, arXiv 2406.10774); `adaptive` reads the pages
            that seem to reach the threshold of what it read first.
        prune: whether `exact` leaves out pages that bounds prove to hold no weight.
        token_budget: tokens that `topk` reads per step and KV head, besides the last page.
        margin: how high `adaptive` takes scores to reach in a page, as a multiple of how high they
            do in those that it read first.
        guard: times the mean radius of a page's neighbours from which `adaptive` judges it by its
            bound; 0 for no guard.
        codes: whether `topk`, `adaptive` and `exact` that prunes go by two bits of every channel of
            every key, in place of boxes around the keys of a page.
        page_size: tokens in a page; one vLLM block is a whole number of pages.
        dense_layers: indices of layers that always decode exactly.
        exact_below: contexts up to this many tokens always decode exactly.
        implementation: `triton` is compiled, for GPUs; `reference` is plain PyTorch, slow, without
            CUDA graphs; `auto` is `triton` on an NVIDIA GPU and `reference` elsewhere.
        certificate: whether `topk` and `adaptive` count what their steps can prove of their own
            exactness.
        layer_metrics: whether /metrics tells the counters of each layer, too.
        sources: where each value came from, by field name.
    """

    alpha: float | tuple[float, ...]
    selector: str = "exact"
    prune: bool = False
    token_budget: int = 2048
    margin: float = 1.25
    guard: float = 1.2
    codes: bool = False
    page_size: int = 16
    dense_layers: tuple[int, ...] = ()
    exact_below: int = 2048
    implementation: str = "auto"
    certificate: bool = False
    layer_metrics: bool = False
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def head_alphas(self, first_head: int, num_heads: int) -> float | tuple[float, ...]:
        """alpha of query heads [first_head, first_head + num_heads) of the whole model; one number
        where it is the same for all, with which kernels are faster."""
        if not isinstance(self.alpha, tuple):
            return self.alpha
        own = self.alpha[first_head : first_head + num_heads]
        return own[0] if len(set(own)) == 1 else own

    @property
    def kernels(self) -> str:
        """The implementation that serves in this process: `reference` or `triton`."""
        if self.implementation != "auto":
            return self.implementation
        from vllm.platforms import current_platform

        return "triton" if current_platform.is_cuda() else "reference"

    def describe(self, name: str) -> str:
        """The value of one option in force and where it came from."""
        return f"{name}={getattr(self, name)} ({self.sources.get(name, 'default')})"


OPTIONS = tuple(f.name for f in fields(EntmaxKVConfig) if f.name != "sources")


def resolve(
    checkpoint: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    additional: Mapping[str, Any] | None = None,
    num_query_heads: int,
    num_layers: int,
) -> EntmaxKVConfig:
    """Merge and validate the settings of one model.

    Args:
        checkpoint: the model's config.json as loaded, with `overrides` already merged in.
        overrides: what `--hf-overrides` gave; its alpha wins, however it is spelled.
        additional: `--additional-config`; its section `entmaxkv` wins over the checkpoint.
        num_query_heads: query heads of the whole model.
        num_layers: layers of the whole model.

    Raises:
        ConfigurationError: for any value that cannot be served.
    """
    options = _section(additional or {})
    values: dict[str, Any] = dict(options)
    sources = dict.fromkeys(options, "--additional-config")
    if "alpha" not in values:
        values["alpha"], sources["alpha"] = _checkpoint_alpha(checkpoint, overrides or {})
    values["alpha"] = _alpha(values["alpha"], sources["alpha"], num_query_heads)

    defaults = {f.name: f.default for f in fields(EntmaxKVConfig)}
    config = EntmaxKVConfig(
        alpha=values["alpha"],
        selector=_choice("selector", values.get("selector", defaults["selector"]), SELECTORS),
        prune=_flag("prune", values.get("prune", defaults["prune"])),
        margin=_number("margin", values.get("margin", defaults["margin"])),
        guard=_number("guard", values.get("guard", defaults["guard"])),
        codes=_flag("codes", values.get("codes", defaults["codes"])),
        token_budget=_integer("token_budget", values.get("token_budget", defaults["token_budget"])),
        page_size=_page_size(values.get("page_size", defaults["page_size"])),
        dense_layers=_layers(values.get("dense_layers", defaults["dense_layers"]), num_layers),
        exact_below=_integer("exact_below", values.get("exact_below", defaults["exact_below"])),
        implementation=_choice(
            "implementation",
            values.get("implementation", defaults["implementation"]),
            IMPLEMENTATIONS,
        ),
        certificate=_flag("certificate", values.get("certificate", defaults["certificate"])),
        layer_metrics=_flag(
            "layer_metrics", values.get("layer_metrics", defaults["layer_metrics"])
        ),
        sources=sources,
    )
    for name, selectors in SELECTORS_OF.items():
        if name in options and config.selector not in selectors:
            raise ConfigurationError(
                name,
                getattr(config, name),
                f"means nothing to selector {config.selector}",
                f"leave it out, or use selector {' or '.join(selectors)}",
            )
    if config.certificate and config.selector not in ("topk", "adaptive"):
        raise ConfigurationError(
            "certificate",
            True,
            f"needs bounds of what is not read, which selector {config.selector} does not keep",
            "leave it out, or use selector topk or adaptive",
        )
    if config.codes and config.selector == "exact" and not config.prune:
        raise ConfigurationError(
            "codes",
            True,
            "means nothing to selector exact, which reads all pages unless it prunes",
            "leave it out, or set prune",
        )
    if config.codes and "guard" in options:
        raise ConfigurationError(
            "guard",
            config.guard,
            "means nothing with codes, which show isolated keys as they are",
            "leave it out",
        )
    _check_adaptive(config)
    if config.token_budget < config.page_size:
        raise ConfigurationError(
            "token_budget",
            config.token_budget,
            f"is less than one page of {config.page_size} tokens",
            f"give at least {config.page_size}",
        )
    alphas = config.alpha if isinstance(config.alpha, tuple) else (config.alpha,)
    if config.selector in (*GAUSSIAN, "adaptive") and 1.0 in alphas:
        raise ConfigurationError(
            "selector",
            config.selector,
            "goes by an entmax threshold, which softmax (alpha 1) does not have",
            "use selector exact or topk",
        )
    if config.prune and 1.0 in alphas:
        raise ConfigurationError(
            "prune", True, "finds nothing: softmax (alpha 1) weighs every token", "leave it out"
        )
    return config


def _check_adaptive(config: EntmaxKVConfig) -> None:
    from entmaxkv_kernels import Adaptive

    try:
        Adaptive(margin=config.margin, guard=config.guard)
    except ValueError as error:
        name = str(error).split()[0]
        expected = str(error).partition("; expected ")[2]
        raise ConfigurationError(
            name, getattr(config, name), "is not usable", f"give {expected}"
        ) from error


def _section(additional: Mapping[str, Any]) -> Mapping[str, Any]:
    if SECTION not in additional:
        for name in additional:
            if name in OPTIONS:
                raise ConfigurationError(
                    "additional_config",
                    name,
                    "is an option of entmaxkv outside its section",
                    f"""write '{{"{SECTION}": {{"{name}": ...}}}}'""",
                )
            if difflib.get_close_matches(SECTION, [str(name).lower()], n=1, cutoff=0.8):
                raise ConfigurationError(
                    "additional_config", name, "is not a section", f"did you mean {SECTION!r}?"
                )
        return {}
    options = additional[SECTION]
    if not isinstance(options, Mapping):
        raise ConfigurationError(
            f"additional_config[{SECTION!r}]",
            options,
            "is not a JSON object",
            """write it as '{"entmaxkv": {"selector": "exact"}}'""",
        )
    for name in options:
        if name not in OPTIONS:
            raise ConfigurationError("option", name, "is unknown", _suggestion(str(name), OPTIONS))
    return options


def _suggestion(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    listed = f"choose from {', '.join(choices)}"
    return f"did you mean {near[0]!r}? ({listed})" if near else listed


def _checkpoint_alpha(
    checkpoint: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[Any, str]:
    keys: tuple[str, ...] = ALPHA_KEYS
    if "use_triton_entmax" in checkpoint:
        # SparseModernBERT calls it plainly `alpha`, too common a name to trust elsewhere.
        keys = (*ALPHA_KEYS, "alpha")
    text_overrides = overrides.get("text_config")
    for values, source in (
        (overrides, "--hf-overrides"),
        (text_overrides if isinstance(text_overrides, Mapping) else {}, "--hf-overrides"),
        (checkpoint, "config.json"),
    ):
        for key in keys:
            if values.get(key) is not None:
                return values[key], source if values is not checkpoint else f"{source} {key}"
    raise ConfigurationError(
        "entmax_alpha", None, "is missing from the model's config.json", _SOFTMAX_REMEDY
    )


def _alpha(value: Any, source: str, num_query_heads: int) -> float | tuple[float, ...]:
    setting = f"alpha ({source})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != num_query_heads:
            raise ConfigurationError(
                setting,
                list(value),
                f"has {len(value)} entries but the model has {num_query_heads} query heads",
                f"give one alpha, or one for each of the {num_query_heads} query heads",
            )
        return tuple(_one_alpha(setting, entry) for entry in value)
    return _one_alpha(setting, value)


def _one_alpha(setting: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(setting, value, "is not a number", "give a number in [1, 2]")
    if not 1.0 <= value <= 2.0:
        raise ConfigurationError(
            setting,
            value,
            "is outside [1, 2]",
            "1 is softmax, 1.5 the usual entmax, 2 sparsemax",
        )
    if 1.0 < value < SMALLEST_ENTMAX_ALPHA:
        raise ConfigurationError(
            setting,
            value,
            "is too close to 1 to be computed in float32",
            f"use 1 (softmax) or at least {SMALLEST_ENTMAX_ALPHA}",
        )
    return float(value)


def _choice(setting: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ConfigurationError(setting, value, "is unknown", _suggestion(str(value), choices))
    return value


def _flag(setting: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(setting, value, "is not a boolean", "give true or false")
    return value


def _integer(setting: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(
            setting, value, "is not a number of tokens", "give an integer of at least 0"
        )
    return value


def _number(setting: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(setting, value, "is not a number", "give a number")
    return float(value)


def _page_size(value: Any) -> int:
    if type(value) is not int or value not in PAGE_SIZES:
        raise ConfigurationError(
            "page_size", value, "is not usable", f"choose from {', '.join(map(str, PAGE_SIZES))}"
        )
    return value


def _layers(value: Any, num_layers: int) -> tuple[int, ...]:
    remedy = f"give a list of layer indices from 0 to {num_layers - 1}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigurationError("dense_layers", value, "is not a list", remedy)
    for index in value:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_layers:
            raise ConfigurationError(
                "dense_layers", list(value), f"holds {index!r}, which is no layer", remedy
            )
    return tuple(sorted(set(value)))


_last_resolved: EntmaxKVConfig | None = None


def from_vllm(vllm_config: "VllmConfig") -> EntmaxKVConfig:
    """Resolve the configuration of one engine and remember it for this process.

    Raises:
        ConfigurationError: for any value, and any feature of vLLM, that cannot be served.
    """
    global _last_resolved
    model = vllm_config.model_config
    overrides = model.hf_overrides
    config = resolve(
        {**vars(model.hf_config), **vars(model.hf_text_config)},
        overrides=overrides if isinstance(overrides, Mapping) else None,
        additional=vllm_config.additional_config,
        num_query_heads=model.hf_text_config.num_attention_heads,
        num_layers=model.get_total_num_hidden_layers(),
    )
    _check_features(vllm_config, config)
    if config != _last_resolved:
        logger.info("EntmaxKV in force: %s", ", ".join(map(config.describe, OPTIONS)))
        logger.info("EntmaxKV kernels: %s", config.kernels)
    _last_resolved = config
    return config


def _check_features(vllm_config: "VllmConfig", config: EntmaxKVConfig) -> None:
    """Refuse what vLLM can do but this backend cannot, and positions that make no sense."""
    from entmaxkv_vllm.nape import ARCHITECTURE, read_nape

    cache, text = vllm_config.cache_config, vllm_config.model_config.hf_text_config
    if ARCHITECTURE in vllm_config.model_config.architectures:
        read_nape(vars(text))
    if cache.user_specified_block_size and cache.block_size % config.page_size:
        raise ConfigurationError(
            "block_size",
            cache.block_size,
            f"is not a multiple of entmaxkv's page_size {config.page_size}",
            "leave --block-size out or give a multiple of it",
        )
    _check_implementation(config)
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in DRAFTERS:
        raise ConfigurationError(
            "speculative_config",
            speculative.method,
            "drafts with attention layers of its own, whose alpha is not known",
            "use the method ngram with selector exact, or serve without speculative decoding",
        )
    if speculative is not None and config.selector != "exact":
        raise ConfigurationError(
            "speculative_config",
            speculative.method,
            f"verifies several tokens at once, which selector {config.selector} does not do",
            "use selector exact, or serve without speculative decoding",
        )
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if config.selector == "gaussian-paper" and ranks > 1:
        raise ConfigurationError(
            "selector",
            "gaussian-paper",
            f"goes by the mean over all heads, of which each of {ranks} ranks sees some",
            "use selector gaussian, or --tensor-parallel-size 1",
        )
    if cache.kv_sharing_fast_prefill:
        raise ConfigurationError(
            "kv_sharing_fast_prefill", True, "is not supported by ENTMAXKV", "leave it out"
        )
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(text, name, None):
            raise ConfigurationError(
                name, getattr(text, name), "is not supported by ENTMAXKV", OTHER_BACKEND
            )


def _check_implementation(config: EntmaxKVConfig) -> None:
    """Refuse compiled kernels without a GPU, and warn of uncompiled ones beside one."""
    from vllm.platforms import current_platform

    on_gpu = current_platform.is_cuda_alike()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if config.kernels == "triton" and not on_gpu and not interpreted:
        raise ConfigurationError(
            "implementation",
            "triton",
            "needs a GPU",
            "leave it out; to test the kernels on a CPU, set TRITON_INTERPRET=1",
        )
    if config.kernels == "reference" and on_gpu and config != _last_resolved:
        logger.warning(
            "EntmaxKV: the PyTorch reference serves, slowly and without CUDA graphs, not the "
            "compiled kernels"
        )


def current() -> EntmaxKVConfig:
    """The configuration in force in this process.

    vLLM asks for block sizes and cache specs also where no engine configuration is set; the
    one that the layers were built with counts there.

    Raises:
        RuntimeError: if neither a vLLM configuration is set nor one was resolved before.
    """
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None and vllm_config.model_config is not None:
        return from_vllm(vllm_config)
    if _last_resolved is None:
        raise RuntimeError("entmaxkv: asked for its configuration before any model was set up")
    return _last_resolved
