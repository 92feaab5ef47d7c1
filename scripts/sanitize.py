"""Run compute-sanitizer over small cases of every kernel, and write what it found.

compute-sanitizer is looked for in PATH, under /usr/local/cuda*/bin, and where the package
nvidia-cuda-sanitizer-api puts it.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton

from entmaxkv_vllm.bench.provenance import checked_out

TOOLS = {
    # Whether a call of CUDA fails is for the cases to say: PyTorch makes some to see if they do.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "analysis"],
    "initcheck": [],
    "synccheck": [],
}
REPORTED = 60
"""Lines of a tool's log that the result keeps."""

GRACE = 30
"""Seconds that the case which runs when the time is over may still take."""


def find_sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    places = [*Path("/usr/local").glob("cuda*/bin"), *Path(sys.prefix).glob("lib*/**/cu1*/bin")]
    paths = [place / "compute-sanitizer" for place in sorted(places, reverse=True)]
    return found or next((str(path) for path in paths if path.exists()), None)


def run_cases(prefix: list[str], seconds: float, record: Path) -> tuple[str, dict[str, Any]]:
    """Run the cases behind a command, and say how it ended and what the cases recorded.

    seconds: after which no further case begins; GRACE later it is ended by force.
    """
    record.unlink(missing_ok=True)
    cases = [sys.executable, str(Path(__file__).with_name("sanitize_cases.py"))]
    # Each allocation is one of CUDA's, with bounds of its own and never initialised; kernels of
    # PyTorch that do not run are not loaded.
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "CUDA_MODULE_LOADING": "LAZY",
    }
    process = subprocess.Popen(
        [*prefix, *cases, str(record), str(seconds)], env=environment, start_new_session=True
    )
    try:
        code = process.wait(seconds + GRACE)
        ended = f"exit code {code}" if code else "completed"
    except subprocess.TimeoutExpired:
        # With the cases, which would keep the GPU busy and may be in another process group.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(OSError, ValueError):
            os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        ended = f"killed after {seconds + GRACE:.0f} s"
    told = json.loads(record.read_text()) if record.exists() else {}
    return ended, {name: told[name] for name in ("cases", "kernels", "not_run") if name in told}


def check(sanitizer: str, tool: str, seconds: float, folder: Path) -> dict[str, Any]:
    log, start = folder / f"{tool}.log", time.time()
    command = [sanitizer, "--tool", tool, *TOOLS[tool], "--target-processes", "application-only"]
    command += ["--launch-timeout", "60", "--show-backtrace", "device", "--log-file", str(log)]
    ended, record = run_cases([*command, "--error-exitcode", "9"], seconds, folder / "record.json")
    lines = log.read_text().splitlines() if log.exists() else []
    # Of racecheck: N hazards displayed (N errors, N warnings).
    summaries = [line for line in lines if "SUMMARY" in line]
    findings = [int(number) for number in re.findall(r"\d+", " ".join(summaries))]
    kernels = sorted(set(re.findall(r"\w+_kernel(?=\+0x|\()", "\n".join(lines))))
    row = {
        "tool": tool,
        "ended": ended,
        "seconds": round(time.time() - start, 1),
        "errors": max(findings) if findings else None,
        "summary": " ".join(line.strip("= ") for line in summaries) or None,
        **record,
    }
    row["clean"] = ended == "completed" and row["errors"] == 0
    if not row["clean"]:
        row |= {"kernels_named": kernels, "report": lines[:REPORTED]}
    return row


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['tool']}: {'clean' if row['clean'] else 'NOT CLEAN'}, {row['ended']}, "
        f"{row['seconds']} s, {row['summary']}, {len(row.get('cases', []))} cases, "
        f"{len(row.get('kernels', []))} kernels; not run: {row.get('not_run')}",
        *row.get("report", []),
        sep="\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--sanitizer", default=find_sanitizer(), help="path of compute-sanitizer")
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    parser.add_argument(
        "--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck", "initcheck"]
    )
    parser.add_argument(
        "--seconds", type=float, default=30, help="of a tool, after which no further case begins"
    )
    parser.add_argument(
        "--compile-seconds", type=float, default=150, help="the same without a tool, at first"
    )
    arguments = parser.parse_args()
    if arguments.sanitizer is None:
        sys.exit("compute-sanitizer is not found; --sanitizer says where it is")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        record = Path(name) / "record.json"
        ended, plain = run_cases([], arguments.compile_seconds, record)
        print(f"without a tool: {ended}; not run: {plain.get('not_run')}", flush=True)
        if ended != "completed":
            sys.exit("the cases fail without a tool")
        for tool in arguments.tools:
            rows.append(check(arguments.sanitizer, tool, arguments.seconds, Path(name)))
            show(rows[-1])
            if arguments.out:
                # After each tool: the next one may take longer than there is time.
                result = about(arguments.sanitizer, arguments.commit) | {"rows": rows}
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(row["clean"] for row in rows))


def about(sanitizer: str, commit: str | None) -> dict[str, Any]:
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "compute-sanitizer": " ".join(re.findall(r"Version (\S+)", version)),
        },
        "commit": commit or checked_out(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
