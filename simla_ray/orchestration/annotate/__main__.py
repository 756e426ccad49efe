import sys

from simla_ray.orchestration.annotate.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
