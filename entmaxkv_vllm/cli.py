"""The `entmaxkv` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entmaxkv_vllm import DEMO_MODEL, __version__
from entmaxkv_vllm.config import PAGE_SIZES, SELECTORS


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a job."""
    top = argparse.ArgumentParser(prog="entmaxkv", description=__doc__)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="serve a model, hide a needle in a long text, ask for it, check everything"
    )
    demo.add_argument("--model", default=str(DEMO_MODEL), help="default: the model that ships")
    demo.add_argument("--selector", choices=SELECTORS, default="gaussian")
    demo.add_argument("--tokens", type=int, default=6000, help="length of the text")
    demo.add_argument("--seed", type=int, default=0, help="which text, needle and place")
    demo.add_argument("--keep", action="store_true", help="leave the server running")

    doctor = commands.add_parser(
        "doctor", help="say what is installed, what would be selected, and why not"
    )
    doctor.add_argument("model", nargs="?", help="a model to judge as `vllm serve` would")
    for option in ("--additional-config", "--hf-overrides"):
        doctor.add_argument(
            option, type=_json_object, default={}, help="JSON, as for vllm serve; with a model"
        )
    _add_bench(commands.add_parser("bench", help="time the kernels, or a server under load"))
    return top


def _add_bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(dest="benchmark", required=True)

    kernels = kinds.add_parser(
        "kernels", help="attention alone, beside FlashAttention-3, TRITON_ATTN, SDPA, FlashInfer"
    )
    kernels.add_argument(
        "batches", nargs="+", metavar="BATCH", help="such as 1q1s128k, 8q1s32k, q2k, 2q1k_32q1s4k"
    )
    kernels.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    peers = ("fa3", "triton_attn", "sdpa", "flashinfer")
    kernels.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    kernels.add_argument("--query-heads", type=int, default=32)
    kernels.add_argument("--kv-heads", type=int, default=8)
    kernels.add_argument("--head-size", type=int, default=128)
    kernels.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=16)
    kernels.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    kernels.add_argument("--data", choices=("random", "clustered"), default="clustered")
    kernels.add_argument("--support", type=float, default=0.005, help="share with weight")
    kernels.add_argument("--share", type=float, default=0.05, help="share that topk reads")
    kernels.add_argument("--table-tokens", type=int, default=0, help="room of the block table")
    kernels.add_argument("--repeats", type=int, default=15)
    kernels.add_argument("--seed", type=int, default=0)
    kernels.add_argument("--profile", action="store_true", help="add the time of each kernel")
    kernels.add_argument("--reference-system", type=Path, help="a checkout of deep-spin/entmaxkv")

    server = kinds.add_parser("server", help="a running server, such as http://127.0.0.1:8000")
    server.add_argument("url")
    server.add_argument("--model", help="default: the first that the server names")
    server.add_argument("--requests", type=int, default=200)
    server.add_argument("--running", type=int, default=16, help="requests at once")
    server.add_argument("--shortest", type=int, default=1024, help="tokens of a prompt")
    server.add_argument("--longest", type=int, default=32768)
    server.add_argument("--least-output", type=int, default=64)
    server.add_argument("--most-output", type=int, default=256)
    server.add_argument("--seed", type=int, default=0)
    server.add_argument(
        "--expect",
        choices=("any", "sparse", "exact", "other"),
        default="any",
        help="refuse a result of another path; other: of another backend",
    )
    for each in (kernels, server):
        each.add_argument("--out", type=Path, help="a JSON file to write")
        each.add_argument("--commit", help="of a copy of the code that is no checkout")

    compare = kinds.add_parser("compare", help="say whether two runs agree within their spread")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0 only if what it checks is true."""
    top = parser()
    args = top.parse_args(arguments)
    if (
        args.command == "doctor"
        and not args.model
        and (args.additional_config or args.hf_overrides)
    ):
        top.error("--additional-config and --hf-overrides are judged with a model: give one")
    if args.command == "demo":
        from entmaxkv_vllm.demo import run as run_demo

        return run_demo(args.model, args.selector, args.tokens, args.seed, args.keep)
    if args.command == "bench":
        return _bench(args)
    from entmaxkv_vllm.doctor import run as run_doctor

    return run_doctor(args.model, args.additional_config, args.hf_overrides)


def _bench(args: argparse.Namespace) -> int:
    if args.benchmark == "kernels":
        from entmaxkv_vllm.bench.kernels import command

        return command(args)
    if args.benchmark == "server":
        from entmaxkv_vllm.bench.server import command

        return command(args)
    from entmaxkv_vllm.bench.report import command

    return command(args)


if __name__ == "__main__":
    sys.exit(main())
