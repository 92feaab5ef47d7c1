"""The `entmaxkv` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entmaxkv_vllm import DEMO_MODEL, __version__
from entmaxkv_vllm.bench.options import (
    BY_CODES,
    DATA,
    DTYPES,
    EXPECTATIONS,
    PEERS,
    Options,
    add_load,
)
from entmaxkv_vllm.config import PAGE_SIZES, SELECTORS
from entmaxkv_vllm.evaluate.ruler import TASKS

PARTS = ("attention", "perplexity", "tasks")
BENCHED = ("exact", "gaussian", "topk")
"""The selectors that are timed unless others are asked for."""


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
    plot = commands.add_parser("plot", help="draw results of benchmarks and fidelity measurements")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON")
    plot.add_argument("--out", type=Path, required=True, help="the folder for SVG files")

    _add_evaluate(
        commands.add_parser("evaluate", help="measure what a model loses under selectors")
    )
    _add_bench(commands.add_parser("bench", help="time the kernels, or a server under load"))
    return top


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", type=Path, help="a folder with weights and a tokenizer")
    evaluate.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    evaluate.add_argument(
        "--selectors",
        nargs="+",
        default=["exact", "gaussian", "topk:1024"],
        help="such as exact, gaussian, topk:TOKENS, adaptive:REACH, adaptive:1.5,guard=0",
    )
    evaluate.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=["perplexity", "attention"],
        help="tasks are answered only by models trained on them, see docs/fidelity.md",
    )
    for name, default, help in (
        ("contexts", [4096], "tokens of a sequence"),
        ("batch", 8, "windows of text, and tasks of each kind, at once"),
        ("steps", 128, "tokens of a window that are predicted"),
        ("sequences", 2, "whose attention is measured"),
        ("positions", 128, "of each of them"),
    ):
        evaluate.add_argument(
            f"--{name}",
            type=_count,
            nargs="+" if isinstance(default, list) else None,
            default=default,
            help=f"{help}; default {default}",
        )
    evaluate.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="kinds of tasks; default all"
    )
    evaluate.add_argument("--alpha", type=float, help="in place of what config.json says")
    evaluate.add_argument(
        "--packages",
        nargs="*",
        default=[],
        help="installed packages whose sources are text, besides the standard library",
    )
    evaluate.add_argument("--inputs", type=Path, help="a folder to write keys and queries to")
    evaluate.add_argument(
        "--minutes", type=float, default=1440, help="begin nothing new in a part after so many"
    )
    evaluate.add_argument("--commit", help="of a copy of the code that is no checkout")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(dest="benchmark", required=True)

    kernels = kinds.add_parser(
        "kernels", help="attention alone, beside FlashAttention-3, TRITON_ATTN, SDPA, FlashInfer"
    )
    kernels.add_argument(
        "batches", nargs="+", metavar="BATCH", help="such as 1q1s128k, 8q1s32k, q2k, 2q1k_32q1s4k"
    )
    known = *SELECTORS, *BY_CODES
    kernels.add_argument("--selectors", nargs="+", choices=known, default=list(BENCHED))
    kernels.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    asked = Options()
    for name, help in (
        ("query-heads", None),
        ("kv-heads", None),
        ("head-size", None),
        ("page-size", None),
        ("dtype", "of the cache, on a GPU"),
        ("data", "the keys: normal numbers, or topics that last some 128 tokens"),
        ("support", "share of the tokens that exact attention gives weight"),
        ("share", "share of the longest context that topk reads"),
        ("table-tokens", "room of the block table; at least the longest context"),
        ("repeats", "turns of each arm"),
        ("seed", None),
    ):
        default = getattr(asked, name.replace("-", "_"))
        kernels.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            choices={"page-size": PAGE_SIZES, "dtype": DTYPES, "data": DATA}.get(name),
            help=f"{help}; default {default}" if help else f"default {default}",
        )
    kernels.add_argument("--profile", action="store_true", help="add the time of each kernel")
    kernels.add_argument("--reference-system", type=Path, help="a checkout of deep-spin/entmaxkv")

    server = kinds.add_parser("server", help="a running server, such as http://127.0.0.1:8000")
    server.add_argument("url")
    server.add_argument("--model", help="default: the first that the server names")
    add_load(server)
    server.add_argument(
        "--expect",
        choices=EXPECTATIONS,
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
    if args.command == "plot":
        from entmaxkv_vllm.plots.draw import command as plot

        return plot(args.files, args.out)
    if args.command == "evaluate":
        from entmaxkv_vllm.evaluate.command import command as evaluate

        return evaluate(args)
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
