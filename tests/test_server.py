"""Servers end with whoever started them."""

import os
import signal
import subprocess
import sys
import time

import pytest

WAITS = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


def alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["ended", "interrupted"])
def test_a_server_that_starts_ends_with_a_program_that_is(number, tmp_path):
    started = tmp_path / "started"
    # What a shell runs in the background ignores interrupts, and so would the program.
    code = f"""
import signal, sys
from entmaxkv_vllm.server import Server

signal.signal(signal.SIGINT, signal.default_int_handler)

class Waiting(Server):
    def __init__(self):
        super().__init__("none", additional_config={{}})
        self.command = [sys.executable, "-c", {WAITS!r}, {str(started)!r}]

with Waiting():
    pass
"""
    program = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert until(lambda: started.exists() and started.read_text())
    server = int(started.read_text())
    assert alive(server)
    program.send_signal(number)
    assert program.wait(40) != 0
    assert until(lambda: not alive(server))
