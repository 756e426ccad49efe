import sys

from simla_ray.data.adapt.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
