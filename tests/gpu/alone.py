"""Print what one engine answers to a few prompts run alone, to the bit, as JSON on the last line.

Usage: PYTHONPATH=tests python -m gpu.alone graphs-alone|eager
"""

import json
import sys

import conftest  # noqa: F401  settings of vLLM

from gpu.test_serving import ALONE, ENGINES, fingerprint, generate, started


def main() -> None:
    answers = []
    with started("exact", **ENGINES[sys.argv[1]]) as llm:
        for ids in ALONE:
            # A cached prefix was computed in other chunks, in another order of sums.
            llm.reset_prefix_cache()
            answers += [fingerprint(output) for output in generate(llm, [ids], logprobs=5)]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
