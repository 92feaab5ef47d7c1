"""`entmaxkv doctor`: what is installed, what vLLM would select, why not, and what to do."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from entmaxkv_vllm import __version__, compat
from entmaxkv_vllm.config import OPTIONS
from entmaxkv_vllm.plugin import BACKEND, BACKEND_PATH, CPU_PLATFORM_PATH

Options = Mapping[str, Any]
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do where `status` is not ok."""

    status: Literal["ok", "note", "fail"]
    subject: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:>4}  {self.subject:<18} {self.found}"
        return f"{line}\n{'':26}-> {self.remedy}" if self.remedy else line


def diagnose(
    model: str | None, additional_config: Options, hf_overrides: Options
) -> Iterator[Finding]:
    """Every finding, in the order in which one would look.

    Args:
        model: a model to judge as `vllm serve` would, or None to judge the installation alone.
        additional_config, hf_overrides: as for `vllm serve`, parsed.
    """
    yield Finding("ok", "entmaxkv-vllm", f"{__version__}, Python {platform.python_version()}")
    yield from _torch()
    vllm = _vllm()
    yield vllm
    if vllm.status == "fail":
        return
    yield from _names()
    yield from _plugins()
    yield from _environment()
    yield _platform()
    yield _registered()
    yield _command_line()
    if model is not None:
        yield from _model(model, additional_config, hf_overrides)


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "PyTorch", torch.__version__)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "GPU", ", ".join(names))
    else:
        yield Finding("note", "GPU", "none")


def _vllm() -> Finding:
    distribution = compat.vllm_distribution()
    found = " ".join(distribution) if distribution else "not installed"
    try:
        compat.check_vllm_version()
    except ImportError as error:
        return Finding("fail", "vLLM", found, str(error))
    return Finding("ok", "vLLM", f"{found} (supported: {compat.SUPPORTED})")


def _names() -> Iterator[Finding]:
    if missing := compat.missing_names():
        yield Finding(
            "fail",
            "vLLM's names",
            f"missing: {', '.join(missing)}",
            "install another release of vLLM, or of entmaxkv-vllm",
        )


def _plugins() -> Iterator[Finding]:
    points = importlib.metadata.entry_points()
    missing = [g for g in GROUPS if "entmaxkv" not in points.select(group=g).names]
    if missing:
        yield Finding(
            "fail", "entry points", f"missing: {', '.join(missing)}", "reinstall entmaxkv-vllm"
        )
    else:
        yield Finding("ok", "entry points", ", ".join(g.removeprefix("vllm.") for g in GROUPS))


def _environment() -> Iterator[Finding]:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "entmaxkv" not in allowed.split(","):
        yield Finding(
            "fail",
            "VLLM_PLUGINS",
            f"{allowed!r} leaves entmaxkv out",
            "add entmaxkv to VLLM_PLUGINS, or unset it",
        )
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        yield Finding(
            "fail",
            "VLLM_TARGET_DEVICE",
            "cpu makes vLLM pass over platform plugins",
            "unset it; the CPU build of vLLM finds the CPU by itself",
        )


def _platform() -> Finding:
    from vllm.platforms import current_platform

    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    if current_platform.is_unspecified():
        return Finding(
            "fail",
            "platform",
            "vLLM's GPU build, but no GPU",
            "in a fresh virtual environment, install vLLM's CPU build (make setup in a clone)",
        )
    if current_platform.is_cpu() and name != CPU_PLATFORM_PATH:
        return Finding("fail", "platform", f"{name} cannot select {BACKEND}", "see the lines above")
    return Finding("ok", "platform", name)


def _registered() -> Finding:
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    if BACKEND not in AttentionBackendEnum.__members__:
        return Finding("fail", "backend", f"{BACKEND} is not registered", "see the lines above")
    custom = AttentionBackendEnum.CUSTOM
    also = " and as CUSTOM" if custom.get_path() == BACKEND_PATH else ""
    return Finding("ok", "backend", f"--attention-backend {BACKEND}{also}")


def _command_line() -> Finding:
    distribution = compat.vllm_distribution()
    if distribution is not None and distribution[0] != "vllm":
        return Finding(
            "note",
            "vllm command",
            f"needs a distribution named vllm; installed is {distribution[0]}",
            "serve with `python -m vllm.entrypoints.openai.api_server --model MODEL "
            f"--attention-backend {BACKEND}`",
        )
    return Finding("ok", "vllm command", f"vllm serve MODEL --attention-backend {BACKEND}")


def _model(model: str, additional_config: Options, hf_overrides: Options) -> Iterator[Finding]:
    from vllm.engine.arg_utils import EngineArgs

    from entmaxkv_vllm.backend import check_engine

    try:
        engine = EngineArgs(
            model=model,
            attention_backend=BACKEND,
            additional_config=dict(additional_config),
            hf_overrides=dict(hf_overrides),
        ).create_engine_config()
        config = check_engine(engine)
    except Exception as error:
        yield Finding("fail", "model", model, str(error))
        return
    yield Finding("ok", "model", f"{model} can be served with {BACKEND}")
    for name in OPTIONS:
        yield Finding("ok", "in force", config.describe(name))
    yield _kernels(config.kernels)


def _kernels(serving: str) -> Finding:
    """Which implementation serves."""
    from vllm.platforms import current_platform

    if serving == "triton":
        return Finding("ok", "kernels", "triton: compiled, with CUDA graphs for decoding")
    on_gpu = current_platform.is_cuda_alike()
    return Finding(
        "note",
        "kernels",
        "reference: plain PyTorch, for tests and small models",
        "leave the option implementation out" if on_gpu else "",
    )


def run(model: str | None, additional_config: Options, hf_overrides: Options) -> int:
    """Print the report; 0 if nothing stands in the way, 1 otherwise."""
    failures = 0
    for finding in diagnose(model, additional_config, hf_overrides):
        print(finding)
        failures += finding.status == "fail"
    print(f"\n{failures} to mend." if failures else "\nReady.")
    return 1 if failures else 0
