"""Latency and throughput of a server under mixed requests, beside FLASH_ATTN.

One server after the other with the same model, a Llama shape with random weights, and the same
requests in the same order: prompts of random tokens whose lengths spread evenly over the octaves
between --shortest and --longest. At most --running requests are under way at once.

The weights are made so that attention scores have a standard deviation of about --score-spread.
Writes docs/results/server-*.json, row after row, and fails if any request fails or if a sparse
selector never ran.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_serving import SETTINGS, SHAPES

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.bench import server as bench
from entmaxkv_vllm.bench.options import Load, add_load, from_arguments
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.server import Server

ROOM = 512
"""Tokens that a server takes beyond the longest prompt."""


def save_model(folder: str, shape: str, spread: float, longest: int) -> None:
    """A checkpoint with random weights; attention scores spread by about `spread`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    # What weights multiply has unit variance, so scores have that of a query times that of a key.
    deviation = (spread / sizes["head_dim"] ** 0.5 / sizes["hidden_size"] * 8) ** 0.5
    config = LlamaConfig(
        **sizes,
        vocab_size=128256,
        max_position_embeddings=longest,
        initializer_range=deviation,
        tie_word_embeddings=shape == "1B",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
        entmax_alpha=1.5,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()


def measure(arm: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One server under all requests."""
    arguments = (
        f"--tokenizer={DEMO_MODEL}",
        "--served-model-name=model",
        f"--max-model-len={args.longest + ROOM}",
        f"--max-num-seqs={args.running}",
        "--no-enable-prefix-caching",
        *args.server_argument,
    )
    settings: dict[str, Any] = dict(SETTINGS.get(arm, {}))
    if arm == "FLASH_ATTN":
        arguments += ("--attention-backend=FLASH_ATTN",)
    elif arm == "topk":
        settings["token_budget"] = args.token_budget
    load = from_arguments(Load, args)
    options = {"entmaxkv": settings}
    began = time.perf_counter()
    with Server(str(model), additional_config=options, arguments=arguments) as server:
        # A run that is cut short tells how far it came.
        print(f"{arm}: answers after {time.perf_counter() - began:.0f} s", flush=True)
        row = bench.measure(server.url, "model", load)
    return {"model": args.model.name if args.model else args.shape, "selector": arm, **row}


def expected_of(arm: str) -> str:
    """What a server of this arm has to have counted, one of bench's EXPECTATIONS."""
    return {"FLASH_ATTN": "other", "exact": "exact"}.get(arm, "sparse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--arm", nargs="+", default=["FLASH_ATTN", "exact", "topk"])
    add_load(parser)
    parser.add_argument("--token-budget", type=int, default=2048, help="of topk")
    parser.add_argument("--score-spread", type=float, default=2.5)
    parser.add_argument("--server-argument", action="append", default=[], help="of vllm serve")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of random weights")
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    args = parser.parse_args()
    try:
        from_arguments(Load, args)
    except ValueError as error:
        parser.error(str(error))
    measured = about(args.commit) | {"score_spread": args.score_spread}
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix=f"llama-{args.shape}-") as folder:
        if args.model is None:
            save_model(folder, args.shape, args.score_spread, args.longest + ROOM)
        for arm in args.arm:
            rows.append(measure(arm, args.model or Path(folder), args))
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(json.dumps(measured | {"rows": rows}, indent=1) + "\n")
            wrong += bench.complaints(rows[-1], arm, expected_of(arm))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
