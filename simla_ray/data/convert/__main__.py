import sys

from simla_ray.data.convert.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
