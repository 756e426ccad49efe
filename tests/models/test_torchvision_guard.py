"""The torchvision remedy can be applied again and leaves the imports working."""

import importlib

from simla_ray.models import torchvision_guard


def test_applying_twice_changes_nothing():
    before = list(torchvision_guard._kept)
    torchvision_guard.apply()
    torchvision_guard.apply()
    assert torchvision_guard._kept == before


def test_timm_and_transformers_import_behind_it():
    for name in ("torchvision", "timm", "transformers"):
        assert importlib.import_module(name)
