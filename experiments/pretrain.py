"""Pretrain: no argument trains SIMLA on the built-in world in minutes; everything else is config.

python experiments/pretrain.py
python experiments/pretrain.py --size small data.train='[pairs.parquet]' data.val='[val.parquet]' --name photos
"""

import sys

from simla_ray.orchestration.cli import pretrain_main

if __name__ == "__main__":
    sys.exit(pretrain_main(sys.argv[1:]))
