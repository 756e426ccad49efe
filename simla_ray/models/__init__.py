"""Towers, the transformer stack, teacher, queue.

Importing this package first makes timm and transformers importable.
"""

from simla_ray.models import torchvision_guard as _torchvision_guard

_torchvision_guard.apply()
