"""Run compute-sanitizer over a few cases of every kernel, and write what it found.

The cases are those of `fuzz.py`: the sanitizer's tools make a program some hundred times slower.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from fuzz import run_case
from fuzz_cases import FAMILIES
from timing import checked_out

TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
    "synccheck": [],
}
CASES = [
    ("exact bf16", 3),
    ("exact fp32", 5),
    ("exact D 256, pages of 64", 1),
    ("exact alpha 1.2", 2),
    ("alpha per head", 1),
    ("softmax", 2),
    ("long fp32", 1),
    ("top-k bf16", 1),
    ("top-k long", 0),
    ("gaussian fp32", 2),
    ("prefill bf16", 1),
    ("prefill fp32", 1),
]


def run_cases() -> None:
    for name, index in CASES:
        error = run_case(name, index)["error"]
        torch.cuda.synchronize()
        if not error <= 1:
            sys.exit(f"{name!r} {index}: error {error:.3g} of what is allowed")


def check(tool: str, options: list[str], seconds: int) -> dict[str, object]:
    """One tool over all cases; only this project's kernels are instrumented."""
    names = "|".join(("append", "sample", "guess", "collect", "filter", "attend", "fallback"))
    names += "|box|choose|model|cut|reach|list|softmax|prefill"
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        command = ["compute-sanitizer", "--tool", tool, *options]
        command += ["--kernel-name", f"regex:({names}).*", "--log-file", log.name]
        command += [sys.executable, __file__, "--cases"]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, env=environment, timeout=seconds)
            ended = "completed" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds} s"
        text = Path(log.name).read_text()
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    print(tool, ended, summary, flush=True)
    if not summary or not summary[-1].startswith("0"):
        print(text[:4000], flush=True)
    return {"tool": tool, "ended": ended, "summary": summary[-1] if summary else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--cases", action="store_true", help="run the cases, without a tool")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=int, default=600, help="limit of each tool")
    arguments = parser.parse_args()
    if arguments.cases:
        run_cases()
        return
    run_cases()  # compiles
    results = [check(tool, TOOLS[tool], arguments.seconds) for tool in arguments.tools]
    about = {
        "gpu": torch.cuda.get_device_name(),
        "commit": checked_out(),
        "date": datetime.date.today().isoformat(),
        "cases": [f"{name} {index}" for name, index in CASES if name in FAMILIES],
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    clean = all(str(result["summary"]).startswith("0") for result in results)
    sys.exit(not clean)


if __name__ == "__main__":
    main()
