"""The `entmaxkv` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from entmaxkv_vllm import DEMO_MODEL, __version__
from entmaxkv_vllm.config import SELECTORS


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
    return top


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
    from entmaxkv_vllm.doctor import run as run_doctor

    return run_doctor(args.model, args.additional_config, args.hf_overrides)


if __name__ == "__main__":
    sys.exit(main())
