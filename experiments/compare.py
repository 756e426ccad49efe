"""Methods and ablations side by side over seeds; no argument compares four on the built-in world.

python experiments/compare.py
python experiments/compare.py --methods simla,simla-no-psl,simla-psl-random --config photos.yaml --name keywords
"""

import sys

from simla_ray.orchestration.compare import compare_main

if __name__ == "__main__":
    sys.exit(compare_main(sys.argv[1:]))
