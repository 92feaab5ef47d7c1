"""What can be asked of the benchmarks. Light: the command line reads it at every start."""

import argparse
from dataclasses import dataclass, fields
from typing import TypeVar

PEERS = ("fa3", "triton_attn", "sdpa", "flashinfer")
DATA = ("random", "clustered")
BY_CODES = ("topk-codes", "adaptive-codes")
"""Selectors that are timed with the option `codes`."""
DTYPES = ("bfloat16", "float16", "float32")
EXPECTATIONS = ("any", "sparse", "exact", "other")
"""Which path is to have decoded on a server; other: that of another backend."""


@dataclass(frozen=True)
class Options:
    """What all batches of a kernel benchmark have in common.

    support: share of the tokens that exact attention gives weight.
    share: of the longest context, top-k's budget.
    table_tokens: what block tables have room for, at least the longest sequence.
    """

    query_heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    data: str = "clustered"
    support: float = 0.005
    share: float = 0.05
    table_tokens: int = 0
    repeats: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("query_heads", "kv_heads", "head_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads is {self.query_heads}; expected a multiple of the {self.kv_heads} KV "
                "heads"
            )
        for name in ("support", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected above 0 and at most 1")


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    running: requests that are under way at once, at most.
    shortest, longest: tokens of the prompts, which spread evenly over the octaves between.
    least_output, most_output: tokens of the answers.
    """

    requests: int = 200
    running: int = 16
    shortest: int = 1024
    longest: int = 32768
    least_output: int = 64
    most_output: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for low, high, least in (
            ("least_output", "most_output", 2),
            ("shortest", "longest", 1),
            ("running", "requests", 1),
        ):
            if not least <= getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"{low} is {getattr(self, low)} and {high} is {getattr(self, high)}; expected "
                    f"at least {least} and no more than {high}"
                )


Asked = TypeVar("Asked", Options, Load)


def from_arguments(kind: type[Asked], arguments: argparse.Namespace) -> Asked:
    """Options or a load from parsed arguments of the same names.

    Raises ValueError for what cannot be.
    """
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


def add_load(parser: argparse.ArgumentParser) -> None:
    """The options of a load, by their names."""
    for field in fields(Load):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=field.default, help=f"default {field.default}")
