"""Search for objective weights and keyword thresholds; no argument sweeps them on the built-in world in minutes.

python experiments/sweep_psl.py
python experiments/sweep_psl.py --config sweep.yaml sweep.trials=40 --name photos-psl
"""

import sys

from simla_ray.orchestration.sweep import sweep_main

if __name__ == "__main__":
    sys.exit(sweep_main(sys.argv[1:]))
