"""docs/support.md says what the code and the tests say."""

import ast
from pathlib import Path

import pytest
import tabulate_support
import torch
from support_table import SECTIONS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what a CPU refuses is asked on a CPU"
)

LINES = [line for _, lines in SECTIONS for line in lines]
ROOT = Path(__file__).parent.parent


def functions(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_is_what_the_code_says_now():
    assert tabulate_support.tables() in (ROOT / "docs" / "support.md").read_text(), (
        "stale: run python scripts/tabulate_support.py"
    )


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.feature)
def test_a_feature_is_claimed_only_with_a_test_that_exists(line):
    for test in filter(None, (line.cpu, line.gpu)):
        file, _, name = test.partition("::")
        assert name in functions(file)
    if line.gpu:
        # Kernels and engines are tested on the device that there is.
        file = line.gpu.partition("::")[0]
        anywhere = file.startswith(("tests/compiled/", "tests/engine/"))
        assert anywhere or "mark.gpu" in (ROOT / file).read_text()


def test_no_feature_is_claimed_on_a_cpu_that_is_refused_there():
    for line in LINES:
        assert not (line.cpu and (line.not_on_cpu or tabulate_support.refusal(line))), line.feature
