"""Write what one engine answers to a few prompts run alone, to the bit, to a JSON file.

Usage: PYTHONPATH=tests python -m gpu.alone graphs-alone|eager FILE
"""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  settings of vLLM

from gpu.test_serving import ALONE, ENGINES, fingerprint, generate, started


def main() -> None:
    answers = []
    with started("exact", **ENGINES[sys.argv[1]]) as llm:
        for ids in ALONE:
            # A cached prefix was computed in other chunks, in another order of sums.
            llm.reset_prefix_cache()
            answers += [fingerprint(output) for output in generate(llm, [ids], logprobs=5)]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
