"""Counters that prove what decoding did: written by each worker, read by anyone on the host.

Every worker process maps one small file in shared memory, [layers, counters] int64, and the
kernels add to it. Reading it costs the worker nothing.
"""

import atexit
import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from entmaxkv_kernels import Counter

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "entmaxkv"

_mapped: dict[str, torch.Tensor] = {}
_open_files: list[BinaryIO] = []


def _folder() -> Path:
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def worker_counters(vllm_config: "VllmConfig") -> torch.Tensor:
    """This process's counters for one engine, [layers, len(Counter)] int64, shared by its layers.

    A layer of another pipeline stage keeps its zeros.
    """
    instance = vllm_config.instance_id
    if instance not in _mapped:
        _remove_orphans()
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        path = _folder() / f"{_PREFIX}-{instance}-{os.getpid()}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        file = os.fdopen(descriptor, "r+b")
        # The lock says that this file has a living owner; it ends with the process.
        fcntl.flock(file, fcntl.LOCK_EX)
        _open_files.append(file)
        atexit.register(path.unlink, missing_ok=True)
        file.write(bytes(layers * len(Counter) * 8))
        file.flush()
        table = np.memmap(file, dtype=np.int64, mode="r+", shape=(layers, len(Counter)))
        _mapped[instance] = torch.from_numpy(table)
    return _mapped[instance]


def read_counters(instance_id: str) -> np.ndarray:
    """Sum of an engine's counters over its worker processes, [layers, len(Counter)] int64.

    Without any worker (none started yet, or none on this host): shape [0, len(Counter)].
    """
    tables = []
    for path in _folder().glob(f"{_PREFIX}-{instance_id}-*"):
        # A worker may end between the two lines, and its file with it.
        with contextlib.suppress(FileNotFoundError):
            tables.append(np.fromfile(path, dtype=np.int64).reshape(-1, len(Counter)))
    started = [table for table in tables if len(table)]
    return np.sum(started, axis=0) if started else np.zeros((0, len(Counter)), dtype=np.int64)


def engine_counters(llm: Any) -> dict[str, int]:
    """What an offline `vllm.LLM` decoded so far, by counter name, summed over layers."""
    table = read_counters(llm.llm_engine.vllm_config.instance_id)
    return {counter.name.lower(): int(table[:, counter].sum()) for counter in Counter}


def _remove_orphans() -> None:
    """Remove files of workers that were killed before they could do it themselves."""
    for path in _folder().glob(f"{_PREFIX}-*-*"):
        # Another user's file, or one that is locked because its worker lives, is left alone.
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
