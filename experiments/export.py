"""Export a run as a folder with weights, config, vocabulary and model card, for simla_ray.load.

python experiments/export.py simla-tiny-kmeans128-001
python experiments/export.py ALBEF.pth albef        # an official file becomes such a folder, too
"""

import sys

from simla_ray.orchestration.cli import export_main

if __name__ == "__main__":
    sys.exit(export_main(sys.argv[1:]))
