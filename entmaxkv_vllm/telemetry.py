"""Counters that prove what decoding did: written by each worker, read by anyone on the host.

Every worker process maps one small file in shared memory, [layers, counters] int64. On a CPU the
kernels add to it. On a GPU they add to a table of the same shape in its memory, which the last
layer copies to the file: one copy a step, in the order of the stream, and by the CUDA graph where
there is one. Reading the file costs the worker nothing.
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

_mapped: dict[str, "WorkerCounters"] = {}
_open_files: list[BinaryIO] = []


def _folder() -> Path:
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


class WorkerCounters:
    """This process's counters for one engine, shared by its layers.

    Attributes:
        shared: [layers, len(Counter)] int64, in the file. A layer of another pipeline stage keeps
            its zeros.
    """

    def __init__(self, shared: torch.Tensor) -> None:
        self.shared = shared
        self._table: torch.Tensor | None = None
        self._last_layer = -1

    def row(self, layer: int, device: torch.device) -> torch.Tensor:
        """One layer's counters where the kernels can add to them, [len(Counter)] int64."""
        self._last_layer = max(self._last_layer, layer)
        if device.type == "cpu":
            return self.shared[layer]
        if self._table is None:
            _register_with_gpu(self.shared)
            self._table = torch.zeros_like(self.shared, device=device)
        return self._table[layer]

    def publish(self, layer: int) -> None:
        """After a layer has decoded: copy a GPU's counters to the file, if it is the last layer."""
        if self._table is not None and layer == self._last_layer:
            self.shared.copy_(self._table, non_blocking=True)


def _register_with_gpu(memory: torch.Tensor) -> None:
    """Let a GPU copy to this memory without the host's help.

    Raises RuntimeError if the driver refuses.
    """
    size = memory.numel() * memory.element_size()
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)
    if int(error):
        raise RuntimeError(
            f"entmaxkv: the driver cannot use the counters' shared memory: CUDA error {error}"
        )


def worker_counters(vllm_config: "VllmConfig") -> WorkerCounters:
    """This process's counters for one engine, made at the first call."""
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
        _mapped[instance] = WorkerCounters(torch.from_numpy(table))
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
