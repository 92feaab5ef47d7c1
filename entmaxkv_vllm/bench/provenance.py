"""Which GPU, versions, commit and date a result belongs to."""

import contextlib
import datetime
import importlib
import subprocess
from pathlib import Path
from typing import Any

import torch

_CLONE = Path(__file__).resolve().parent.parent.parent


def versions() -> dict[str, str]:
    """Of those of PyTorch, Triton and vLLM that are installed."""
    found = {}
    for name in ("torch", "triton", "vllm"):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name).__version__
    return found


def checked_out() -> str:
    """The commit of this checkout."""
    if not (_CLONE / "pyproject.toml").exists():
        return "unknown"
    command = ["git", "-C", str(_CLONE), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def about(commit: str | None = None) -> dict[str, Any]:
    """The header of a result file.

    commit: for a copy of the code that is no checkout.
    """
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
        "commit": commit or checked_out(),
        "date": datetime.date.today().isoformat(),
    }
