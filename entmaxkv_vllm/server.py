"""A vLLM server as a child process, on a free loopback port, stopped cleanly at the end."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from entmaxkv_vllm.plugin import BACKEND

START_SECONDS = 240
STOP_SECONDS = 30
HOST = "127.0.0.1"


class ServerError(RuntimeError):
    """The server did not start; the message ends with what it printed last."""


class Server:
    """`with Server(model, ...) as server:` yields once the server answers.

    Args:
        model: what `vllm serve` would be given.
        additional_config: for `--additional-config`.
        arguments: further arguments of vLLM's OpenAI server.
        keep: leave the server running at the end.
        waiting: called about twice a second with the seconds waited so far.

    Raises:
        ServerError: if it stops while starting, or does not answer within START_SECONDS.
    """

    def __init__(
        self,
        model: str,
        *,
        additional_config: Mapping[str, Any],
        arguments: tuple[str, ...] = (),
        keep: bool = False,
        waiting: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.keep = keep
        self.log = Path(tempfile.mkdtemp(prefix="entmaxkv-")) / "server.log"
        self._waiting = waiting
        # `vllm serve` does the same but needs a distribution that is called vllm.
        self.command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            f"--model={model}",
            f"--host={HOST}",
            f"--port={self.port}",
            f"--attention-backend={BACKEND}",
            f"--additional-config={json.dumps(dict(additional_config))}",
            *arguments,
        ]

    def __enter__(self) -> Self:
        _exit_when_terminated()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=_environment()
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.keep:
            self.stop()

    def stop(self) -> None:
        """Ask the server to finish, then end whatever is left of its process group."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def metrics(self) -> dict[str, float]:
        """This project's samples on /metrics, summed over labels, by name."""
        return read_metrics(self.url)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _wait_until_healthy(self) -> None:
        start = time.monotonic()
        while (waited := time.monotonic() - start) < START_SECONDS:
            if self.process.poll() is not None:
                raise ServerError(
                    f"the server stopped while starting (exit {self.process.returncode}):\n"
                    f"{self.log_tail()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                self._waiting(waited)
                time.sleep(0.5)
        raise ServerError(f"no answer within {START_SECONDS} s:\n{self.log_tail()}")


def read_metrics(url: str) -> dict[str, float]:
    """This project's samples on a server's /metrics, summed over labels, by name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    totals: dict[str, float] = {}
    for line in lines:
        if line.startswith("entmaxkv_"):
            name, value = line.partition("{")[0].split()[0], line.rsplit(maxsplit=1)[1]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def _exit_when_terminated() -> None:
    """Make SIGTERM an exception, which ends servers, unless this process has a use for it already;
    else it would end this process alone."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _environment() -> dict[str, str]:
    """The caller's, with a cache small enough for any machine where it does not say."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
