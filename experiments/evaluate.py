"""Evaluate the best checkpoint of a run on its test set, or on other files.

python experiments/evaluate.py simla-tiny-kmeans128-001 --json
python experiments/evaluate.py simla-tiny-kmeans128-001 classification --data emoji.parquet --label-column group
python experiments/evaluate.py simla-tiny-kmeans128-001 --score pairs.csv --out scores.csv
"""

import sys

from simla_ray.orchestration.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main(sys.argv[1:]))
