"""Find pictures of your own by words, or by another picture: a table, and a page with the hits.

python experiments/search.py simla-tiny-kmeans128-001 ~/Pictures "a red bicycle"
python experiments/search.py simla-tiny-kmeans128-001 ~/Pictures photo.jpg --top 24 --out like.html
"""

import sys

from simla_ray.orchestration.people import search_main

if __name__ == "__main__":
    sys.exit(search_main(sys.argv[1:]))
