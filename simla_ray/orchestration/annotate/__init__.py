"""Regions, tags and phrases as columns of a data set: ``python -m simla_ray.orchestration.annotate --help``.

A conversion (``data.convert``) whose rows pass through a trained model before they are written.
"""
