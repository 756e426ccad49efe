"""What a step and its data cost, what Ray Train adds to it, and what a candidate of re-ranking costs.

python experiments/benchmark.py step            # ours against an unfused step, other methods, and single savings undone
python experiments/benchmark.py step --json
python experiments/benchmark.py overhead
python experiments/benchmark.py data           # the stream against a torch DataLoader and a plain loop
python experiments/benchmark.py rerank --candidates 400
"""

import sys
from pathlib import Path

from simla_ray.errors import UserError
from simla_ray.orchestration.benchmark import benchmark_main

ROOT = Path(__file__).resolve().parents[1]


def load_reference():
    """The unfused step, which is kept with the tests."""
    sys.path.insert(0, str(ROOT))
    if not (ROOT / "tests/reference/bench.py").is_file():
        raise UserError(f"{ROOT}/tests/reference: not there; use a whole checkout, or --only methods")
    from tests.reference.bench import PlainReference

    return PlainReference()


if __name__ == "__main__":
    sys.exit(benchmark_main(sys.argv[1:], load_reference))
