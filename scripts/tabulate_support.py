"""Put the support matrix into docs/support.md: what the code refuses and what tests show."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from support_table import SECTIONS, Line
from tables import put_tables

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
MODEL = ROOT / "configs" / "models" / "llama-1b" / "config.json"

ORDINARY_LAYER: dict[str, Any] = {
    "head_size": 64,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": None,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": None,
    "attn_type": "decoder",
}
"""What vLLM asks a backend about one attention layer of a decoder."""


class Verdict(NamedTuple):
    """What holds on one device: `yes` with the test, `no` with the reason, or `untested`."""

    answer: Literal["yes", "no", "untested"]
    because: str


def values() -> dict[str, str]:
    """What the features' names say of the code."""
    from vllm.config.cache import CacheDType

    from entmaxkv_vllm.backend import HEAD_SIZES, EntmaxKVBackend
    from entmaxkv_vllm.config import PAGE_SIZES

    kept = EntmaxKVBackend.supported_kv_cache_dtypes
    others = [name for name in get_args(CacheDType) if name not in kept]
    return {
        "head_sizes": ", ".join(map(str, HEAD_SIZES)),
        "page_sizes": ", ".join(map(str, PAGE_SIZES)),
        "layouts": ", ".join(
            layout.name for layout in EntmaxKVBackend.supported_kv_cache_layouts()
        ),
        "other_cache_dtypes": ", ".join(others),
    }


def refusal(line: Line) -> str:
    """Why the code refuses a line's feature, and what to do instead; empty if it does not."""
    from entmaxkv_vllm.config import OTHER_BACKEND

    if line.layer:
        reason = _refused_layer(line.layer)
    elif line.engine or line.model:
        reason = _refused_engine(line.engine, line.model)
    else:
        return ""
    return reason.removesuffix(f"; {OTHER_BACKEND}")


def _refused_layer(layer: dict[str, Any]) -> str:
    from entmaxkv_vllm.backend import EntmaxKVBackend

    return "; ".join(EntmaxKVBackend.validate_configuration(**ORDINARY_LAYER | layer))


def _refused_engine(engine: dict[str, Any], model: dict[str, Any]) -> str:
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(MODEL.read_text()) | model
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            EngineArgs(
                model=folder,
                skip_tokenizer_init=True,
                max_model_len=4096,
                attention_backend="ENTMAXKV",
                **engine,
            ).create_engine_config()
        except ValueError as error:
            message = str(error)
            if "entmaxkv: " not in message:
                raise
            # Between what pydantic puts before and after it.
            reason = message.split("entmaxkv: ")[-1].split(" [type=")[0]
            return reason.removeprefix("ENTMAXKV cannot serve this model: ")
    return ""


def verdict(refused: str, test: str, elsewhere: str) -> Verdict:
    """What holds on one device.

    Args:
        refused: why the code refuses the feature, if it does.
        test: what shows it on this device, if anything.
        elsewhere: why this device does not have it, if that is so.
    """
    if test:
        return Verdict("yes", f"`{test.removeprefix('tests/')}`")
    if refused or elsewhere:
        return Verdict("no", refused or elsewhere)
    return Verdict("untested", "")


def table(lines: tuple[Line, ...]) -> list[str]:
    """One section as Markdown."""
    names = values()
    rows = ["| | CPU | GPU | shown by, or refused because |", "|---|---|---|---|"]
    for line in lines:
        refused = refusal(line)
        cpu = verdict(refused, line.cpu, line.not_on_cpu)
        gpu = verdict(refused, line.gpu, line.not_on_gpu)
        if cpu.because == gpu.because:
            because = cpu.because
        else:
            because = "; ".join(
                f"{device}: {text}" for device, (_, text) in (("CPU", cpu), ("GPU", gpu)) if text
            )
        feature = line.feature.format_map(names)
        rows.append(f"| {feature} | {cpu.answer} | {gpu.answer} | {because} |")
    return rows


def tables() -> str:
    """The whole matrix."""
    sections = [["", f"## {title}", "", *table(lines)] for title, lines in SECTIONS]
    return "\n".join(line for section in sections for line in section).strip()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    put_tables(PAGE, tables())


if __name__ == "__main__":
    main()
