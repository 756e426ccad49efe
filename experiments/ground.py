"""Where a picture shows what a phrase says: boxes and scores, and a picture with the heat map.

python experiments/ground.py simla-tiny-kmeans128-001 photo.jpg "a red bicycle" "a dog"
"""

import sys

from simla_ray.orchestration.people import ground_main

if __name__ == "__main__":
    sys.exit(ground_main(sys.argv[1:]))
