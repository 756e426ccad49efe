"""Ask about a picture: the likeliest of the answers that a run fine-tuned with task=vqa knows.

python experiments/ask.py simla-tiny-vqa-001 photo.jpg "what color is the circle?" "how many red things are there?"
"""

import sys

from simla_ray.orchestration.people import ask_main

if __name__ == "__main__":
    sys.exit(ask_main(sys.argv[1:]))
