"""Evaluate the best checkpoint of a run on its test set, or on other files.

python experiments/evaluate.py simla-tiny-kmeans128-001 --json
"""

import sys

from simla_ray.orchestration.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main(sys.argv[1:]))
